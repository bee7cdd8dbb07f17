"""Log-likelihoods of many continuations at once, with every beginning that several of them share computed once.

The choices of a question share its text, and the questions of a few-shot task the examples before them. Sorted by their
tokens, such sequences stand next to each other and form a tree. A row holds a tree, token by token in the order of the
sort; a token sees its ancestors alone, and its position is its depth, so each sequence gets the scores it has alone.
Whether an architecture keeps to that is tried out on a small model of it (`is_exact`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from finetune_trainer.training import modeling, probe

BATCH_TOKENS = {"cpu": 1024}
"""Tokens of a batch by device, padding included: what fits a processor's caches."""
DEFAULT_BATCH_TOKENS = 8192
"""The same for any accelerator."""
ROW_TOKENS = 2048
"""Tokens that a row grows to by further sequences; with longer sequences to twice their length."""
TOLERANCE = 1e-4
"""Nats that a log-likelihood may differ by in fp32 from the one the sequence has alone."""

_LOGITS = 1024
"""Rows of logits that are turned to 32 bits at once."""
_WINDOWS = ("sliding_window", "attention_chunk_size")


@dataclasses.dataclass(frozen=True)
class Request:
    """A continuation to score behind a context, both at least one token long."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclasses.dataclass
class Row:
    """Sequences that form a tree: a place for each token, ancestors before descendants."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    ends: list[int] = dataclasses.field(default_factory=list)
    """By place: the place behind its last descendant."""
    scored: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    """By request: the places that predict its continuation."""
    path: list[int] = dataclasses.field(default_factory=list)
    """Places of the sequence added last."""

    def count_shared(self, tokens: Sequence[int]) -> int:
        """Return how many tokens at the beginning are those of the sequence added last."""
        both = zip(self.path, tokens, strict=False)
        return next(
            (depth for depth, (place, token) in enumerate(both) if self.tokens[place] != token),
            min(len(self.path), len(tokens)),
        )

    def add(self, index: int, tokens: Sequence[int], num_scored: int) -> None:
        """Add a request's sequence; its last `num_scored` places predict the continuation."""
        shared = self.count_shared(tokens)
        self.close(shared)
        for depth in range(shared, len(tokens)):
            self.path.append(len(self.tokens))
            self.tokens.append(tokens[depth])
            self.positions.append(depth)
            self.ends.append(0)
        self.scored[index] = self.path[len(tokens) - num_scored :]

    def close(self, depth: int = 0) -> None:
        """End the branch that the sequence added last makes from this depth on."""
        for place in self.path[depth:]:
            self.ends[place] = len(self.tokens)
        del self.path[depth:]


def build_rows(requests: Sequence[Request], max_length: int, row_tokens: int = ROW_TOKENS) -> list[Row]:
    """Return the trees of the requests; a context too long is cut from the left, as lm-eval does."""
    sequences = [([*one.context, *one.continuation])[-(max_length + 1) :][:-1] for one in requests]
    rows: list[Row] = []
    for index in sorted(range(len(requests)), key=sequences.__getitem__):
        tokens = sequences[index]
        if rows:
            shared = rows[-1].count_shared(tokens)
            # A row with little in common costs attention and saves nothing.
            fits = len(rows[-1].tokens) + len(tokens) - shared <= max(row_tokens, 2 * len(tokens))
            if not fits or 2 * shared < len(tokens):
                rows[-1].close()
                rows.append(Row())
        else:
            rows.append(Row())
        rows[-1].add(index, tokens, len(requests[index].continuation))
    if rows:
        rows[-1].close()
    return rows


def score(
    model: Any, requests: Sequence[Request], max_length: int, advance: Callable[[int], None] = lambda _: None
) -> list[tuple[float, bool]]:
    """Return the log-likelihood of each continuation, and whether it is what the model itself would write."""
    import torch

    results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    rows = sorted(build_rows(requests, max_length), key=lambda row: -len(row.tokens))
    with torch.inference_mode(), _attending_in_blocks(model):
        for batch in _list_batches(rows, BATCH_TOKENS.get(model.device.type, DEFAULT_BATCH_TOKENS)):
            for index, result in _score_batch(model, batch, requests):
                results[index] = result
            advance(sum(len(row.scored) for row in batch))
    return results


