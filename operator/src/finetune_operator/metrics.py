"""Prometheus metrics of the operator: what jobs do, and how the operator keeps up. Filled by `reconcile`."""

from __future__ import annotations

from collections.abc import Mapping

import prometheus_client as prometheus
from prometheus_client.core import GaugeMetricFamily, Metric

JOB = ("namespace", "name")
REGISTRY = prometheus.REGISTRY

RECONCILE_SECONDS = prometheus.Histogram(
    "finetune_reconcile_seconds",
    "Duration of one pass over one job.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
RECONCILE_ERRORS = prometheus.Counter("finetune_reconcile_errors_total", "Passes that ended in an error.", ("kind",))
QUEUE_LENGTH = prometheus.Gauge("finetune_reconcile_queue_length", "Jobs that wait for a pass.")
PROGRESS_POSTS = prometheus.Counter("finetune_progress_posts_total", "Progress posts received.", ("code",))
EVENTS = prometheus.Counter("finetune_watch_events_total", "Events received from the API server.", ("kind",))


class JobMetrics(prometheus.registry.Collector):
    """Figures of the jobs that exist; those of a job that is gone disappear with it."""

    def __init__(self) -> None:
        self._jobs: dict[tuple[str, str], tuple[str, Mapping[str, float], Mapping[str, int]]] = {}

    def observe(
        self, key: tuple[str, str], state: str, values: Mapping[str, float], restarts: Mapping[str, int]
    ) -> None:
        """Keep the figures of one job: its state, gauges by metric name, restarts by reason."""
        self._jobs[key] = (state, dict(values), dict(restarts))

    def forget(self, key: tuple[str, str]) -> None:
        """Drop a job that is gone."""
        self._jobs.pop(key, None)

    def collect(self) -> list[Metric]:
        """Return the figures as Prometheus wants them."""
        states = GaugeMetricFamily("finetune_jobs", "Jobs by state.", labels=["namespace", "state"])
        info = GaugeMetricFamily("finetune_job_state", "1 for the state that a job is in.", labels=[*JOB, "state"])
        restarts = GaugeMetricFamily("finetune_job_restarts", "Restarts by reason.", labels=[*JOB, "reason"])
        gauges = {
            name: GaugeMetricFamily(f"finetune_job_{name}", text, labels=list(JOB)) for name, text in GAUGES.items()
        }
        counts: dict[tuple[str, str], int] = {}
        for key, (state, values, reasons) in list(self._jobs.items()):
            counts[key[0], state] = counts.get((key[0], state), 0) + 1
            info.add_metric([*key, state], 1)
            for reason, number in reasons.items():
                restarts.add_metric([*key, reason], number)
            for name, value in values.items():
                gauges[name].add_metric(list(key), value)
        for (namespace, state), number in counts.items():
            states.add_metric([namespace, state], number)
        return [states, info, restarts, *gauges.values()]


GAUGES = {
    "progress_ratio": "Share of the training steps that are done, 0 to 1.",
    "loss": "Training loss, last logged.",
    "tokens_per_second": "Tokens trained on per second.",
    "checkpoint_step": "Step of the newest complete checkpoint.",
    "checkpoint_timestamp_seconds": "When the newest complete checkpoint was committed, in seconds since 1970.",
    "checkpoint_age_seconds": "Time since the newest complete checkpoint was committed.",
    "checkpoint_bytes": "Size of the newest complete checkpoint.",
    "checkpoint_save_seconds": "Time from the start of the newest save until it was committed.",
    "checkpoint_stall_seconds": "Time that training stood still for the newest save.",
    "goodput_ratio": "Productive over allocated time of the training, 0 to 1.",
    "productive_seconds": "Time in the optimizer steps that led to the present weights.",
    "allocated_seconds": "Time with training pods, over all attempts.",
    "steps_lost": "Optimizer steps that restarts threw away, over all attempts.",
    "seconds_lost": "Time of the optimizer steps that restarts threw away.",
    "rows_read": "Rows read from the data set.",
    "rows_kept": "Rows kept by the filter.",
    "rows_removed": "Rows removed by the filter.",
    "active_seconds": "Time with pods.",
}
"""Gauges per job by name, without their prefix `finetune_job_`."""

JOBS = JobMetrics()
REGISTRY.register(JOBS)
