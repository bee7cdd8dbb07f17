"""Step arithmetic, the same as the Trainer's; pure. A resuming process knows from it whether anything is left to do."""

from __future__ import annotations

import dataclasses
import math

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import TrainingConfig
from finetune_trainer.errors import TrainerError


def count_steps(num_rows: int, world_size: int, training: TrainingConfig) -> int:
    """Return the optimizer steps of the whole run."""
    if training.max_steps > 0:
        return training.max_steps
    batches = math.ceil(num_rows / training.per_device_batch_size)
    batches_per_rank = math.ceil(batches / world_size)
    steps_per_epoch = max(1, math.ceil(batches_per_rank / training.gradient_accumulation_steps))
    return math.ceil(training.epochs * steps_per_epoch)


def count_rows_per_step(world_size: int, training: TrainingConfig) -> int:
    """Return the rows of one optimizer step over all ranks: the global batch."""
    return training.per_device_batch_size * training.gradient_accumulation_steps * world_size


def keep_rows_per_step(training: TrainingConfig, rows_per_step: int, world_size: int) -> TrainingConfig:
    """Return the settings with the accumulation that keeps the rows per step on so many ranks.

    Raises TrainerError with the batch sizes and numbers of ranks that would work. The operator refuses the same before
    there are pods; this is for runs without one.
    """
    batch = training.per_device_batch_size
    if rows_per_step % (batch * world_size) == 0:
        return dataclasses.replace(training, gradient_accumulation_steps=rows_per_step // (batch * world_size))
    if rows_per_step % world_size == 0:
        hint = f"Set spec.training.perDeviceBatchSize to one of {_list_divisors(rows_per_step // world_size)}."
    else:
        hint = (
            "Set spec.resources so that nodes x processesPerNode is one of "
            f"{_list_divisors(rows_per_step)}, and spec.training.perDeviceBatchSize so that it divides the rest."
        )
    raise TrainerError(
        Reason.INVALID_CONFIG,
        ExitCode.CONFIG,
        f"the checkpoint was trained with {rows_per_step} rows per step, which {world_size} processes with "
        f"{batch} rows each cannot take",
        hint,
        {"rows_per_step": rows_per_step, "processes": world_size},
    )


def _list_divisors(number: int) -> str:
    return ", ".join(str(each) for each in range(1, number + 1) if number % each == 0)
