"""The weights of the model being trained, and whether what is about to be saved holds all of them, whole.

Libraries have written shards with weights of shape (0,) and said nothing; so a save is compared with the model itself
before anything of it is written.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from deepspeed.checkpoint.constants import (
    FP32_FLAT_GROUPS,
    FROZEN_PARAM_SHAPES,
    OPTIMIZER_STATE_DICT,
    PARAM_SHAPES,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)

from finetune_trainer.checkpoints.manifest import Weight

ADAPTER = "adapter_model.safetensors"


def describe_weights(model: Any, trained_only: bool) -> dict[str, Weight]:
    """Return the parameters of a model, whole also where ZeRO-3 has partitioned them; of tied ones the first."""
    return {
        name: Weight(tuple(getattr(parameter, "ds_shape", parameter.shape)), str(parameter.dtype).partition(".")[2])
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or not trained_only
    }


def count_saved(states: Iterable[Any]) -> tuple[int, int]:
    """Return the number of fp32 weights in this rank's optimizer shards, and of its model shards."""
    num_masters = num_models = 0
    for state in states:
        optimizer = state.get(OPTIMIZER_STATE_DICT) or {}
        groups = optimizer.get(FP32_FLAT_GROUPS) or optimizer.get(SINGLE_PARTITION_OF_FP32_GROUPS) or []
        num_masters += sum(group.numel() for group in groups)
        num_models += "module" in state
    return num_masters, num_models


def find_gaps(states: Iterable[Any], weights: Mapping[str, Weight], zero_stage: int) -> list[str]:
    """Return what the model shards of one rank lack of the weights; an optimizer shard lacks nothing here."""
    gaps = [f"{name} has shape {weight.shape}" for name, weight in weights.items() if not weight.count]
    for state in states:
        if "module" not in state:
            continue
        saved = _read_partitioned(state) if zero_stage == 3 else _read_whole(state)
        for name, weight in weights.items():
            if saved.get(name) != weight.shape:
                gaps.append(f"{name} is saved with shape {saved.get(name)}, the model has {weight.shape}")
    return gaps


def _read_whole(state: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state["module"].items() if hasattr(tensor, "shape")}


def _read_partitioned(state: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the shards of all ranks add up to."""
    shapes: dict[str, Any] = dict(state.get(FROZEN_PARAM_SHAPES) or {})
    for group in state[PARAM_SHAPES] or []:
        shapes.update(group)
    return {name: tuple(shape) for name, shape in shapes.items()}


def find_adapter_gaps(folder: pathlib.Path) -> list[str]:
    """Return what is wrong with the adapter in a folder: no tensors, or empty ones."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / ADAPTER, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        return [f"{ADAPTER} is not there or not whole: {error}"]
    if not shapes:
        return [f"{ADAPTER} holds no tensors"]
    return [f"{name} of {ADAPTER} has shape {shape}" for name, shape in shapes.items() if not math.prod(shape)]
