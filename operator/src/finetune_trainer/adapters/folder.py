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
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage.publish import PROVENANCE

if TYPE_CHECKING:
    from collections.abc import Mapping

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
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
    base: str
    """Digest of the base model where the adapter's provenance knows it, otherwise the name in its configuration."""

    @property
    def rank(self) -> int:
        """Largest rank of any module."""
        return max(module.rank for module in self.modules.values())


def read_adapter(folder: pathlib.Path) -> Adapter:
    """Read an adapter; also that in the folder of a promoted model. Raises TrainerError naming the folder."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / CONFIG).is_file() and (folder / "adapter" / CONFIG).is_file():
        folder /= "adapter"
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        name = pathlib.Path(error.filename or WEIGHTS).name
        raise refuse(folder, f"{name} is missing", "Name the folder of a LoRA adapter that PEFT wrote.") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise refuse(folder, f"cannot be read: {error}", "Copy the adapter again.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise refuse(folder, f"{CONFIG} is not that of a LoRA adapter", "Other kinds of adapters do not add up.")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise refuse(folder, f"it uses {name}, which does not add up", "Merge it into its base model instead.")
    if config.get("bias", "none") != "none":
        raise refuse(folder, "it trains biases, which do not add up", "Merge it into its base model instead.")
    return Adapter(
        folder, config, _pair(folder, config, tensors), _make_digest(folder, config), _find_base(folder, config)
    )


def refuse(folder: pathlib.Path, why: str, hint: str) -> TrainerError:
    """Return the error for an adapter that cannot be used."""
    return TrainerError(Reason.MODEL_INVALID, ExitCode.NO_INPUT, f"--adapter {folder}: {why}", hint)


def _pair(folder: pathlib.Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, LowRank]:
    halves: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise refuse(folder, f"tensor {name} is no part of a low-rank product", "Only lora_A and lora_B add up.")
        if not tensor.numel():
            hint = "It was saved from partitioned weights: save it again from the training's checkpoint."
            raise refuse(folder, f"tensor {name} is empty", hint)
        halves.setdefault(match["module"], {})[match["part"]] = tensor
    if not halves:
        raise refuse(folder, "it holds no tensors", "Save it again from the training's checkpoint.")
    modules = {}
    for module, parts in halves.items():
        if set(parts) != {"A", "B"} or parts["A"].shape[0] != parts["B"].shape[1]:
            raise refuse(folder, f"lora_A and lora_B of {module} do not fit together", "Copy the adapter again.")
        modules[module] = LowRank(parts["A"], parts["B"], _find_scale(config, module))
    return modules


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


def _find_base(folder: pathlib.Path, config: Mapping[str, Any]) -> str:
    try:
        provenance = json.loads((folder.parent / PROVENANCE).read_text(encoding="utf-8"))
        return str(provenance["base_model"]["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(config.get("base_model_name_or_path") or "")
