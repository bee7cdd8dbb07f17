"""Trying again what may pass, for a bounded time."""

from __future__ import annotations

import dataclasses
import random
import time
from typing import TYPE_CHECKING, TypeVar

from finetune_trainer.reporting import emit_warning
from finetune_trainer.storage.access import Access, TemporaryError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


@dataclasses.dataclass
class RetryPolicy:
    """How long a place may fail to answer before it counts as unavailable."""

    patience_seconds: float = 60.0
    """Time without any progress."""
    first_wait_seconds: float = 0.5
    longest_wait_seconds: float = 8.0


DEFAULT = RetryPolicy()


class Attempts:
    """Counts down one operation's patience; progress gives it back."""

    def __init__(self, access: Access, what: str, policy: RetryPolicy) -> None:
        self._access = access
        self._what = what
        self._policy = policy
        self.note_progress()

    def note_progress(self) -> None:
        """Start the countdown anew: the place answers."""
        self._deadline = time.monotonic() + self._policy.patience_seconds
        self._wait = self._policy.first_wait_seconds

    def wait_after(self, error: TemporaryError) -> None:
        """Sleep before the next try. Raises TrainerError when there is no patience left."""
        pause = self._wait * (0.5 + random.random() / 2)
        if time.monotonic() + pause > self._deadline:
            raise self._access.unavailable(self._what, str(error)) from error
        emit_warning("trying again", what=self._what, seconds=round(pause, 1), why=str(error))
        time.sleep(pause)
        self._wait = min(self._wait * 2, self._policy.longest_wait_seconds)


def call_with_retries(operation: Callable[[], T], access: Access, what: str, policy: RetryPolicy | None = None) -> T:
    """Call `operation` until it does not raise TemporaryError, or patience runs out."""
    attempts = Attempts(access, what, policy or DEFAULT)
    while True:
        try:
            return operation()
        except TemporaryError as error:
            attempts.wait_after(error)
