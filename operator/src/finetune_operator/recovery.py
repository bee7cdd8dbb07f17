"""What follows when the workspace is lost with all that lay on it: the end, or a new one that the mirror fills.

Called by `lifecycle` before anything that needs the workspace. With a mirror everything on the volume is made again in
order: the claim, the model and the data (which must be what they were), and the checkpoints, which the next attempt
fetches. Each step is remembered before the next, so an interrupted pass goes on where it was. Pure.
"""

from __future__ import annotations

import dataclasses

from finetune_contract.reports import Phase

from .attempts import close_attempt
from .conditions import Reason, Type
from .observed import Job
from .policies.failure import Diagnosis
from .record import Failure, Record, to_text
from .steps import Reference, Remove, Situation, Step, Wait, WriteRecord
from .view import View, write_failure

DIGESTS = ("dataset_digest", "model_digest")
"""Results of `prepare` that a preparation on a new workspace must give again."""


def next_recovery_step(view: View, phase: Phase) -> Step | None:
    """Return the next step after the claim was lost; None when it is there, or nothing lay on it. `phase` is now."""
    record, claim = view.record, view.observed.claim
    if not record.claim_uid or (claim is not None and claim.uid == record.claim_uid):
        return None
    lost = (
        f"PersistentVolumeClaim {view.plan.workspace.claim}, which held the data and checkpoints of this job, is gone"
    )
    if not view.plan.run.checkpoint.mirror.destination:
        advice = "delete the job and apply it again; with checkpoint.mirror a job goes on by itself"
        return write_failure(view, phase, Reason.WORKSPACE_LOST, f"{lost}: {advice}")
    message = f"{lost}: it is made again, and training resumes from the mirror"
    failure = Failure(to_text(view.now), Reason.WORKSPACE_LOST, message)
    attempt = record.attempt
    if attempt is not None and not attempt.end_time:
        return close_attempt(view, attempt, view.observed.job(attempt.job), Diagnosis(failure, False, True, False))
    situation = Situation("Restarting", Reason.WORKSPACE_LOST, message, condition=Type.STORAGE_READY)
    jobs = [job for job in view.observed.jobs if _is_void(job)]
    going = [job for job in jobs if not job.is_deleting]
    if going:
        return Remove(tuple(Reference("batch/v1", "Job", job.name, job.uid) for job in going), situation)
    if jobs:
        return Wait(dataclasses.replace(situation, message=f"{message}; Job {jobs[0].name} is going"))
    return WriteRecord(_forget_workspace(record, failure), situation)


def _is_void(job: Job) -> bool:
    """Has the Job worked on the lost workspace, so that what it says of itself is true no more?"""
    if job.component == Phase.TRAIN:
        return not (job.is_succeeded or job.is_failed)
    return job.component != Phase.INSPECT


def _forget_workspace(record: Record, failure: Failure) -> Record:
    """Return the record of a job that has an empty workspace: only what was read for the plan is still true."""
    attempt = record.attempt
    if attempt is not None and attempt.reason == Reason.WORKSPACE_LOST and record.last_failure is not None:
        # The loss has been told when it ended this attempt.
        failure = record.last_failure
    prepared = record.details(Phase.PREPARE)
    digests = {name: str(prepared[name]) for name in DIGESTS if prepared.get(name)}
    return dataclasses.replace(
        record,
        phases={name: details for name, details in record.phases.items() if name == Phase.INSPECT},
        compositions=(),
        expected_digests=digests or record.expected_digests,
        claim_uid="",
        storage_full_at=0,
        last_failure=failure,
    )
