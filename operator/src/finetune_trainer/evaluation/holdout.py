"""Held-out loss of a model: nats per answer token on rows it never saw, and the entropy that a model must beat.

The unigram entropy is that of the answer tokens' own distribution: what a model that knew only how often each token
occurs would pay. A tuned model below it has learned more than word frequencies.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from finetune_trainer.training.collate import Collator
from finetune_trainer.training.tokens import IGNORED, TokenizedRows, TokenRow

BATCH_TOKENS = 8192
"""Tokens of a batch, padding included."""


def measure_entropy(rows: TokenizedRows) -> float:
    """Return the unigram entropy of the answers, in nats per token."""
    counts = collections.Counter(label for row in rows.rows for label in row.labels if label != IGNORED)
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())


def score_holdout(model: Any, rows: TokenizedRows, pad_token_id: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the model's loss per answer token and its perplexity, and the standard error of the loss."""
    import torch

    collate = Collator(pad_token_id, packed=False)
    paid: list[tuple[float, int]] = []
    with torch.inference_mode():
        for batch in batch_rows(rows.rows):
            inputs = {name: tensor.to(model.device) for name, tensor in collate(batch).items()}
            labels = inputs.pop("labels")[:, 1:]
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
            )
            sums = losses.view(labels.shape).double().sum(1).tolist()
            paid += zip(sums, (labels != IGNORED).sum(1).tolist(), strict=True)
    loss = sum(total for total, _ in paid) / sum(count for _, count in paid)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}, {"loss": estimate_error(paid, loss)}


def estimate_error(paid: Sequence[tuple[float, int]], loss: float) -> float:
    """Return the standard error of a ratio of sums over rows, which vary as wholes (Cochran 1977, 6.4)."""
    num_tokens = sum(count for _, count in paid)
    squares = sum((total - loss * count) ** 2 for total, count in paid)
    return math.sqrt(squares * len(paid) / max(len(paid) - 1, 1)) / num_tokens


def batch_rows(rows: Iterable[TokenRow], max_tokens: int = BATCH_TOKENS) -> Iterator[list[dict[str, Any]]]:
    """Yield rows of like length together, so that little is padding."""
    batch: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        longest = len(batch[0]["input_ids"]) if batch else 0
        if batch and longest * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append({"input_ids": row.input_ids, "labels": row.labels})
    if batch:
        yield batch
