"""Signs of life of the ranks of a pod, in memory that they share with their supervisor.

A rank gives a sign at every part of a step: each micro-batch, the update, each batch of an evaluation. The clock of
`spec.failurePolicy.progressDeadlineSeconds` starts when the first step has ended, so that neither a long start nor a
first compilation is taken for a hang. While a checkpoint is written, and after the last step, a rank may stand still
for as long as it may wait in a collective. Needs no torch.
"""

from __future__ import annotations

import enum
import math
import mmap
import time
from collections.abc import Iterable

from finetune_contract.run_config import LONGEST_PAUSE_SECONDS


class Doing(enum.IntEnum):
    """What a rank is busy with."""

    STARTING = 0
    """Nothing is expected of it."""
    STEPPING = 1
    PAUSING = 2
    """It writes a checkpoint, or closes down."""


_CELLS = 2
"""Numbers per rank: the time of its last sign (monotonic clock, which all processes of a machine share), its Doing."""


class Heartbeats:
    """The signs of life of one launch. Made by the supervisor before it forks the ranks."""

    def __init__(self, num_ranks: int) -> None:
        self._cells = memoryview(mmap.mmap(-1, _CELLS * 8 * num_ranks)).cast("d")

    def beat(self, local: int, doing: Doing) -> None:
        """Give a sign of life; called in the rank with this local number."""
        self._cells[_CELLS * local + 1] = doing
        self._cells[_CELLS * local] = time.monotonic()

    def due(self, deadline_seconds: float, running: Iterable[int]) -> float:
        """Return the time at which the running ranks are hung unless another sign comes; infinity: none is due."""
        cells = [(self._cells[_CELLS * local], Doing(int(self._cells[_CELLS * local + 1]))) for local in running]
        limit = deadline_seconds
        if any(doing is Doing.PAUSING for _, doing in cells):
            limit = max(limit, LONGEST_PAUSE_SECONDS)
        return min((last + limit for last, doing in cells if doing is not Doing.STARTING), default=math.inf)


class Pulse:
    """One rank's own end of the heartbeats."""

    def __init__(self, heartbeats: Heartbeats | None = None, local: int = 0) -> None:
        self._heartbeats = heartbeats
        self._local = local

    def beat(self, doing: Doing) -> None:
        """Give a sign of life; nothing outside a launch."""
        if self._heartbeats is not None:
            self._heartbeats.beat(self._local, doing)


_own = Pulse()


def set_pulse(pulse: Pulse) -> None:
    """Make this process a rank that is watched; called in the fork."""
    global _own
    _own = pulse


def read_pulse() -> Pulse:
    """Return this rank's pulse."""
    return _own
