"""A LoRA adapter folder as PEFT writes it: read, checked, identified, and written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
import re
from typing import TYPE_CHECKING, Any

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.adapters.base import Base, find_adapter_base, read_model_base
from finetune_trainer.errors import TrainerError
from finetune_trainer.reporting import read_object

if TYPE_CHECKING:
    from collections.abc import Mapping

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
DTYPES = ("float32", "bfloat16", "float16")
"""Types of tensors that are composed."""
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_UNSUPPORTED = ("use_dora", "modules_to_save", "layer_replication", "trainable_token_indices", "lora_bias")
"""Settings of an adapter that change more than one low-rank product per module."""


@dataclasses.dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one module: `scale * second @ first`."""

    first: Any
    """Tensor of shape (rank, in features); `lora_A`."""
    second: Any
    """Tensor of shape (out features, rank); `lora_B`."""
    scale: float

    @property
    def rank(self) -> int:
        """Number of rows of `first`."""
        return int(self.first.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the module's weight: (out features, in features)."""
        return int(self.second.shape[0]), int(self.first.shape[1])


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter in memory."""

    folder: pathlib.Path
    config: Mapping[str, Any]
    modules: Mapping[str, LowRank]
    """By the module's name in the base model."""
    digest: str
    """SHA-256 of its weights and of what scales them."""
    base: Base
    """The model that it says it was trained on."""
    label: str
    """How messages call it: the option, file or field that names it."""

    @property
    def rank(self) -> int:
        """Largest rank of any module."""
        return max(module.rank for module in self.modules.values())


def read_adapter(folder: pathlib.Path, label: str = "") -> Adapter:
    """Read an adapter; also that in the folder of a promoted model.

    Raises TrainerError that begins with `label`, by default `--adapter FOLDER`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    label = label or f"--adapter {folder}"
    if not (folder / CONFIG).is_file() and (folder / "adapter" / CONFIG).is_file():
        folder /= "adapter"
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        name = pathlib.Path(error.filename or WEIGHTS).name
        raise refuse(label, f"{name} is missing", "Name the folder of a LoRA adapter that PEFT wrote.") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise refuse(label, f"cannot be read: {error}", "Copy the adapter again.") from error
    _check_config(label, config)
    digest, base = _make_digest(folder, config), find_adapter_base(folder, config)
    return Adapter(folder, config, _pair(label, config, tensors), digest, base, label)


def require_base(folder: pathlib.Path, model: pathlib.Path, label: str) -> None:
    """Raise TrainerError for an adapter that says that it was trained on another model than that of this folder."""
    named = find_adapter_base(folder, read_object(folder / CONFIG))
    # Only then: of a model that nothing is recorded of, every byte is read.
    if named.digests:
        found = read_model_base(model)
        if named.differs_from(found):
            why = f"its base is {named.label}, and {model} is {found.label}"
            raise refuse(label, why, "Name the model that it was trained on.")


def refuse(label: str, why: str, hint: str) -> TrainerError:
    """Return the error for an adapter that cannot be used."""
    return TrainerError(Reason.MODEL_INVALID, ExitCode.NO_INPUT, f"{label}: {why}", hint)


def _check_config(label: str, config: Any) -> None:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise refuse(label, f"{CONFIG} is not that of a LoRA adapter", "Other kinds of adapters do not add up.")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise refuse(label, f"it uses {name}, which does not add up", "Merge it into its base model instead.")
    if config.get("bias", "none") != "none":
        raise refuse(label, "it trains biases, which do not add up", "Merge it into its base model instead.")
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int | float) or isinstance(config[name], bool) or config[name] <= 0:
            raise refuse(label, f"{CONFIG} has {name}: {config.get(name)!r}", "Copy the adapter again.")


def _pair(label: str, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, LowRank]:
    halves: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise refuse(label, f"tensor {name} is no part of a low-rank product", "Only lora_A and lora_B add up.")
        _check_tensor(label, name, tensor)
        halves.setdefault(match["module"], {})[match["part"]] = tensor
    if not halves:
        raise refuse(label, "it holds no tensors", "Save it again from the training's checkpoint.")
    modules = {}
    for module, parts in halves.items():
        if set(parts) != {"A", "B"} or parts["A"].shape[0] != parts["B"].shape[1]:
            raise refuse(label, f"lora_A and lora_B of {module} do not fit together", "Copy the adapter again.")
        rank = _find_pattern(config.get("rank_pattern"), module, config["r"])
        if parts["A"].shape[0] != rank:
            why = f"{module} has rank {parts['A'].shape[0]}, {CONFIG} says {rank}"
            raise refuse(label, why, "Weights and configuration are of two adapters: copy both again.")
        modules[module] = LowRank(parts["A"], parts["B"], _find_scale(config, module))
    return modules


def _check_tensor(label: str, name: str, tensor: Any) -> None:
    if not tensor.numel():
        hint = "It was saved from partitioned weights: save it again from the training's checkpoint."
        raise refuse(label, f"tensor {name} is empty", hint)
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in DTYPES:
        why = f"tensor {name} is of type {kind}, adapters add up in {', '.join(DTYPES)}"
        raise refuse(label, why, "Save the adapter again in one of these types, without quantization.")
    if not tensor.isfinite().all():
        raise refuse(label, f"tensor {name} has values that are not finite", "Use an earlier checkpoint of it.")


def _find_scale(config: Mapping[str, Any], module: str) -> float:
    """Return what the product of a module is multiplied with, as PEFT reckons it."""
    rank = _find_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _find_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha / math.sqrt(rank)) if config.get("use_rslora") else float(alpha / rank)


def _find_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _make_digest(folder: pathlib.Path, config: Mapping[str, Any]) -> str:
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    digest = hashlib.sha256(json.dumps([config.get(name) for name in names], sort_keys=True).encode())
    with open(folder / WEIGHTS, "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
