"""The settings of a run in the words of TRL and Transformers."""

from __future__ import annotations

import pathlib
from typing import Any

from finetune_contract.run_config import RunConfig, TrainingConfig
from finetune_trainer.training.deepspeed_config import build_deepspeed_config

NEVER = 1 << 40
"""More steps than any run has: periodic saves by step are off."""


def build_arguments(run: RunConfig, output: pathlib.Path, is_converted: bool = False) -> Any:
    """Return the `SFTConfig` of this run; checkpoints go below `output`, the one to load may be a converted one."""
    from trl import SFTConfig

    training, checkpoint = run.training, run.checkpoint
    save_steps = checkpoint.every_steps or NEVER
    is_ranked = checkpoint.keep_best > 0
    return SFTConfig(
        output_dir=str(output),
        per_device_train_batch_size=training.per_device_batch_size,
        per_device_eval_batch_size=training.per_device_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        warmup_steps=training.warmup_steps,
        optim="adamw_torch",
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        gradient_checkpointing=training.gradient_checkpointing,
        seed=training.seed,
        data_seed=training.seed,
        use_cpu=run.topology.gpus_per_node == 0,
        deepspeed=build_deepspeed_config(training, is_converted),
        # What a checkpoint is, and which stay, is decided by ours; the Trainer only writes the files.
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=None,
        eval_strategy="steps" if is_ranked else "no",
        eval_steps=save_steps if is_ranked else None,
        prediction_loss_only=True,
        logging_steps=training.logging_steps,
        logging_first_step=True,
        # A loss that is not a number ends the run with a reason instead of being averaged away.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=list(training.tracking) or "none",
        run_name=run.job.name or None,
        max_length=training.max_length,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=run.topology.gpus_per_node > 0,
        ddp_timeout=1800,
    )


def build_lora(training: TrainingConfig) -> Any | None:
    """Return the adapter's configuration, or None for a full fine-tune."""
    if training.method != "lora":
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=training.lora_rank,
        lora_alpha=training.lora_alpha,
        target_modules=list(training.lora_target_modules) or "all-linear",
    )


def torch_dtype(precision: str) -> str:
    """Return the torch name of a precision."""
    return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
