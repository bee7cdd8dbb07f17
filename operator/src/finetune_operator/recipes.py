"""Defaults of the recipes: what a training field is worth when the job does not write it.

Pure; used by `plan` only. A recipe never overrides a field that is written.
"""

from __future__ import annotations

import dataclasses

from finetune_contract.run_config import TrainingConfig

from .api.v1alpha1 import Training

SAVE_STEPS = 800
"""Steps between checkpoints where the job says nothing."""

_WIZARDLM = TrainingConfig(
    recipe="wizardlm-freeform",
    epochs=3.0,
    max_length=2048,
    per_device_batch_size=8,
    gradient_accumulation_steps=4,
    learning_rate=2e-5,
    warmup_steps=2,
    scheduler="cosine",
    precision="fp16",
    gradient_checkpointing=True,
    packing=False,
    logging_steps=2,
    zero_stage=3,
    offload="none",
)

RECIPES = {
    "wizardlm-freeform": _WIZARDLM,
    "efficient": dataclasses.replace(_WIZARDLM, recipe="efficient", precision="bf16", packing=True),
}
"""Every value that a recipe decides."""

PROMPTS = {"wizardlm-freeform": "wizardlm", "efficient": "alpaca"}
"""Prompt template of each recipe."""

_FIELDS = (
    "max_length",
    "per_device_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "warmup_steps",
    "scheduler",
    "precision",
    "gradient_checkpointing",
    "packing",
)


def resolve_training(training: Training) -> TrainingConfig:
    """Return the recipe's values with what the job writes over them. `zero_stage` 0 stands for `auto`."""
    written = {name: value for name in _FIELDS if (value := getattr(training, name)) is not None}
    if training.max_steps is not None:
        written |= {"max_steps": training.max_steps, "epochs": 0.0}
    elif training.epochs is not None:
        written["epochs"] = float(training.epochs)
    if training.method == "lora":
        lora = training.lora
        written["method"] = "lora"
        if lora is not None:
            written |= {
                "lora_rank": lora.rank,
                "lora_alpha": lora.alpha,
                "lora_target_modules": tuple(lora.target_modules),
                "lora_quantization": lora.quantization or "",
            }
    written |= {
        "seed": training.seed,
        "offload": training.deepspeed.offload,
        "deepspeed_config": dict(training.deepspeed.config or {}),
        "zero_stage": _zero_stage(training),
        "tracking": _trackers(training),
    }
    return dataclasses.replace(RECIPES[training.recipe], **written)


def _zero_stage(training: Training) -> int:
    stage = training.deepspeed.zero_stage
    if stage is None:
        return 3 if training.recipe == "wizardlm-freeform" else 0
    return 0 if stage == "auto" else int(stage)


def _trackers(training: Training) -> tuple[str, ...]:
    tracking = training.tracking
    if tracking is None:
        return ()
    return tuple(name for name in ("wandb", "mlflow") if getattr(tracking, name) is not None)
