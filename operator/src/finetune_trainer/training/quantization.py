"""A base model held in 4 bits while an adapter on it is trained (QLoRA): how it is loaded, and what saves leave out.

Called in a rank by `rank` and `trainer`. Promotion never reads a quantized model: it merges into the base as it came.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import TrainingConfig
from finetune_trainer.checkpoints.disk import format_bytes
from finetune_trainer.distributed import read_rank
from finetune_trainer.errors import TrainerError
from finetune_trainer.reporting import emit
from finetune_trainer.training.arguments import torch_dtype
from finetune_trainer.training.stack import hide_modules


def build_quantization(training: TrainingConfig) -> Any | None:
    """Return how the base model is quantized as it is loaded, in the words of Transformers; None where it is not."""
    if not training.lora_quantization:
        return None
    _import_bitsandbytes()
    from transformers import BitsAndBytesConfig

    dtype = torch_dtype(training.precision)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=training.lora_quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # ZeRO-3 gathers tensors of one type: there the bits lie in what look like numbers of the model's. Elsewhere in
        # bytes, which a change of the model's type passes by.
        bnb_4bit_quant_storage=dtype if training.zero_stage == 3 else "uint8",
    )


def _import_bitsandbytes() -> None:
    """Import the library in a rank: it asks the accelerator for its kind, which no fork survives.

    It was hidden while the stack was imported, and others remember that they did not find it.
    """
    import torch
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available
    from transformers.utils import is_bitsandbytes_available

    # It advises to install kernels that would be fetched while training starts.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if sys.modules.get("bitsandbytes", sys) is None:
        del sys.modules["bitsandbytes"]
    for is_available in (is_bnb_4bit_available, is_bnb_available, is_bitsandbytes_available):
        is_available.cache_clear()
    # It would load a compiler for kernels of accelerators.
    with hide_modules([] if torch.cuda.is_available() else ["triton"]):
        import bitsandbytes  # noqa: F401


def prepare_quantized(model: Any, name: str) -> None:
    """Keep the bits of a model as they are until the end of training, and log what it takes.

    Raises TrainerError where the architecture has no layers that can be quantized.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Some CPUs have the bits in another order in evaluations: ZeRO-3 knows nothing of it, nor does a save.
            module.support_avx512bf16_for_cpu = False
    num_layers = len(_list_quantized(model))
    if not num_layers:
        raise TrainerError(
            Reason.INVALID_CONFIG,
            ExitCode.CONFIG,
            f"spec.training.lora.quantization: {model.config.model_type} has no linear layer to hold in {name}",
            "Remove spec.training.lora.quantization.",
        )
    if read_rank() == 0:
        emit("base model quantized", to=name, layers=num_layers, size=format_bytes(model.get_memory_footprint()))


def drop_quantized(states: Iterable[Any], model: Any) -> None:
    """Remove from model shards what belongs to quantized weights: their scales stand in a state beside frozen weights.

    DeepSpeed leaves out parameters that are not trained, and scales are none. They are made anew from the base.
    """
    prefixes = tuple(f"{name}." for name in _list_quantized(model))
    for state in states:
        if prefixes and "module" in state:
            module = state["module"]
            state["module"] = {name: module[name] for name in module if not name.startswith(prefixes)}


def _list_quantized(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if getattr(parameter, "quant_state", None) is not None]
