"""The phases that run once, each a Job that Kubernetes retries: inspect, prepare, promote, evaluate, publish.

Called by `lifecycle` in order; each returns the next step, or None when the phase is done. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from finetune_contract.reports import Phase
from finetune_contract.reports import Reason as PodReason

from . import naming
from .conditions import Reason, Type
from .manifests.phases import build_phase
from .observed import Job
from .plan import Plan
from .policies.failure import choose_first_failed, explain_failure, explain_pod
from .record import Record, to_text
from .sizing import to_words
from .steps import Create, Reference, Remove, Situation, Step, Wait, WriteRecord
from .view import View, wait_for_job, write_failure

RUNNING = {
    Phase.INSPECT: Situation(
        "Pending", Reason.INSPECTING, "reading the sizes of model and data", condition=Type.MODEL_READY
    ),
    Phase.PREPARE: Situation(
        "Preparing", Reason.PREPARING, "fetching the model, filtering the data", condition=Type.DATASET_READY
    ),
    Phase.PROMOTE: Situation(
        "Promoting", Reason.PROMOTING, "writing the promoted model from its checkpoint", condition=Type.PROMOTED
    ),
    Phase.EVALUATE: Situation("Evaluating", Reason.EVALUATING, "scoring the promoted model", condition=Type.EVALUATED),
    Phase.PUBLISH: Situation(
        "Promoting", Reason.PUBLISHING, "copying the promoted model to its destinations", condition=Type.PROMOTED
    ),
}
"""What each phase says while it runs, and the condition that it stands for."""


SETTINGS = "settings"
"""Entry of the recorded results of an evaluation: digest of what decides its scores."""


def digest_evaluation(plan: Plan) -> str:
    """Return a digest of what is scored; gates are no part of it."""
    return naming.short_digest(repr(plan.run.evaluation))


def next_phase_step(view: View, phase: Phase) -> Step | None:
    """Return the next step of a phase; None when it is done."""
    if view.record.has_done(phase):
        return None
    running = RUNNING[phase]
    job = view.observed.job(view.plan.names.phase_job(phase))
    if job is None:
        return Create(build_phase(view.plan, phase, view.record, view.observed.progress_ca), running)
    if job.is_deleting:
        return wait_for_job(view, job, running)
    if phase is Phase.INSPECT and job.source_digest != view.plan.source_digest:
        return Remove((Reference.to_job(job.name, job.uid),), running)
    if job.is_succeeded:
        return _record_success(view, phase, job)
    if job.is_failed:
        return _next_after_failure(view, phase, job)
    return wait_for_job(view, job, _describe_running(view, phase, job))


def _describe_running(view: View, phase: Phase, job: Job) -> Situation:
    """Say what the last try failed of while Kubernetes waits to start the next."""
    running = RUNNING[phase]
    pods = view.observed.pods_of(job)
    failed = choose_first_failed([pod for pod in pods if pod.is_over])
    if failed is None or any(pod.phase == "Running" for pod in pods):
        return running
    diagnosis = explain_pod(failed, view.now)
    failure = diagnosis.failure
    if not diagnosis.is_retried or diagnosis.is_storage_full:
        return running
    return dataclasses.replace(
        running, reason=failure.reason, message=f"{phase} failed and is tried again: {failure.message}"
    )


def _record_success(view: View, phase: Phase, job: Job) -> Step:
    pods = [pod for pod in view.observed.pods_of(job) if pod.exit is not None and pod.exit.code == 0]
    if not pods:
        # The node or somebody removed the pod before its report was read; every phase may run again.
        return Remove((Reference.to_job(job.name, job.uid),), RUNNING[phase])
    report = next((pod.exit.report for pod in pods if pod.exit is not None and pod.exit.report is not None), None)
    if report is None:
        message = (
            f"pod {pods[0].name} ended well but left no report: its image {view.plan.pods[phase].image} is no trainer "
            "image of this operator's release; remove pod.image"
        )
        return write_failure(view, phase, Reason.REPORT_MISSING, message)
    if phase is Phase.PREPARE and _is_older_than_claim(view, job):
        return Remove((Reference.to_job(job.name, job.uid),), RUNNING[phase])
    change = _find_change(view.record, report.details) if phase is Phase.PREPARE else ""
    if change:
        return write_failure(view, phase, Reason.INPUTS_CHANGED, change)
    record = _with_results(view, phase, dict(report.details))
    seconds = record.active_seconds + view.ended_seconds(job)
    return WriteRecord(dataclasses.replace(record, active_seconds=seconds), RUNNING[phase])


def _is_older_than_claim(view: View, job: Job) -> bool:
    """Was the claim lost and made again after the Job began, so that what it prepared is gone?"""
    claim = view.observed.claim
    if claim is None or claim.created_at is None or job.created_at is None:
        return False
    return claim.created_at > job.created_at


def _find_change(record: Record, prepared: Mapping[str, Any]) -> str:
    """Return how data or model differ from what the checkpoints on the mirror were made with; empty: not at all."""
    for name, wanted in record.expected_digests.items():
        found = prepared.get(name)
        if found != wanted:
            what = name.removesuffix("_digest")
            return (
                f"{what}: prepared anew after the workspace was lost, its digest is {found}; the checkpoints on the "
                f"mirror were made with {wanted}: bring the source back to what it was, then delete the job and apply "
                "it again to resume from the mirror; with the source as it is now it trains anew"
            )
    return ""


def _with_results(view: View, phase: Phase, details: dict[str, Any]) -> Record:
    if phase is Phase.EVALUATE:
        details[SETTINGS] = digest_evaluation(view.plan)
    record = view.record.with_phase(phase, details)
    if phase is Phase.INSPECT:
        return dataclasses.replace(record, start_time=to_text(view.now))
    if phase is Phase.PREPARE and view.observed.claim is not None:
        return dataclasses.replace(record, claim_uid=view.observed.claim.uid)
    return record


def _next_after_failure(view: View, phase: Phase, job: Job) -> Step:
    diagnosis = explain_failure(job, view.observed.pods_of(job), view.now)
    failure = diagnosis.failure
    record = dataclasses.replace(view.record, last_failure=failure)
    claim = view.observed.claim
    if not diagnosis.is_storage_full or claim is None:
        if not view.observed.pods_of(job):
            return Remove((Reference.to_job(job.name, job.uid),), RUNNING[phase])
        seconds = record.active_seconds + view.ended_seconds(job)
        record = dataclasses.replace(record, active_seconds=seconds)
        return write_failure(view, phase, failure.reason, f"{phase}: {failure.advice}", record)
    size = claim.capacity_bytes or claim.requested_bytes
    if view.record.storage_full_at == size:
        return storage_full(view, failure.message, RUNNING[phase])
    known = view.record.last_failure
    is_known = known is not None and known.pod == failure.pod
    if is_known and 0 < view.record.storage_full_at < size:
        # It has grown since this very Job failed; one that failed after that needs still more.
        return Remove((Reference.to_job(job.name, job.uid),), RUNNING[phase])
    return WriteRecord(dataclasses.replace(record, storage_full_at=size), RUNNING[phase])


def storage_full(view: View, message: str, running: Situation) -> Step:
    """Return the wait for a workspace that is full to grow."""
    claim = view.observed.claim
    size = f" of {to_words(claim.capacity_bytes or claim.requested_bytes)}" if claim else ""
    advice = "enlarge the claim" if view.plan.workspace.is_existing else "write a larger workspace.size"
    return Wait(
        Situation(
            running.state,
            PodReason.STORAGE_FULL,
            f"the workspace{size} is full: {message}: {advice}; the job goes on by itself",
            is_stalled=True,
            condition=Type.STORAGE_READY,
        )
    )
