"""Watches forked ranks: forwards their output and SIGTERM, notes who ended when, and ends the rest after a failure.

Ranks that give no sign of life in time are asked for their stacks and ended, too.

One thread and one selector, because a process with threads cannot be forked again safely.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from finetune_contract.reports import ExitCode
from finetune_trainer.training.failures import LINE_CHARACTERS, NUM_TAIL_LINES

GRACE_SECONDS = 3.0
"""Time for the other ranks to note their own errors after one has failed."""

DRAIN_SECONDS = 2.0
"""Time to read what is left of the output after the last rank has ended."""


@dataclasses.dataclass
class Reaped:
    """One rank as seen from outside."""

    pid: int
    lines: collections.deque[str]
    exit_code: int = 0
    ended_at: float = 0.0
    was_killed_here: bool = False


LOOK_SECONDS = 1.0
"""How often signs of life and signals are looked at while nothing else happens."""

Due = Callable[[Iterable[int]], float]
"""Returns when the ranks with these numbers are hung unless they give a sign of life; infinity: not yet known."""


class Watch:
    """The ranks of one launch."""

    def __init__(self, due: Due | None = None, on_hang: Callable[[dict[int, int]], None] | None = None) -> None:
        """`on_hang` is given the processes of hung ranks, by rank, before they are ended; without `due` none hangs."""
        self.ranks: dict[int, Reaped] = {}
        self.is_stopping = False
        """Whether the pod has been asked to end."""
        self._due = due
        self._on_hang = on_hang
        self._selector = selectors.DefaultSelector()
        self._partial: dict[int, bytes] = {}
        self._num_running = 0
        self._kill_at = math.inf
        self._drained_at = math.inf
        self._previous: Any = None

    def add(self, rank: int, pid: int, reader: int) -> None:
        """Watch one forked rank; `reader` is the end of the pipe that carries its output."""
        self.ranks[rank] = Reaped(pid, collections.deque(maxlen=NUM_TAIL_LINES))
        self._partial[rank] = b""
        self._num_running += 1
        self._selector.register(reader, selectors.EVENT_READ, ("output", rank))
        self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ, ("end", rank))
        if self.is_stopping:
            os.kill(pid, signal.SIGTERM)

    def take_signals(self) -> None:
        """Forward SIGTERM to the ranks from here on."""
        self._previous = signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, number: int, _frame: Any) -> None:
        self.is_stopping = True
        self._send(signal.Signals(number))

    def run(self) -> None:
        """Return when every rank has ended and its output has been read."""
        try:
            while self._selector.get_map() and time.monotonic() < self._drained_at:
                for key, _ in self._selector.select(self._choose_timeout()):
                    kind, rank = key.data
                    if kind == "output":
                        self._read(key.fd, rank)
                    else:
                        self._reap(key.fd, rank)
                if time.monotonic() >= self._hung_at():
                    self._end_hang()
                if time.monotonic() >= self._kill_at:
                    self._kill_rest()
        finally:
            self.close()

    def _choose_timeout(self) -> float:
        deadline = min(self._drained_at, self._kill_at, self._hung_at())
        # Signs of life come without an event, and a signal that arrives just before the wait does not end it.
        return min(max(0.0, deadline - time.monotonic()), LOOK_SECONDS)

    def _hung_at(self) -> float:
        """Return when the ranks are hung; a failure that ends them anyway comes first."""
        if self._due is None or not math.isinf(self._kill_at):
            return math.inf
        return self._due(rank for rank, reaped in self.ranks.items() if not reaped.ended_at)

    def _end_hang(self) -> None:
        hung = {rank: reaped.pid for rank, reaped in self.ranks.items() if not reaped.ended_at}
        self._due = None
        if self._on_hang is not None:
            self._on_hang(hung)
        self._kill_rest()

    def _read(self, descriptor: int, rank: int) -> None:
        data = os.read(descriptor, 1 << 16)
        lines = (self._partial[rank] + data).split(b"\n")
        self._partial[rank] = lines.pop() if data else b""
        if not data:
            self._forget(descriptor)
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r")
            if not text.strip():
                continue
            self.ranks[rank].lines.append(text[:LINE_CHARACTERS])
            print(text if rank == 0 else f"[rank {rank}] {text}", file=sys.stderr)
        sys.stderr.flush()

    def _reap(self, descriptor: int, rank: int) -> None:
        self._forget(descriptor)
        reaped = self.ranks[rank]
        _, status = os.waitpid(reaped.pid, 0)
        reaped.ended_at = time.monotonic()
        reaped.exit_code = os.waitstatus_to_exitcode(status)
        if reaped.was_killed_here:
            # A rank ended by us is no cause: it counts as one that stopped.
            reaped.exit_code = ExitCode.SUSPENDED
        self._num_running -= 1
        failed = reaped.exit_code not in (ExitCode.OK, ExitCode.SUSPENDED)
        if failed and self._num_running:
            self._kill_at = min(self._kill_at, time.monotonic() + GRACE_SECONDS)
        if not self._num_running:
            # A process that a rank started and left behind may hold the pipe open for ever.
            self._drained_at = time.monotonic() + DRAIN_SECONDS

    def _kill_rest(self) -> None:
        self._kill_at = math.inf
        for reaped in self.ranks.values():
            if not reaped.ended_at:
                reaped.was_killed_here = True
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for reaped in self.ranks.values():
            if not reaped.ended_at:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(reaped.pid, number)

    def _forget(self, descriptor: int) -> None:
        self._selector.unregister(descriptor)
        os.close(descriptor)

    def close(self) -> None:
        """Leave no rank, descriptor or handler behind, whatever ended the watch."""
        self._kill_rest()
        for key in list(self._selector.get_map().values()):
            self._forget(key.fd)
        for reaped in self.ranks.values():
            if not reaped.ended_at:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(reaped.pid, 0)
        self._selector.close()
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
