"""What the training of one pod has done so far, in memory that outlives its ranks.

Made by the supervisor before it forks; rank 0 writes it at each step, for almost nothing. So a rank that is killed
between two posts still leaves behind how far it was, and a restart inside the pod tells what it cost.
"""

from __future__ import annotations

import mmap
import struct
from typing import Any

_FIELDS = struct.Struct("=qqd")
"""Last step done plus 1 (0: training has not begun), steps lost in this pod, productive seconds."""


class WorkLedger:
    """Steps done, steps lost and productive seconds, shared by the supervisor and rank 0."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _FIELDS.size)

    def begin(self, step: int, productive_seconds: float) -> None:
        """Note where training starts; what an earlier life of the ranks did beyond that step is lost."""
        reached, lost, _ = self._read()
        self._write(step, lost + max(0, reached - step), productive_seconds)

    def note(self, step: int, productive_seconds: float) -> None:
        """Note that a step is done."""
        self._write(step, self.steps_lost, productive_seconds)

    @property
    def steps_lost(self) -> int:
        """Steps that restarts inside this pod threw away."""
        return self._read()[1]

    def to_details(self) -> dict[str, Any]:
        """Return the entries of the exit report; empty when training has not begun in this pod."""
        step, lost, seconds = self._read()
        return {} if step < 0 else {"step": step, "steps_lost": lost, "productive_seconds": round(seconds, 3)}

    def _read(self) -> tuple[int, int, float]:
        reached, lost, seconds = _FIELDS.unpack(self._memory[:])
        return reached - 1, lost, seconds

    def _write(self, step: int, lost: int, seconds: float) -> None:
        self._memory[:] = _FIELDS.pack(step + 1, lost, seconds)
