"""Attention that leaves out what a row's mask would hide.

For packed rows: each example attends to itself alone, and nothing is computed between examples. The model's own way
would be a mask of width x width for every row: it costs memory, and the kernels for it compute what it then hides. Here
the examples of a batch are cut out and given to PyTorch's causal attention one by one: no mask, and work that grows
with the examples' lengths. Transformers hands `seq_lengths` of the batch on to this function wherever the model's code
passes keyword arguments through; `probe.py` finds out whether it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

BY_EXAMPLE = "by_example"
"""The name under which Transformers knows it."""
IN_BLOCKS = "in_blocks"
"""The same of attention with a mask."""
_BLOCK = 256
"""Queries that are answered together."""


def attend_by_example(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    *,
    seq_lengths: Sequence[int],
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention of (batch, heads, width, size) tensors as (batch, width, heads, size).

    `seq_lengths` are those of all examples in the batch, row after row, with the padding of each row as one more; they
    add up to batch x width.
    """
    batch, _, width, _ = query.shape
    options.pop("is_causal", None)
    # One long row, cut by `split`: its backward pass joins the gradients once, where slices would add up whole tensors.
    rows = (tensor.transpose(0, 1).flatten(1, 2).split(list(seq_lengths), dim=1) for tensor in (query, key, value))
    attended = [
        sdpa_attention_forward(module, *(part[None] for part in example), None, is_causal=True, **options)[0]
        for example in zip(*rows, strict=True)
    ]
    return torch.cat(attended, dim=1).view(batch, width, query.shape[1], -1), None


def attend_in_blocks(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention of (batch, heads, width, size) tensors as (batch, width, heads, size).

    `mask` (batch, 1, width, width) is added to the scores and lets no query see a key behind it: a block of queries is
    given the keys up to its end, which is half the work.
    """
    options.pop("is_causal", None)
    blocks = []
    for start in range(0, query.shape[2], _BLOCK):
        end = min(start + _BLOCK, query.shape[2])
        given = (query[:, :, start:end], key[:, :, :end], value[:, :, :end], mask[:, :, start:end, :end])
        blocks.append(sdpa_attention_forward(module, *given, is_causal=False, **options)[0])
    return torch.cat(blocks, dim=1), None


def register() -> None:
    """Make both known to Transformers; again does nothing."""
    AttentionInterface.register(BY_EXAMPLE, attend_by_example)
    AttentionInterface.register(IN_BLOCKS, attend_in_blocks)
