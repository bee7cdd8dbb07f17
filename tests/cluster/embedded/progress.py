"""What the user sees while the cluster is built and started: a bar on a terminal, plain lines otherwise (stderr)."""

from __future__ import annotations

import sys
import time


def show(message: str) -> None:
    print(f"cluster: {message}", file=sys.stderr, flush=True)


class Bar:
    """Progress of one long step. On a terminal it redraws one line; elsewhere it writes a line per tenth."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total = label, max(total, 1)
        self._started, self._last_tenth = time.monotonic(), -1
        self._shown = False

    def update(self, done: int) -> None:
        self._shown = True
        done = min(done, self._total)
        seconds = int(time.monotonic() - self._started)
        if sys.stderr.isatty():
            filled = 30 * done // self._total
            line = f"\rcluster: {self._label} [{'#' * filled:<30}] {done}/{self._total} {seconds}s "
            print(line, end="", file=sys.stderr, flush=True)
        elif 10 * done // self._total > self._last_tenth:
            self._last_tenth = 10 * done // self._total
            show(f"{self._label}: {done}/{self._total} after {seconds} s")

    def close(self) -> None:
        if self._shown and sys.stderr.isatty():
            print(file=sys.stderr)
