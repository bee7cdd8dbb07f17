"""Step arithmetic, the same as the Trainer's; pure. A resuming process knows from it whether anything is left to do."""

from __future__ import annotations

import math

from finetune_contract.run_config import TrainingConfig


def count_steps(num_rows: int, world_size: int, training: TrainingConfig) -> int:
    """Return the optimizer steps of the whole run."""
    if training.max_steps > 0:
        return training.max_steps
    batches = math.ceil(num_rows / training.per_device_batch_size)
    batches_per_rank = math.ceil(batches / world_size)
    steps_per_epoch = max(1, math.ceil(batches_per_rank / training.gradient_accumulation_steps))
    return math.ceil(training.epochs * steps_per_epoch)
