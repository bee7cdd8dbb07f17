"""The state machine: from what is planned and what exists to the one thing to do next.

Called by `reconcile` on every pass. The phase is derived from what exists, the record included, and never read back
from status; so a missed event, a repeated one and an operator killed at any moment all end here and go on. Pure.
"""

from __future__ import annotations

import dataclasses
import datetime

from finetune_contract.reports import Phase

from . import naming
from .attempts import has_ended_well, next_training_step, revive_attempt, suspend_attempt
from .conditions import Reason, Type
from .deployment import keep_endpoint, next_endpoint_step, succeed
from .manifests.memory import build_plan_map
from .manifests.workspace import build_workspace_claim
from .observed import Job, Observed
from .phases import SETTINGS, digest_evaluation, next_phase_step
from .plan import Plan
from .policies.blockers import find_claim_blocker
from .policies.cleanup import list_finished_children, list_surplus_workspace, next_cleanup
from .policies.promotion import find_failed_gate
from .policies.storage import find_storage_problem, needs_growth, resolve_size
from .record import Record, Terminal, to_time
from .recovery import next_recovery_step, next_step_while_claim_goes
from .steps import Apply, Create, Finish, Reference, Remove, Situation, Step, Wait, WriteRecord
from .versions import serving_version
from .view import View, write_failure

RELEASE = "0.1.0"
ACCEPTED = Situation("Pending", Reason.ACCEPTED, "the job is accepted")


def next_step(plan: Plan, observed: Observed, now: datetime.datetime) -> Step:
    """Return what to do next."""
    view = View(plan, observed, now)
    if not observed.record_version:
        return WriteRecord(Record(uid=plan.uid), ACCEPTED)
    if observed.record.uid != plan.uid:
        message = f"an earlier job named {plan.name} is still being removed"
        return Wait(Situation("Pending", Reason.NAME_IN_USE, message))
    if observed.record.terminal is not None:
        return _next_after_end(view, observed.record.terminal)
    if plan.is_suspended:
        return _next_while_suspended(view)
    if plan.deadlines.active and view.active_seconds() >= plan.deadlines.active:
        message = (
            f"pods ran for {int(view.active_seconds())} s, where activeDeadlineSeconds allows {plan.deadlines.active}"
        )
        record = dataclasses.replace(observed.record, active_seconds=view.active_seconds())
        return write_failure(view, _phase_now(view), Reason.DEADLINE_EXCEEDED, message, record)
    return _limit_wait(view, _next_in_order(view))


def _next_in_order(view: View) -> Step:
    return (
        next_phase_step(view, Phase.INSPECT)
        or _next_to_freeze(view)
        or _next_for_storage(view)
        or next_phase_step(view, Phase.PREPARE)
        or next_training_step(view)
        or next_phase_step(view, Phase.PROMOTE)
        or _next_to_evaluate(view)
        or _next_to_publish(view)
        or _next_to_serve(view)
        or succeed(view)
    )


def _limit_wait(view: View, step: Step) -> Step:
    """Look again when the active deadline is due."""
    limit = view.plan.deadlines.active
    if not limit or not isinstance(step, Wait):
        return step
    due = view.now + datetime.timedelta(seconds=max(1.0, limit - view.active_seconds()))
    return dataclasses.replace(step, until=min(due, step.until or due))


def _phase_now(view: View) -> Phase:
    order = (Phase.INSPECT, Phase.PREPARE, Phase.TRAIN, Phase.PROMOTE, Phase.EVALUATE, Phase.PUBLISH)
    return next((phase for phase in order if not view.record.has_done(phase)), Phase.SERVE)


def _next_to_freeze(view: View) -> Step | None:
    if view.observed.frozen_plan:
        return None
    return Create((build_plan_map(view.plan, RELEASE),), ACCEPTED)


def _next_for_storage(view: View) -> Step | None:
    plan, observed, record = view.plan, view.observed, view.record
    claim, inspected = observed.claim, record.details(Phase.INSPECT)
    pending = Situation("Pending", Reason.CLAIM_PENDING, f"making the workspace {plan.workspace.claim}")
    recovery = next_recovery_step(view, _phase_now(view))
    if recovery is not None:
        return recovery
    if claim is not None and claim.is_deleting:
        return next_step_while_claim_goes(view)
    problem = find_storage_problem(plan, inspected, claim)
    if problem is not None:
        reason, message = problem
        return Wait(Situation("Pending", reason, message, is_stalled=True, condition=Type.STORAGE_READY))
    if (claim is None or needs_growth(plan, claim)) and not plan.workspace.is_existing:
        return Apply((build_workspace_claim(plan, resolve_size(plan, inspected)),), pending)
    if claim is None:
        return None
    blocker = find_claim_blocker(plan, claim, observed.storage_class_is_missing, observed.warnings.get(claim.uid, ""))
    if blocker is None:
        return None
    return Wait(Situation("Pending", blocker.reason, blocker.message, is_stalled=True, condition=Type.STORAGE_READY))


