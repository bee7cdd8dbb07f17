"""How much room checkpoints will need: from a model or its number of parameters, the ZeRO stage and the retention.

Used by `checkpoints plan`. The formula is the contract's; counting the parameters of a model is here.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from finetune_contract.checkpoint_sizes import estimate_checkpoint_bytes, peak_bytes
from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.checkpoints.containers import DamagedFileError, read_json_object, read_safetensors_header
from finetune_trainer.errors import TrainerError

_LLAMA_LIKE = ("llama", "mistral", "qwen2")
"""Families whose number of parameters follows from config.json by the same formula."""


@dataclasses.dataclass(frozen=True)
class Need:
    """The room that one kind of checkpoint needs."""

    checkpoint_bytes: int
    peak_bytes: int
    """One checkpoint more than is kept exists while one is made."""


def estimate_need(parameters: int, trained: int, zero_stage: int, num_kept: int, *, has_gathered_weights: bool) -> Need:
    """Return the room for checkpoints of a model; `trained` are the parameters of an adapter in LoRA, else all."""
    one = estimate_checkpoint_bytes(
        trained, min(parameters, trained), zero_stage, has_gathered_weights=has_gathered_weights
    )
    return Need(one, peak_bytes(one, num_kept))


def count_parameters(model: pathlib.Path) -> int:
    """Return the number of parameters of a model folder: from its safetensors, or else from its config.json.

    Raises TrainerError.
    """
    if not model.is_dir():
        raise _unusable(model, "no such folder")
    try:
        files = sorted(model.glob("*.safetensors"))
        if files:
            return sum(read_safetensors_header(file).num_parameters for file in files)
        if not (model / "config.json").exists():
            raise _unusable(model, "it holds neither safetensors nor config.json")
        return _count_by_config(read_json_object(model / "config.json"))
    except (DamagedFileError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise _unusable(model, f"its parameters cannot be counted: {error}") from error


def _unusable(model: pathlib.Path, why: str) -> TrainerError:
    hint = "Give the number of parameters instead, such as --parameters 6738415616."
    return TrainerError(Reason.INVALID_CONFIG, ExitCode.NO_INPUT, f"--model {model}: {why}", hint)


def _count_by_config(config: dict[str, Any]) -> int:
    """Count what a gated-MLP decoder with these settings has. Raises ValueError for other architectures."""
    family = config.get("model_type")
    if family not in _LLAMA_LIKE:
        raise ValueError(f"config.json is of a {family!r} model, and there are no safetensors beside it")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    attention = 2 * hidden * queries + 2 * hidden * keys
    if family == "qwen2":
        attention += queries + 2 * keys
    layer = attention + 3 * hidden * config["intermediate_size"] + 2 * hidden
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return int(embeddings + config["num_hidden_layers"] * layer + hidden)
