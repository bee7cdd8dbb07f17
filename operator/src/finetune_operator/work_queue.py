"""Which job is looked at when: one pass per job at a time, many requests for one make one pass, errors wait longer.

Fed by `handlers`, which also gives it the pass to run. Knows neither Kubernetes nor the domain.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable

from .errors import ClusterUnavailableError, ConflictError
from .metrics import QUEUE_LENGTH, RECONCILE_ERRORS

Key = tuple[str, str]
Pass = Callable[[Key], Awaitable[float | None]]
"""Looks at one job and returns the seconds until it must be looked at again; None: when something happens."""

CONFLICT_SECONDS = 0.2
LONGEST_DELAY_SECONDS = 60.0
logger = logging.getLogger(__name__)


@dataclasses.dataclass
class _Entry:
    """One job: whether it is wanted, when it was looked at, and the timer that wants it again."""

    is_wanted: bool = False
    is_running: bool = False
    last_start: float = float("-inf")
    failures: int = 0
    timer: asyncio.TimerHandle | None = None


class WorkQueue:
    """Runs passes in the loop that it was made in."""

    def __init__(self, run: Pass, *, min_interval: float = 0.5, concurrency: int = 8) -> None:
        self._run = run
        self._min_interval = min_interval
        self._slots = asyncio.Semaphore(concurrency)
        self._entries: dict[Key, _Entry] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._is_closed = False

    def request(self, key: Key) -> None:
        """Ask for a pass over a job, soon. Must be called in the queue's loop."""
        if self._is_closed:
            return
        entry = self._entries.setdefault(key, _Entry())
        entry.is_wanted = True
        if not entry.is_running:
            self._start(key, entry)

    def request_threadsafe(self, key: Key) -> None:
        """Ask for a pass from another thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.request, key)

    def request_in(self, key: Key, seconds: float) -> None:
        """Ask for a pass after a while; replaces what was asked for before."""
        if self._is_closed:
            return
        entry = self._entries.setdefault(key, _Entry())
        if entry.timer is not None:
            entry.timer.cancel()
        entry.timer = self._loop.call_later(seconds, self.request, key)

    def forget(self, key: Key) -> None:
        """Drop a job that is gone."""
        entry = self._entries.pop(key, None)
        if entry is not None and entry.timer is not None:
            entry.timer.cancel()

    async def close(self) -> None:
        """Stop: no new passes, and those under way are cancelled."""
        self._is_closed = True
        for entry in self._entries.values():
            if entry.timer is not None:
                entry.timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, key: Key, entry: _Entry) -> None:
        entry.is_running = True
        task = self._loop.create_task(self._work(key, entry))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self, key: Key, entry: _Entry) -> None:
        try:
            while entry.is_wanted:
                await asyncio.sleep(max(0.0, entry.last_start + self._min_interval - self._loop.time()))
                QUEUE_LENGTH.inc()
                try:
                    await self._slots.acquire()
                finally:
                    QUEUE_LENGTH.dec()
                try:
                    entry.is_wanted = False
                    entry.last_start = self._loop.time()
                    await self._pass_once(key, entry)
                finally:
                    self._slots.release()
        finally:
            entry.is_running = False

    async def _pass_once(self, key: Key, entry: _Entry) -> None:
        try:
            delay = await self._run(key)
            entry.failures = 0
        except ConflictError:
            delay = CONFLICT_SECONDS
        except ClusterUnavailableError as error:
            delay = self._backoff(entry, "unavailable")
            logger.warning("%s/%s: %s; trying again in %.0f s", *key, error, delay)
        except Exception:
            # One job's trouble must not end the queue of all others.
            delay = self._backoff(entry, "bug")
            logger.exception("%s/%s: unexpected error; trying again in %.0f s", *key, delay)
        if delay is not None and self._entries.get(key) is entry:
            self.request_in(key, delay)

    def _backoff(self, entry: _Entry, kind: str) -> float:
        entry.failures += 1
        RECONCILE_ERRORS.labels(kind).inc()
        return min(LONGEST_DELAY_SECONDS, 2.0 ** min(entry.failures - 1, 10))