def is_evaluated(plan: Plan) -> bool:
    """Does the job score anything?"""
    evaluation = plan.run.evaluation
    is_held_out = evaluation.holdout and plan.run.dataset.holdout_fraction > 0
    return bool(evaluation.tasks) or evaluation.refusals or is_held_out


def _next_to_evaluate(view: View) -> Step | None:
    if is_evaluated(view.plan):
        step = next_phase_step(view, Phase.EVALUATE)
        if step is not None:
            return step
    failed = find_failed_gate(view.plan.run.evaluation.gates, view.record.details(Phase.EVALUATE))
    return None if failed is None else write_failure(view, Phase.EVALUATE, *failed)


def _next_to_publish(view: View) -> Step | None:
    return next_phase_step(view, Phase.PUBLISH) if view.plan.run.promotion.needs_publishing else None


def _next_to_serve(view: View) -> Step | None:
    if view.plan.serving.is_enabled and not serving_version(view.plan, view.record):
        message = "promotion left no digest to serve: its image is no trainer image of this operator's release"
        return write_failure(view, Phase.SERVE, Reason.REPORT_MISSING, message)
    return next_endpoint_step(view)


def _next_while_suspended(view: View) -> Step:
    situation = Situation("Suspended", Reason.SUSPENDED, "suspended: set suspend: false to go on")
    attempt = view.record.attempt
    if attempt is not None and not attempt.end_time and not view.record.has_done(Phase.TRAIN):
        job = view.observed.job(attempt.job)
        if job is not None and (job.is_succeeded or job.is_failed):
            return next_training_step(view) or Wait(situation)
        return suspend_attempt(view, attempt, job)
    return _remove_running(view, situation) or Wait(situation)


def _remove_running(view: View, situation: Situation) -> Step | None:
    # A job that has finished may still go over to another version: adapters are composed, the smoke prompt is asked.
    kept = (naming.SMOKE, Phase.COMPOSE) if view.record.terminal is not None else (naming.SMOKE,)
    running = [job for job in view.observed.jobs if _is_running(job) and job.component not in kept]
    if not running:
        return None
    return Remove(tuple(Reference.to_job(job.name, job.uid) for job in running), situation)


def _is_running(job: Job) -> bool:
    return not (job.is_succeeded or job.is_failed or job.is_deleting)


def _next_after_end(view: View, terminal: Terminal) -> Step:
    situation = Situation(terminal.result, terminal.reason, terminal.message, is_stalled=not has_ended_well(terminal))
    if not has_ended_well(terminal) and terminal.digest != view.plan.digest and not view.plan.is_suspended:
        return _take_up(view, terminal)
    removal = _remove_running(view, situation)
    if removal is not None:
        return removal
    finish = Finish(situation, until=None)
    surplus = list_surplus_workspace(view.plan, view.observed)
    if surplus:
        return Remove(surplus, situation)
    due = next_cleanup(view.plan, terminal)
    if due is not None and view.now >= due:
        children = list_finished_children(view.plan, view.observed)
        if children:
            return Remove(children, situation)
    elif due is not None:
        finish = dataclasses.replace(finish, until=due)
    return keep_endpoint(view, finish) if has_ended_well(terminal) else finish


def _take_up(view: View, terminal: Terminal) -> Step:
    """Go on with a failed job whose spec has been changed: from the phase that failed, nothing is done twice."""
    situation = Situation("Pending", Reason.ACCEPTED, "the spec has changed: the job is taken up again")
    record = dataclasses.replace(view.record, terminal=None)
    if terminal.phase == Phase.TRAIN:
        removal = _remove_running(view, situation)
        return removal if removal is not None else revive_attempt(view, _close_open_attempt(view, record, terminal))
    job = view.observed.job(view.plan.names.phase_job(terminal.phase))
    is_done = view.record.has_done(terminal.phase)
    if terminal.phase == Phase.EVALUATE and is_done and _is_scored_otherwise(view):
        # With other tasks the scores are others; with other gates they are judged as they are.
        is_done = False
        record = dataclasses.replace(
            record, phases={name: found for name, found in record.phases.items() if name != Phase.EVALUATE}
        )
    if job is not None and not is_done:
        if job.is_deleting:
            return Wait(situation)
        return Remove((Reference.to_job(job.name, job.uid),), situation)
    return WriteRecord(record, situation)


def _is_scored_otherwise(view: View) -> bool:
    settings = view.record.details(Phase.EVALUATE).get(SETTINGS)
    return settings is not None and settings != digest_evaluation(view.plan)


def _close_open_attempt(view: View, record: Record, terminal: Terminal) -> Record:
    """An attempt that a deadline ended was never closed: close it at the end of the job."""
    attempt = record.attempt
    if attempt is None or attempt.end_time or to_time(terminal.time) is None:
        return record
    return record.with_attempt(dataclasses.replace(attempt, end_time=terminal.time, reason=terminal.reason))
