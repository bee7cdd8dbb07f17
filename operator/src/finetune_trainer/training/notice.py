"""The request to stop, and whether there is time to save before the pod is killed. Used by each rank; no torch.

A pod that is asked to stop has its grace period, or less where the cloud takes the node away: the operator says which.
"""

from __future__ import annotations

import math
import os
import signal
import time
import types

from finetune_contract import environment
from finetune_trainer.errors import StopRequested

SAVE_SLACK = 1.25
"""Share of its time by which a save may exceed the last one."""
EXIT_SECONDS = 2.0
"""Time to report and to leave after the save."""


class StopFlag:
    """Remembers SIGTERM until the next step boundary; installed by each rank."""

    def __init__(self) -> None:
        self.is_armed = False
        """Whether training has begun; before that there is nothing to save, and the rank ends at once."""
        self._set_at: float | None = None
        self.notice_seconds = float(os.environ.get(environment.NOTICE_SECONDS) or math.inf)
        """Time from SIGTERM to the end of the pod."""
        self._expected_seconds = float(os.environ.get(environment.SAVE_SECONDS) or 0.0)

    @property
    def is_set(self) -> bool:
        """Whether SIGTERM has arrived."""
        return self._set_at is not None

    def install(self) -> None:
        """Take SIGTERM over from the default handler."""
        signal.signal(signal.SIGTERM, self._set)

    def has_time_to_save(self, measured_seconds: float) -> bool:
        """Return whether what is left of the notice holds a save that takes as long as the last one.

        `measured_seconds` is 0 while none has been measured; the operator's estimate holds then.
        """
        if self._set_at is None:
            return True
        left = self.notice_seconds - (time.monotonic() - self._set_at)
        return left >= (measured_seconds or self._expected_seconds) * SAVE_SLACK + EXIT_SECONDS

    def _set(self, _number: int, _frame: types.FrameType | None) -> None:
        if not self.is_armed:
            raise StopRequested
        if self._set_at is None:
            self._set_at = time.monotonic()
