"""Two models under one harness: which differences are larger than what chance makes. Pure."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Scores = Mapping[str, Mapping[str, float]]

_QUANTILE = 1.96
"""Standard errors that a difference without cause stays within 95 times in 100 (normal distribution)."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """One score of two models."""

    task: str
    metric: str
    tuned: float
    base: float
    error: float | None
    """Standard error of the difference, both sides taken as independent; None where the metric has none."""

    @property
    def delta(self) -> float:
        """Tuned minus base."""
        return self.tuned - self.base

    @property
    def is_larger_than_error(self) -> bool | None:
        """Whether the difference is beyond what chance makes; None where nobody knows."""
        return None if self.error is None else abs(self.delta) > _QUANTILE * self.error


def compare(tuned: Scores, base: Scores, tuned_errors: Scores, base_errors: Scores) -> list[Difference]:
    """Return the difference of every score that both sides have."""
    differences = []
    for task, metrics in tuned.items():
        for metric, value in metrics.items():
            other = base.get(task, {}).get(metric)
            if other is not None:
                errors = [side.get(task, {}).get(metric) for side in (tuned_errors, base_errors)]
                known = [error for error in errors if error is not None and math.isfinite(error)]
                error = math.hypot(*known) if len(known) == len(errors) else None
                differences.append(Difference(task, metric, value, other, error))
    return differences


def format_table(differences: Sequence[Difference], other: str = "base") -> str:
    """Return the differences as a Markdown table; `other` is what the tuned model is compared with."""
    head = f"| task | metric | tuned | {other} | difference | larger than its error |"
    lines = [head, "|---|---|---:|---:|---:|---|"]
    words = {None: "no error known", True: "yes", False: "no"}
    for one in differences:
        spread = "" if one.error is None else f" ± {one.error:.2g}"
        numbers = f"{one.tuned:.4g} | {one.base:.4g} | {one.delta:+.4g}{spread}"
        lines.append(f"| {one.task} | {one.metric} | {numbers} | {words[one.is_larger_than_error]} |")
    return "\n".join(lines)
