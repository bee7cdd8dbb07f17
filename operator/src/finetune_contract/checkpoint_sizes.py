"""How large a checkpoint is, from the number of parameters: the one formula of operator, trainer and doctor.

Bytes per parameter of Trainer and DeepSpeed with a 16-bit model, measured over all ranks:

    part of a checkpoint                              ZeRO-3    ZeRO-1, ZeRO-2
    optimizer shards: fp32 copy and two moments         12            12
    model shards: 16-bit weights                         0             2
    `model.safetensors`: 16-bit weights, gathered        2             2

Under ZeRO-3 the 16-bit weights are a copy of what the optimizer shards hold, and the model shards are placeholders. The
stock Trainer gathers the weights at each save (14 and 16); our trainer gathers them at promotion only (12 and 14). The
storage preflight reckons with 14 and 16 all the same: its margin then covers what a volume's file system takes.
"""

from __future__ import annotations

OPTIMIZER_BYTES = 12
"""Per trained parameter: the fp32 copy, the first and the second moment of Adam."""
WEIGHT_BYTES = 2
"""Per saved parameter and copy of the weights: bf16 or fp16."""


def estimate_checkpoint_bytes(
    num_trained: int, num_saved: int, zero_stage: int, *, has_gathered_weights: bool = True
) -> int:
    """Return the size of one checkpoint.

    `num_saved` counts the parameters whose 16-bit weights are saved: all of them in a full fine-tune, those of the
    adapter in LoRA.
    """
    copies = (0 if zero_stage == 3 else 1) + (1 if has_gathered_weights else 0)
    return OPTIMIZER_BYTES * num_trained + WEIGHT_BYTES * copies * num_saved


def estimate_share_bytes(num_trained: int, num_saved: int, zero_stage: int, num_shares: int, is_first: bool) -> int:
    """Return what one of `num_shares` ranks, or pods, writes of a checkpoint; without ZeRO-3 the first has the weights.

    A save is first copied into a buffer of that size, so it is also the host memory that saves take.
    """
    weights = 0 if zero_stage == 3 or not is_first else WEIGHT_BYTES * num_saved
    return -(-OPTIMIZER_BYTES * num_trained // num_shares) + weights


def peak_bytes(checkpoint_bytes: int, num_kept: int) -> int:
    """Return what a folder holds at its fullest: one checkpoint more than is kept exists while one is made."""
    return (num_kept + 1) * checkpoint_bytes
