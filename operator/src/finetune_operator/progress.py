"""The newest progress post of every job, and the time to go computed from the posts. Thread-safe memory, nothing else.

Written by `progress_server` from its own thread, read by `reconcile`. Lost when the operator restarts: the next post
fills it again, and until then the status keeps what it says.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import threading

from finetune_contract.reports import Metric, ProgressReport

from .observed import Progress

Key = tuple[str, str]
"""Namespace and name of a job."""
WINDOW = 30
"""Posts over which the speed is measured."""


@dataclasses.dataclass
class _Track:
    """What is known of one attempt: the window of (time, step), and the newest post."""

    attempt: int
    points: collections.deque[tuple[datetime.datetime, float]]
    progress: Progress


class ProgressStore:
    """Progress by job."""

    def __init__(self, now: datetime.datetime) -> None:
        self.since = now
        """When this store began to listen."""
        self._lock = threading.Lock()
        self._tracks: dict[Key, _Track] = {}

    def put(self, key: Key, attempt: int, report: ProgressReport, now: datetime.datetime) -> bool:
        """Keep a post; False when it comes from an attempt that another has followed."""
        with self._lock:
            track = self._tracks.get(key)
            if track is not None and attempt < track.attempt:
                return False
            if track is None or attempt > track.attempt:
                self._tracks[key] = _begin(attempt, report, now)
                return True
            _append(track, report, now)
            return True

    def read(self, key: Key) -> Progress | None:
        """Return the newest progress of a job."""
        with self._lock:
            track = self._tracks.get(key)
            return track.progress if track else None

    def forget(self, key: Key) -> None:
        """Drop a job that is gone."""
        with self._lock:
            self._tracks.pop(key, None)


def _begin(attempt: int, report: ProgressReport, now: datetime.datetime) -> _Track:
    points = collections.deque([(now, _step(report))], maxlen=WINDOW)
    return _Track(attempt, points, Progress(report, now, None, now, attempt))


def _append(track: _Track, report: ProgressReport, now: datetime.datetime) -> None:
    step, before = _step(report), track.points[-1][1]
    moved_at = now if step != before else track.progress.moved_at
    if step < before:
        # The ranks restarted inside their pods from an older step: the old speed says nothing about the way back.
        track.points.clear()
    if step != before or not track.points:
        track.points.append((now, step))
    # A post that carries less than the one before does not make its figures unknown.
    metrics = {**track.progress.report.metrics, **report.metrics}
    report = dataclasses.replace(report, metrics=metrics)
    eta = estimate_seconds(tuple(track.points), metrics.get(Metric.TOTAL_STEPS))
    track.progress = Progress(report, now, eta, moved_at, track.attempt)


def _step(report: ProgressReport) -> float:
    return report.metrics.get(Metric.STEP, 0.0)


def estimate_seconds(points: tuple[tuple[datetime.datetime, float], ...], total: float | None) -> int | None:
    """Return the time to the last step at the speed of the window; None when nothing moved yet.

    Only steps made since this process heard of the attempt count: one that resumed at step 9000 is not that fast.
    """
    if total is None or len(points) < 2:
        return None
    (started, first), (ended, last) = points[0], points[-1]
    elapsed = (ended - started).total_seconds()
    if last <= first or elapsed <= 0:
        return None
    return max(0, round((total - last) * elapsed / (last - first)))
