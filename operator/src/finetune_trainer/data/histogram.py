"""Histograms of lengths in fixed bins, four to a doubling: two of them add up whatever rows they were filled from.

Pure, and of constant size: the bins reach beyond any length that fits in memory.
"""

from __future__ import annotations

import bisect
import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_NUM_DOUBLINGS = 40
EDGES = tuple(sorted({0} | {round(2 ** (step / 4)) for step in range(4 * _NUM_DOUBLINGS + 1)}))
"""First length of each bin; whole numbers, so that every machine puts a length into the same bin."""

_PERCENTILES = (50, 95, 99)


class Histogram:
    """How many rows have which length."""

    def __init__(self) -> None:
        self.counts = [0] * len(EDGES)
        """Rows per bin of EDGES."""
        self.total = 0
        """Sum of the lengths."""

    def add(self, length: int) -> None:
        """Count a row of this length."""
        self.counts[bisect.bisect_right(EDGES, length) - 1] += 1
        self.total += length

    def merge(self, other: Histogram) -> None:
        """Add another histogram's rows to this one's."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def to_state(self) -> dict[str, Any]:
        """Return what `from_state` needs: the bins with rows in them, by number."""
        filled = [[index, rows] for index, rows in enumerate(self.counts) if rows]
        return {"bins": filled, "total": self.total}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Histogram:
        """Return the histogram that `to_state` described."""
        histogram = cls()
        for index, rows in state["bins"]:
            histogram.counts[index] = rows
        histogram.total = state["total"]
        return histogram

    def to_report(self) -> dict[str, Any]:
        """Return the bins with rows in them, the mean, and lengths that 50, 95 and 99 % of the rows do not exceed."""
        num_rows = sum(self.counts)
        last = len(EDGES) - 1
        bins = [
            {"from": EDGES[index], "to": EDGES[min(index + 1, last)] - 1, "rows": rows}
            for index, rows in enumerate(self.counts)
            if rows
        ]
        limits = {f"p{percent}": _find_limit(self.counts, num_rows * percent / 100) for percent in _PERCENTILES}
        mean = round(self.total / num_rows, 1) if num_rows else 0.0
        return {"rows": num_rows, "total": self.total, "mean": mean, **limits, "bins": bins}


def _find_limit(counts: Sequence[int], rows: float) -> int:
    """Return the longest length of the first bin up to which there are that many rows."""
    for index, so_far in enumerate(itertools.accumulate(counts)):
        if so_far and so_far >= rows:
            return EDGES[min(index + 1, len(EDGES) - 1)] - 1
    return 0
