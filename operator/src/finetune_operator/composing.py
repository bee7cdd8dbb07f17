"""The adapters of `spec.inference`: composed and measured by a Job, judged by the gates. Called by `deployment`.

Editing them asks for another composition, also of a job that has finished. Whatever goes wrong with one, the job is
not failed by it: its model is whole, and what the endpoint serves stays. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from finetune_contract.reports import Phase

from .conditions import Reason, Type
from .manifests.phases import build_phase
from .observed import Job
from .policies.failure import explain_failure
from .policies.promotion import find_failed_gate
from .steps import Create, Reference, Remove, Situation, Step, Wait, WriteRecord
from .versions import find_composition, make_request
from .view import View, wait_for_job

COMPOSING = Situation(
    "Evaluating", Reason.COMPOSING, "composing the adapters, measuring what comes of it", condition=Type.DEPLOYED
)


def next_composition_step(view: View) -> Step | None:
    """Return the next step towards the composition that is to be served; None when it may be, or none is wanted."""
    outdated = _find_outdated(view)
    if outdated:
        return Remove(outdated, COMPOSING)
    composed = find_composition(view.plan, view.record)
    if composed is not None:
        return _judge(view, composed)
    request = make_request(view.plan, view.record)
    if not request:
        return None
    name = view.plan.names.compose_job(request)
    job = view.observed.job(name)
    if job is None:
        return Create(build_phase(view.plan, Phase.COMPOSE, view.record, view.observed.progress_ca, name), COMPOSING)
    if job.is_succeeded and not job.is_deleting:
        return _record_success(view, request, job)
    if job.is_failed and not job.is_deleting:
        failure = explain_failure(job, view.observed.pods_of(job), view.now).failure
        message = f"{failure.advice}; to try again as it is: kubectl delete job {job.name}"
        return _stall(failure.reason, message)
    return wait_for_job(view, job, COMPOSING)


def _find_outdated(view: View) -> tuple[Reference, ...]:
    """Return the Jobs that compose what is wanted no more."""
    request = make_request(view.plan, view.record)
    current = view.plan.names.compose_job(request) if request else ""
    return tuple(
        Reference.to_job(job.name, job.uid)
        for job in view.observed.jobs
        if job.component == Phase.COMPOSE and job.name != current and not job.is_deleting
    )


def _record_success(view: View, request: str, job: Job) -> Step:
    exits = [each for each in view.observed.exits_of(job) if each.code == 0]
    report = next((each.report for each in exits if each.report is not None), None)
    if report is None:
        # Its pod is gone with what it found: what is composed lies on the workspace and is used again.
        return Remove((Reference.to_job(job.name, job.uid),), COMPOSING)
    record = view.record.with_composition(request, report.details)
    seconds = record.active_seconds + view.ended_seconds(job)
    return WriteRecord(dataclasses.replace(record, active_seconds=seconds), COMPOSING)


def _judge(view: View, composed: Mapping[str, Any]) -> Step | None:
    """Hold a composition that does not pass the gates; the base model's scores are those of the evaluation."""
    baseline = view.record.details(Phase.EVALUATE).get("baseline")
    failed = find_failed_gate(view.plan.run.evaluation.gates, {"scores": composed.get("scores"), "baseline": baseline})
    if failed is None:
        return None
    reason, message = failed
    names = "+".join(str(each.get("name")) for each in composed.get("adapters") or ())
    return _stall(reason, f"the composition {names} is held: {message}; or change inference.adapters")


def _stall(reason: str, message: str) -> Wait:
    return Wait(dataclasses.replace(COMPOSING, reason=reason, message=message, is_stalled=True))