def _list_batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[Sequence[Row]]:
    first = 0
    while first < len(rows):
        size = max(1, batch_tokens // len(rows[first].tokens))
        yield rows[first : first + size]
        first += size


def _score_batch(
    model: Any, rows: Sequence[Row], requests: Sequence[Request]
) -> Iterator[tuple[int, tuple[float, bool]]]:
    import torch

    width, device = len(rows[0].tokens), model.device
    places = [
        number * width + place for number, row in enumerate(rows) for scored in row.scored.values() for place in scored
    ]
    indexes = [index for row in rows for index in row.scored]
    wanted = torch.tensor([token for index in indexes for token in requests[index].continuation], device=device)
    with _only(model, torch.tensor(places, device=device)):
        logits = model(**_collate(rows, width, model), use_cache=False).logits[0]
    losses, hits = [], []
    for part, tokens in zip(logits.split(_LOGITS), wanted.split(_LOGITS), strict=True):
        odds = part.float()
        found = odds.gather(1, tokens[:, None])[:, 0]
        losses.append(odds.logsumexp(-1) - found)
        hit = found == odds.amax(-1)
        # Several tokens may be the likeliest; then one is written, and few rows are left to ask which.
        hit[hit.clone()] = odds[hit].argmax(-1) == tokens[hit]
        hits.append(hit)
    lengths = [len(requests[index].continuation) for index in indexes]
    # Summed on the host: a sum's order on an accelerator is not fixed.
    by_request = zip(torch.cat(losses).double().cpu().split(lengths), torch.cat(hits).cpu().split(lengths), strict=True)
    for index, (paid, hit) in zip(indexes, by_request, strict=True):
        yield index, (-float(paid.sum()), bool(hit.all()))


def _collate(rows: Sequence[Row], width: int, model: Any) -> dict[str, Any]:
    """Return tokens, depths and who sees whom of rows filled up on the right; a place that fills up sees itself."""
    import torch

    device = model.device

    def fill(values: Sequence[int], row: Row) -> list[int]:
        return [*values, *([0] * (width - len(row.tokens)))]

    ends = [[*row.ends, *range(len(row.tokens) + 1, width + 1)] for row in rows]
    place = torch.arange(width, device=device)
    ancestors = place[:, None] < torch.tensor(ends, device=device)[:, None, :]
    hidden = ~(ancestors & (place <= place[:, None]))[:, None]
    # As numbers that are added: true and false would be turned into these in every layer.
    mask = torch.zeros(hidden.shape, dtype=model.dtype, device=device).masked_fill_(
        hidden, torch.finfo(model.dtype).min
    )
    return {
        "input_ids": torch.tensor([fill(row.tokens, row) for row in rows], device=device),
        "position_ids": torch.tensor([fill(row.positions, row) for row in rows], device=device),
        "attention_mask": mask,
    }


@contextlib.contextmanager
def _only(model: Any, places: Any) -> Iterator[None]:
    """Let the model make logits (1, places, vocabulary) of these places of the flattened batch, and of no other."""
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, given: (given[0].flatten(0, 1)[places][None],)
    )
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _attending_in_blocks(model: Any) -> Iterator[None]:
    from finetune_trainer.training.attention import IN_BLOCKS, register

    register()
    model.set_attn_implementation(IN_BLOCKS)
    try:
        yield
    finally:
        model.set_attn_implementation(modeling.choose_attention(model.config))


def fits_windows(model: Any, max_length: int) -> bool:
    """Return whether a token sees all before it in sequences up to `max_length`: the mask of a row hides windows."""
    text = model.config.get_text_config()
    windows = [getattr(text, name, None) for name in _WINDOWS]
    return all(not window or window >= max_length for window in windows)


def is_exact(model: Any) -> bool:
    """Try a small random model of the same class out: do sequences in a tree have the scores they have alone?"""
    import torch

    attention = modeling.choose_attention(model.config)
    if attention != "sdpa" or "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    with torch.random.fork_rng(devices=[]):
        try:
            small = probe.build_small(type(model), model.config, attention)
            requests = _draw_requests()
            together = score(small, requests, 64)
            with torch.inference_mode():
                alone = [_score_alone(small, one) for one in requests]
        except Exception:
            # Whatever the architecture's code does not take: it is scored without sharing.
            return False
    return max(abs(shared[0] - single) for shared, single in zip(together, alone, strict=True)) < TOLERANCE


def _draw_requests() -> list[Request]:
    draw = random.Random(3)

    def some(count: int) -> list[int]:
        return [draw.randrange(1, probe.VOCABULARY) for _ in range(count)]

    examples = some(9)
    questions = [[*examples, *some(count)] for count in (3, 5, 2)] + [some(4)]
    return [Request(question, some(count)) for question in questions for count in (1, 3, 2)]


def _score_alone(model: Any, request: Request) -> float:
    import torch

    tokens = torch.tensor([[*request.context, *request.continuation]])
    odds = model(input_ids=tokens[:, :-1], use_cache=False).logits[0].double().log_softmax(-1)
    start = len(request.context) - 1
    return float(sum(odds[start + place, token] for place, token in enumerate(request.continuation)))
