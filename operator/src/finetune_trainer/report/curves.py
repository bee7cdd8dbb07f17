"""The curves of a training, short enough to be drawn: a long run is averaged over stretches of steps. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune_trainer.report.history import History

MAX_POINTS = 500
"""Of one curve."""
_NAMES = {
    "loss": "loss",
    "evalLoss": "eval_loss",
    "learningRate": "learning_rate",
    "tokensPerSecond": "tokens_per_second",
}


def build_curves(history: History) -> dict[str, Any]:
    """Return by name `kept`, pairs of step and value, and `lost`, such a list for each stretch that was lost."""
    curves = {}
    for ours, theirs in _NAMES.items():
        kept = history.list_values(theirs)
        size = -(-len(kept) // MAX_POINTS)
        if kept:
            lost = [thin(stretch, size) for stretch in history.list_lost(theirs)]
            curves[ours] = {"kept": thin(kept, size), "lost": lost}
    return curves


def thin(points: Sequence[tuple[int, float]], size: int) -> list[tuple[float, float]]:
    """Return the means of every `size` points."""
    batches = (points[start : start + size] for start in range(0, len(points), size))
    return [(_mean([step for step, _ in batch]), _mean([value for _, value in batch])) for batch in batches]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if len(values) > 1 else values[0]
