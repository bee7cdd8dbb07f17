"""A batch as tensors: padded rows, or packed rows whose examples do not see each other.

Packed rows carry position ids that start again at every example, the examples' lengths, and no attention mask: from
these, attention is computed within each example, by `attention.py` or by the model's own code with a block-diagonal
mask. Only for architectures that pass the probe (`probe.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from finetune_trainer.training.tokens import IGNORED


@dataclasses.dataclass(frozen=True)
class Collator:
    """Called by the data loader with rows of `input_ids`, `labels` and `seq_lengths`."""

    pad_token_id: int
    packed: bool
    multiple_of: int = 8
    """Row lengths are rounded up to this: tensor cores like it, and fewer shapes occur."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.multiple_of) * self.multiple_of
        batch: dict[str, Any] = {
            "input_ids": torch.full((len(rows), width), self.pad_token_id, dtype=torch.long),
            "labels": torch.full((len(rows), width), IGNORED, dtype=torch.long),
        }
        extra = "position_ids" if self.packed else "attention_mask"
        batch[extra] = torch.zeros((len(rows), width), dtype=torch.long)
        lengths: list[int] = []
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][index, :length] = torch.tensor(row["input_ids"])
            batch["labels"][index, :length] = torch.tensor(row["labels"])
            if self.packed:
                # The padding is an example of its own, without loss.
                cuts = [*row["seq_lengths"], *([width - length] if width > length else [])]
                batch[extra][index] = _positions(cuts)
                lengths += cuts
            else:
                batch[extra][index, :length] = 1
        return {**batch, "seq_lengths": tuple(lengths)} if self.packed else batch


def _positions(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])
