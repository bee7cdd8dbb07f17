"""The DeepSpeed configuration of a run, from its settings; pure. What a user writes under `deepspeed.config` wins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_contract.run_config import TrainingConfig


def build_deepspeed_config(training: TrainingConfig, is_converted: bool = False) -> dict[str, Any]:
    """Return the configuration; values that the Trainer also knows are `auto`, so that the two cannot disagree.

    `is_converted`: the checkpoint to load is in universal form.
    """
    stage = training.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if training.offload in ("optimizer", "all"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if training.offload == "all" and stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    generated: dict[str, Any] = {
        "zero_optimization": zero,
        "bf16": {"enabled": training.precision == "bf16"},
        "fp16": {"enabled": training.precision == "fp16"},
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "steps_per_print": 2**31,
        # The optimizer is PyTorch's AdamW: DeepSpeed's own ones compile with nvcc or g++ when they are first used.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    if is_converted:
        generated["checkpoint"] = {"load_universal": True}
    return merge(generated, training.deepspeed_config)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` merged into it, objects key by key."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged
