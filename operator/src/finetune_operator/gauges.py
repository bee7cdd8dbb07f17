"""The figures of one job for Prometheus, told from its status and its record. Pure; used by `reconcile`."""

from __future__ import annotations

import datetime

from finetune_contract.reports import Phase

from .api.v1alpha1 import FineTuneJobStatus
from .record import Record


def build_gauges(status: FineTuneJobStatus, record: Record, now: datetime.datetime) -> dict[str, float]:
    """Return the values by the names in `metrics.GAUGES`; what is not known is left out."""
    rows = record.details(Phase.PREPARE)
    figures: dict[str, float | int | None] = {
        "active_seconds": record.active_seconds,
        **{name: rows.get(name) for name in ("rows_read", "rows_kept", "rows_removed")},
    }
    progress, saved = status.progress, status.checkpoints
    if progress is not None:
        figures |= {
            "progress_ratio": (progress.percentage or 0) / 100,
            "loss": progress.loss,
            "tokens_per_second": progress.tokens_per_second,
            "goodput_ratio": progress.goodput,
            "productive_seconds": progress.productive_seconds,
            "allocated_seconds": progress.allocated_seconds,
            "steps_lost": progress.steps_lost,
            "seconds_lost": progress.seconds_lost,
        }
    if saved is not None:
        figures |= {
            "checkpoint_step": saved.latest_complete,
            "checkpoint_bytes": saved.bytes,
            "checkpoint_save_seconds": saved.save_seconds,
            "checkpoint_stall_seconds": saved.stall_seconds,
        }
        if saved.time is not None:
            figures["checkpoint_timestamp_seconds"] = saved.time.timestamp()
            figures["checkpoint_age_seconds"] = max(0.0, (now - saved.time).total_seconds())
    return {name: float(value) for name, value in figures.items() if value is not None}
