"""What attempts have done and what their restarts have lost: the sums behind goodput.

Pure; used by `attempts` and `figures`.

The trainer says how far it is and how long the steps took that led there; a checkpoint carries that time on. What a
restart loses is known when the next attempt says where it went on.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from typing import Any

from finetune_contract.reports import Metric

from .observed import Observed
from .record import Attempt, Record, to_time


def end_work(record: Record, ended: Attempt, details: Mapping[str, Any], posted: Mapping[str, float]) -> Record:
    """Return the record with the work of an attempt that has ended, and with what the restart before it lost.

    `details` is what its pod reported at its end, `posted` the metrics of its last post; either may be empty.
    """
    started = find_start(ended.resumed_from_step, {**posted, **details})
    if started is not None:
        record = settle_work(record, ended.number, started)
    reached = int(details.get("step") or posted.get(Metric.STEP) or 0)
    productive = details.get(Metric.PRODUCTIVE_SECONDS, posted.get(Metric.PRODUCTIVE_SECONDS))
    attempt = dataclasses.replace(
        ended,
        reached_step=max(reached, ended.last_step),
        productive_seconds=record.productive_seconds if productive is None else float(productive),
        save_seconds=float(details.get(Metric.SAVE_SECONDS) or posted.get(Metric.SAVE_SECONDS) or 0),
    )
    record = dataclasses.replace(
        record,
        productive_seconds=attempt.productive_seconds,
        training_seconds=record.training_seconds + count_seconds(ended),
    )
    return _lose(record, attempt, int(details.get(Metric.STEPS_LOST) or posted.get(Metric.STEPS_LOST) or 0))


def find_start(resumed_from: int | None, facts: Mapping[str, Any]) -> int | None:
    """Return the step at which an attempt went on, 0 for the base model; None while it is not known."""
    found = facts.get(Metric.RESUMED_FROM) if resumed_from is None else resumed_from
    if found is not None:
        return int(found)
    # Our trainer says where it resumed whenever it says anything: it has started from the base model.
    return 0 if Metric.PRODUCTIVE_SECONDS in facts else None


def settle_work(record: Record, number: int, step: int) -> Record:
    """Return the record with what earlier attempts lost, now that attempt `number` goes on at `step`."""
    for attempt in record.attempts:
        if attempt.number >= number or not attempt.end_time or attempt.is_settled:
            continue
        lost = max(0, attempt.reached_step - step)
        record = _lose(record, dataclasses.replace(attempt, is_settled=True), lost)
        seconds = lost * _mean_step_seconds(attempt)
        record = dataclasses.replace(record, productive_seconds=max(0.0, record.productive_seconds - seconds))
    return record


def _lose(record: Record, attempt: Attempt, steps: int) -> Record:
    """Return the record with the attempt, and with steps that it lost on top of those it had lost."""
    seconds = steps * _mean_step_seconds(attempt)
    attempt = dataclasses.replace(
        attempt, steps_lost=attempt.steps_lost + steps, seconds_lost=round(attempt.seconds_lost + seconds, 3)
    )
    attempts = tuple(attempt if each.number == attempt.number else each for each in record.attempts)
    return dataclasses.replace(
        record,
        attempts=attempts,
        steps_lost=record.steps_lost + steps,
        seconds_lost=round(record.seconds_lost + seconds, 3),
    )


def _mean_step_seconds(attempt: Attempt) -> float:
    return attempt.productive_seconds / attempt.reached_step if attempt.reached_step else 0.0


def count_seconds(attempt: Attempt) -> float:
    """Return how long the pods of an attempt that has ended were there."""
    started, ended = to_time(attempt.start_time), to_time(attempt.end_time)
    return max(0.0, (ended - started).total_seconds()) if started and ended else 0.0


@dataclasses.dataclass(frozen=True)
class Work:
    """The time of a job's training so far."""

    productive_seconds: float
    allocated_seconds: float

    @property
    def goodput(self) -> float | None:
        """Productive over allocated time, 0 to 1; None before anything was allocated."""
        if self.allocated_seconds <= 0:
            return None
        return round(min(1.0, self.productive_seconds / self.allocated_seconds), 4)


def measure_work(observed: Observed, started: datetime.datetime | None) -> Work | None:
    """Return the time up to the last post; None when nothing says it.

    `started` is when the pods of the newest attempt started.
    """
    record, progress, attempt = observed.record, observed.progress, observed.record.attempt
    if attempt is None:
        return None
    if attempt.end_time:
        return Work(record.productive_seconds, record.training_seconds) if record.productive_seconds else None
    if progress is None or progress.attempt != attempt.number or started is None:
        return None
    productive = progress.report.metrics.get(Metric.PRODUCTIVE_SECONDS)
    if productive is None:
        return None
    running = max(0.0, (progress.received_at - started).total_seconds())
    return Work(productive, record.training_seconds + running)
