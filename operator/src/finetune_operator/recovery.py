"""What follows when the workspace is lost with all that lay on it: the end, or a new one that the mirror fills.

Called by `lifecycle` before anything that needs the workspace. With a mirror everything on the volume is made again in
order: the claim, the model and the data (which must be what they were), and the checkpoints, which the next attempt
fetches. Each step is remembered before the next, so an interrupted pass goes on where it was. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

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
    situation = Situation("Restarting", Reason.WORKSPACE_LOST, message, condition=Type.STORAGE_READY)
    return (
        _close_attempt(view, failure)
        or _remove([job for job in view.observed.jobs if _is_void(job)], situation)
        or WriteRecord(_forget_workspace(record, failure), situation)
    )


def next_step_while_claim_goes(view: View) -> Step | None:
    """Return the next step while the claim is being deleted; None while a Job that was begun before runs on it.

    Kubernetes lets no further pod mount such a claim, and keeps it for as long as there are pods that do, also ended
    ones. With a mirror these are removed, so that the claim goes; without one they keep what lies on it.
    """
    claim = f"PersistentVolumeClaim {view.plan.workspace.claim}"
    situation = Situation(
        "Pending", Reason.CLAIM_TERMINATING, f"{claim} is being deleted", condition=Type.STORAGE_READY
    )
    if not view.record.claim_uid:
        return Wait(situation)
    jobs = [job for job in view.observed.jobs if job.component != Phase.INSPECT]
    if any(not (job.is_succeeded or job.is_failed or job.is_deleting) for job in jobs):
        return None
    if not view.plan.run.checkpoint.mirror.destination:
        advice = (
            "the ended pods of this job still keep the data and checkpoints on it: to save those, write "
            "persistentVolumeReclaimPolicy: Retain into its PersistentVolume; then delete the job"
        )
        return Wait(dataclasses.replace(situation, message=f"{situation.message}; {advice}", is_stalled=True))
    message = f"{situation.message}: it is made again once it is gone, and training resumes from the mirror"
    return (
        _close_attempt(view, Failure(to_text(view.now), Reason.WORKSPACE_LOST, message))
        or _remove(jobs, dataclasses.replace(situation, message=message))
        or Wait(dataclasses.replace(situation, message=message))
    )


def _close_attempt(view: View, failure: Failure) -> Step | None:
    attempt = view.record.attempt
    if attempt is None or attempt.end_time:
        return None
    return close_attempt(view, attempt, view.observed.job(attempt.job), Diagnosis(failure, False, True, False))


def _remove(jobs: Sequence[Job], situation: Situation) -> Step | None:
    """Return the step that removes these Jobs, or waits until they are gone; None once they are."""
    going = [job for job in jobs if not job.is_deleting]
    if going:
        return Remove(tuple(Reference.to_job(job.name, job.uid) for job in going), situation)
    if jobs:
        return Wait(dataclasses.replace(situation, message=f"{situation.message}; Job {jobs[0].name} is going"))
    return None


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
