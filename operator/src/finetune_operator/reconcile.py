"""One pass over one job: read, plan, observe, decide, carry out, report. No decisions of its own about jobs.

Called by the work queue for every event, timer and restart alike.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
from collections.abc import Callable, Mapping
from typing import Any

from . import naming
from .api.v1alpha1 import FineTuneJob, FineTuneJobStatus, InvalidManifestError, parse_job
from .cluster import Cluster, JobKey
from .conditions import Reason
from .deployment import next_deletion_step
from .errors import InvalidJobError, RefusedError
from .gauges import build_gauges
from .lifecycle import next_step
from .metrics import JOBS, RECONCILE_ERRORS, RECONCILE_SECONDS
from .news import select_events
from .observed import Observed
from .plan import Plan, make_plan
from .progress import ProgressStore
from .settings import Settings
from .status import build_invalid_status, build_status
from .steps import Finish, Remove, SetFinalizer, Step, Wait

MAX_STEPS = 12
"""Steps of one pass; what is left is for the next, so that no job holds up the others."""
REFUSED_SECONDS = 30.0
PROGRESS_SECONDS = 3.0
"""Shortest time between two writes of a status in which only figures have changed."""
Json = Mapping[str, Any]
Clock = Callable[[], datetime.datetime]
logger = logging.getLogger(__name__)


class Reconciler:
    """Passes over jobs, with what they need."""

    def __init__(
        self, cluster: Cluster, settings: Settings, progress: ProgressStore, progress_ca: str, clock: Clock
    ) -> None:
        self._cluster = cluster
        self._settings = settings
        self._progress = progress
        self._progress_ca = progress_ca
        self._clock = clock
        self._written: dict[tuple[str, str], datetime.datetime] = {}

    async def reconcile(self, key: tuple[str, str]) -> float | None:
        """Look at one job and do what is due; return the seconds until it must be looked at again, if at all."""
        with RECONCILE_SECONDS.time():
            for _ in range(MAX_STEPS):
                body = await self._cluster.read_job(*key)
                if body is None:
                    self._forget(key)
                    return None
                if body["metadata"].get("deletionTimestamp"):
                    return await self._delete(body)
                try:
                    step, delay = await self._advance(body)
                except (InvalidJobError, InvalidManifestError) as error:
                    return await self._report_invalid(body, error)
                except RefusedError as error:
                    return await self._report_invalid(body, InvalidJobError(error.message, Reason.OBJECT_REFUSED))
                if isinstance(step, Wait | Finish):
                    return delay
        return 0.0

    async def _advance(self, body: Json) -> tuple[Step, float | None]:
        job = parse_job(body)
        observed = await self._observe(body, job)
        plan = make_plan(job, self._settings, observed.frozen_plan)
        now = self._clock()
        step = next_step(plan, observed, now)
        await self._cluster.carry_out(step, plan, body, observed.record_version)
        if not isinstance(step, Wait | Finish):
            logger.info("%s/%s: %s: %s", plan.namespace, plan.name, type(step).__name__, step.situation.message)
            return step, None
        delay = await self._report(body, job, plan, observed, step)
        if step.until is not None:
            due = max(0.1, (step.until - now).total_seconds())
            delay = due if delay is None else min(delay, due)
        return step, delay

    async def _observe(self, body: Json, job: FineTuneJob) -> Observed:
        meta, spec = job.metadata, job.spec
        names = naming.make_names(meta.name, spec.inference.endpoint or "", spec.workspace.existing_claim or "")
        observed = await self._cluster.observe_job(JobKey(meta.namespace, meta.name, meta.uid, names), body)
        return dataclasses.replace(
            observed,
            progress=self._progress.read((meta.namespace, meta.name)),
            progress_since=self._progress.since,
            progress_ca=self._progress_ca,
        )

    async def _report(self, body: Json, job: FineTuneJob, plan: Plan, observed: Observed, step: Step) -> float | None:
        key = (plan.namespace, plan.name)
        status = build_status(plan, observed, step, job.status, self._clock())
        self._count(key, status, observed)
        return await self._write_status(body, job.status, status)

    async def _write_status(self, body: Json, old: FineTuneJobStatus, new: FineTuneJobStatus) -> float | None:
        """Write a status that differs, then its events; return when to try again one that must wait a little."""
        key, before, after = (
            (body["metadata"]["namespace"], body["metadata"]["name"]),
            body.get("status"),
            new.to_dict(),
        )
        if before == after:
            return None
        now, last = self._clock(), self._written.get(key)
        if last is not None and _differs_in_figures_only(before or {}, after):
            wait = PROGRESS_SECONDS - (now - last).total_seconds()
            if wait > 0:
                return wait
        await self._cluster.write_status(body, after)
        self._written[key] = now
        for kind, reason, message in select_events(old, new):
            await self._cluster.emit_event(body, kind, reason, message)
        return None

    async def _report_invalid(self, body: Json, error: InvalidJobError | InvalidManifestError) -> float | None:
        reason = error.reason if isinstance(error, InvalidJobError) else Reason.INVALID_SPEC
        meta = body["metadata"]
        logger.warning("%s/%s: %s: %s", meta["namespace"], meta["name"], reason, error)
        RECONCILE_ERRORS.labels("refused").inc()
        old = FineTuneJobStatus.model_validate(body.get("status") or {}, by_alias=True, by_name=False)
        new = build_invalid_status(str(error), reason, old, meta.get("generation", 0), self._clock())
        await self._write_status(body, old, new)
        return REFUSED_SECONDS

    async def _delete(self, body: Json) -> float | None:
        """Let a job go, even one whose spec cannot be read."""
        meta, spec = body["metadata"], body.get("spec") or {}
        inference, workspace = spec.get("inference") or {}, spec.get("workspace") or {}
        names = naming.make_names(meta["name"], inference.get("endpoint") or "", workspace.get("existingClaim") or "")
        key = JobKey(meta["namespace"], meta["name"], meta["uid"], names)
        observed = await self._cluster.observe_job(key, body)
        step = next_deletion_step(names, meta["uid"], inference.get("onDelete") == "Retain", observed)
        if isinstance(step, Remove):
            await self._cluster.delete(meta["namespace"], step.references)
            return 0.5
        if isinstance(step, SetFinalizer):
            await self._cluster.write_finalizer(body, is_wanted=False)
        return None

    def _forget(self, key: tuple[str, str]) -> None:
        self._written.pop(key, None)
        self._progress.forget(key)
        JOBS.forget(key)

    def _count(self, key: tuple[str, str], status: FineTuneJobStatus, observed: Observed) -> None:
        values = build_gauges(status, observed.record, self._clock())
        JOBS.observe(key, status.state or "Pending", values, observed.record.restarts_by_reason)


def _differs_in_figures_only(before: Json, after: Json) -> bool:
    """Do two statuses differ in nothing but progress and checkpoints?"""
    figures = ("progress", "checkpoints")
    return {name: value for name, value in before.items() if name not in figures} == {
        name: value for name, value in after.items() if name not in figures
    }
