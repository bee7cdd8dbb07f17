"""Training: attempt after attempt, each one Indexed Job, until one ends well or the failure policy gives up.

Called by `lifecycle`. What is known of an attempt is written to the record before its Job is made, before it is
removed and before the next one starts; so a repeated or an interrupted pass starts nothing twice. Pure.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_contract.reports import Metric, Phase
from finetune_contract.reports import Reason as PodReason
from finetune_contract.run_config import LONGEST_PAUSE_SECONDS

from .conditions import Reason, Type
from .manifests.run_config import build_run_config, count_global_batch
from .manifests.training import build_attempt, build_disruption_budget, build_training_service
from .observed import Job, Pod, earliest_start
from .phases import storage_full
from .policies.exclusion import exclude_node, list_current
from .policies.failure import Diagnosis, explain_failure, explain_pod, find_disruption, is_on_lost_node
from .policies.restart import judge_failure, next_start
from .record import Attempt, Failure, Record, Terminal, to_text
from .steps import Apply, Create, Reference, Remove, Situation, Step, Wait, WriteRecord
from .view import View, wait_for_job, write_failure
from .work import count_seconds, end_work, find_start, settle_work

STARTING = Situation("Training", Reason.STARTING, "the training pods are starting", condition=Type.TRAINING)
RUNNING = Situation("Training", Reason.RUNNING, "training")
LOST_POD_SECONDS = 60
"""A pod that is still there so long after it should have ended is on a lost node; the workspace's fence stops it from
writing."""
NO_REPORT_SECONDS = LONGEST_PAUSE_SECONDS + 60
"""The pods end ranks that hang by themselves, and say where: so much later than they would at the latest, they are
taken for gone."""
UNCOUNTED_ENDS = frozenset({str(Reason.SUSPENDED), str(Reason.UNSCHEDULABLE)})
"""Ends of an attempt that are no failure."""


def next_training_step(view: View) -> Step | None:
    """Return the next step of training; None when it is done."""
    if view.record.has_done(Phase.TRAIN):
        return None
    attempt = view.record.attempt
    if attempt is None:
        return start_attempt(view, view.record)
    job = view.observed.job(attempt.job)
    if attempt.end_time:
        return _next_after_attempt(view, attempt, job)
    if job is None:
        return _make_or_miss(view, attempt)
    if not attempt.uid:
        return WriteRecord(view.record.with_attempt(dataclasses.replace(attempt, uid=job.uid)), STARTING)
    if job.is_succeeded:
        return _record_success(view, attempt, job)
    if job.is_failed:
        return close_attempt(view, attempt, job, _explain(view, attempt, job))
    if job.is_deleting:
        return wait_for_job(view, job, STARTING)
    return _next_when_disrupted(view, attempt, job) or _next_while_running(view, attempt, job)


def _explain(view: View, attempt: Attempt, job: Job) -> Diagnosis:
    return explain_failure(
        job,
        view.observed.pods_of(job),
        view.now,
        num_pods=view.plan.run.topology.nodes,
        memory=view.plan.resources.memory,
        disruption=attempt.disruption,
    )


def _next_when_disrupted(view: View, attempt: Attempt, job: Job) -> WriteRecord | None:
    """Return the step that gives up an attempt on a lost node, or remembers that a pod is being taken away."""
    pods = view.observed.pods_of(job)
    lost = next((pod for pod in pods if is_on_lost_node(pod)), None)
    if lost is not None:
        # Its Job fails only when the pod is gone, which may be never: the node may not come back.
        return close_attempt(view, attempt, job, explain_pod(lost, view.now))
    found = find_disruption(pods, attempt.disruption, view.now)
    if found == attempt.disruption:
        return None
    return WriteRecord(view.record.with_attempt(dataclasses.replace(attempt, disruption=found)), RUNNING)


def start_attempt(view: View, record: Record) -> WriteRecord:
    """Return the step that remembers the next attempt; its Job is made in a later pass."""
    number = record.attempt.number + 1 if record.attempt else 1
    attempt = Attempt(number=number, job=view.plan.names.training_job(number), digest=view.plan.digest)
    record = dataclasses.replace(record, excluded_nodes=list_current(record.excluded_nodes, view.now))
    # Refused here, before the attempt is remembered and has pods, where the global batch cannot be kept.
    batch = count_global_batch(view.plan, build_run_config(view.plan, record, number))
    return WriteRecord(dataclasses.replace(record.with_attempt(attempt), global_batch=batch), STARTING)


def _make_or_miss(view: View, attempt: Attempt) -> Step:
    if attempt.uid:
        failure = Failure(to_text(view.now), Reason.JOB_DELETED, f"Job {attempt.job} was deleted by somebody")
        return close_attempt(view, attempt, None, Diagnosis(failure, False, True, False))
    name = view.plan.names.training_service
    present = {(kind, each) for _, kind, each in view.observed.other_children}
    if not {("Service", name), ("PodDisruptionBudget", name)} <= present:
        return Apply((build_training_service(view.plan), build_disruption_budget(view.plan)), STARTING)
    objects = build_attempt(view.plan, view.record, attempt.number, view.observed.progress_ca)
    return Create(objects, STARTING)


def _record_success(view: View, attempt: Attempt, job: Job) -> Step:
    pods = view.observed.pods_of(job)
    reports = [
        pod.exit.report for pod in pods if pod.exit is not None and pod.exit.report is not None and pod.index == 0
    ]
    details = dict(reports[0].details) if reports else {}
    ended = _end(view, attempt, job, PodReason.COMPLETED, "training has ended")
    resumed = details.get("resumed_from_step")
    ended = dataclasses.replace(ended, resumed_from_step=resumed, last_step=int(details.get("latest_complete") or 0))
    ended = dataclasses.replace(ended, in_pod_restarts=int(details.get("in_pod_restarts") or ended.in_pod_restarts))
    record = _learn(view, ended, details).with_phase(Phase.TRAIN, details)
    seconds = record.active_seconds + count_seconds(ended)
    return WriteRecord(dataclasses.replace(record, active_seconds=seconds, failures_without_progress=0), RUNNING)


def _end(view: View, attempt: Attempt, job: Job | None, reason: str, message: str) -> Attempt:
    ended = (job.ended_at if job else None) or view.now
    return dataclasses.replace(
        _begin(attempt, view.observed.training_pods(attempt.number)),
        end_time=to_text(ended),
        reason=str(reason),
        message=message,
        last_step=_last_checkpoint(view, attempt),
        resumed_from_step=_resumed_from(view, attempt),
        in_pod_restarts=_metric(view, attempt, Metric.IN_POD_RESTARTS) or attempt.in_pod_restarts,
    )


def _learn(view: View, ended: Attempt, details: Mapping[str, Any]) -> Record:
    """Return the record with an attempt that has ended: what its ranks did in their pod counts, how long a save takes.

    `details` is what its pod reported at its end; where there is nothing, what it posted last holds.
    """
    record = view.record.with_attempt(ended)
    posted = _posted(view, ended)

    def longest(name: Metric, known: float) -> float:
        return max(known, float(details.get(name) or 0), float(posted.get(name) or 0))

    reasons = dict(record.restarts_by_reason)
    if ended.in_pod_restarts:
        reasons[Reason.RESTARTED_IN_POD] = reasons.get(Reason.RESTARTED_IN_POD, 0) + ended.in_pod_restarts
    record = end_work(record, ended, details, posted)
    return dataclasses.replace(
        record,
        restarts=record.restarts + ended.in_pod_restarts,
        restarts_counted=record.restarts_counted + ended.in_pod_restarts,
        restarts_by_reason=reasons,
        save_seconds=longest(Metric.SAVE_SECONDS, record.save_seconds),
        step_seconds=longest(Metric.STEP_SECONDS, record.step_seconds),
    )


def _begin(attempt: Attempt, pods: Sequence[Pod]) -> Attempt:
    started = earliest_start(pods)
    nodes = tuple(dict.fromkeys(pod.node for pod in pods if pod.node))
    return dataclasses.replace(
        attempt, nodes=nodes or attempt.nodes, start_time=to_text(started) if started else attempt.start_time
    )


def _posted(view: View, attempt: Attempt) -> Mapping[str, float]:
    """Return the metrics that the attempt has posted."""
    progress = view.observed.progress
    return progress.report.metrics if progress is not None and progress.attempt == attempt.number else {}


def _metric(view: View, attempt: Attempt, name: Metric) -> int | None:
    value = _posted(view, attempt).get(name)
    return None if value is None else int(value)


def _last_checkpoint(view: View, attempt: Attempt) -> int:
    return _metric(view, attempt, Metric.LATEST_CHECKPOINT) or attempt.last_step


def _resumed_from(view: View, attempt: Attempt) -> int | None:
    found = _metric(view, attempt, Metric.RESUMED_FROM)
    return attempt.resumed_from_step if found is None else found


def suspend_attempt(view: View, attempt: Attempt, job: Job | None) -> WriteRecord:
    """Return the step that remembers that the attempt ended on request."""
    ended = _end(view, attempt, job, Reason.SUSPENDED, "suspended on request")
    record = _learn(view, ended, {})
    seconds = record.active_seconds + count_seconds(ended)
    return WriteRecord(
        dataclasses.replace(record, active_seconds=seconds),
        Situation("Suspended", Reason.SUSPENDED, "suspending: the pods save and stop", condition=""),
    )


def close_attempt(view: View, attempt: Attempt, job: Job | None, diagnosis: Diagnosis) -> WriteRecord:
    """Return the step that remembers a failed attempt, and what follows from it."""
    failure = diagnosis.failure
    ended = _end(view, attempt, job, failure.reason, failure.message)
    in_pod = int(diagnosis.details.get("in_pod_restarts") or ended.in_pod_restarts)
    verdict = judge_failure(diagnosis, view.plan.failure, view.record.restarts_counted + in_pod)
    resumed = diagnosis.resumed_from_step
    ended = dataclasses.replace(
        ended,
        exit_code=failure.exit_code,
        is_counted=verdict.is_counted,
        in_pod_restarts=in_pod,
        last_step=max(ended.last_step, diagnosis.last_step),
        resumed_from_step=ended.resumed_from_step if resumed is None else resumed,
    )
    record = _remember(view, ended, diagnosis)
    if verdict.gives_up:
        # Nothing comes after it: what it did beyond its newest checkpoint is lost.
        record = settle_work(record, ended.number + 1, ended.last_step)
        return write_failure(view, Phase.TRAIN, verdict.reason, verdict.message, record)
    excluded = record.excluded_nodes
    if verdict.excluded_node:
        excluded = exclude_node(excluded, verdict.excluded_node, failure.reason, view.now)
    reasons = dict(record.restarts_by_reason)
    reasons[failure.reason] = reasons.get(failure.reason, 0) + 1
    record = dataclasses.replace(
        record,
        restarts=record.restarts + 1,
        restarts_counted=record.restarts_counted + int(verdict.is_counted),
        restarts_by_reason=reasons,
        excluded_nodes=excluded,
    )
    return WriteRecord(record, _restarting(ended))


def _remember(view: View, ended: Attempt, diagnosis: Diagnosis) -> Record:
    before = max((each.last_step for each in view.record.attempts if each.number != ended.number), default=0)
    has_progress = ended.last_step > before
    record = dataclasses.replace(
        _learn(view, ended, diagnosis.details),
        last_failure=diagnosis.failure,
        failures_without_progress=0 if has_progress else view.record.failures_without_progress + 1,
        active_seconds=view.record.active_seconds + count_seconds(ended),
    )
    claim = view.observed.claim
    if diagnosis.is_storage_full and claim is not None:
        record = dataclasses.replace(record, storage_full_at=claim.capacity_bytes or claim.requested_bytes)
    return record


def _restarting(attempt: Attempt) -> Situation:
    return Situation(
        "Restarting",
        attempt.reason,
        f"attempt {attempt.number} ended ({attempt.reason}) and is followed by another: {attempt.message}",
        condition=Type.TRAINING,
    )


def _next_after_attempt(view: View, attempt: Attempt, job: Job | None) -> Step:
    situation = STARTING if attempt.reason in UNCOUNTED_ENDS else _restarting(attempt)
    if job is not None and not (job.is_succeeded or job.is_failed or job.is_deleting):
        return Remove((Reference.to_job(job.name, job.uid),), situation)
    remaining = [pod for pod in view.observed.training_pods(attempt.number) if _is_still_running(view, pod)]
    if remaining:
        message = f"waiting for pod {remaining[0].name} of attempt {attempt.number} to end"
        return Wait(dataclasses.replace(situation, message=message))
    if attempt.reason == PodReason.STORAGE_FULL and _is_still_full(view, attempt):
        return storage_full(view, attempt.message, situation)
    if attempt.reason not in UNCOUNTED_ENDS:
        due = next_start(view.record, attempt)
        if view.now < due:
            return Wait(situation, until=due)
    return start_attempt(view, view.record)


def _is_still_full(view: View, attempt: Attempt) -> bool:
    """Has the workspace not grown yet? Another change of the spec says that its user has made room."""
    claim = view.observed.claim
    if claim is None:
        return False
    size = claim.capacity_bytes or claim.requested_bytes
    is_growing = view.plan.workspace.size_bytes > size
    return size <= view.record.storage_full_at and (is_growing or attempt.digest == view.plan.digest)


def _is_still_running(view: View, pod: Pod) -> bool:
    if pod.is_over:
        return False
    if pod.deleting_since is None:
        return True
    # A node that does not answer has not told the pod to stop: no grace is under way there.
    grace = 0 if is_on_lost_node(pod) else pod.grace_seconds
    return view.seconds_since(pod.deleting_since) < grace + LOST_POD_SECONDS


def _next_while_running(view: View, attempt: Attempt, job: Job) -> Step:
    pods = view.observed.pods_of(job)
    running = [pod for pod in pods if pod.phase == "Running"]
    nodes = view.plan.run.topology.nodes
    deadline = view.plan.deadlines.startup
    if len(running) >= nodes:
        return _next_while_training(view, attempt, job, running)
    waited = view.seconds_since(job.created_at)
    waiting = wait_for_job(view, job, _describe_start(attempt, len(running), nodes))
    if waiting.situation.reason == Reason.UNSCHEDULABLE and waiting.situation.is_stalled and view.record.excluded_nodes:
        return _readmit_node(view, attempt, job)
    if deadline and waited >= deadline and not any(pod.is_over for pod in pods):
        message = (
            f"attempt {attempt.number}: {len(running)} of {nodes} pods ran after {int(waited)} s, where "
            f"startupDeadlineSeconds allows {deadline}: {waiting.situation.message}"
        )
        return write_failure(view, Phase.TRAIN, Reason.STARTUP_DEADLINE_EXCEEDED, message)
    if deadline and job.created_at is not None:
        due = job.created_at + datetime.timedelta(seconds=deadline)
        return dataclasses.replace(waiting, until=min(due, waiting.until or due))
    return waiting


def _readmit_node(view: View, attempt: Attempt, job: Job) -> WriteRecord:
    """Return the step that gives up an attempt which fits nowhere, and allows the next one the oldest excluded node."""
    oldest, *others = view.record.excluded_nodes
    message = f"without node {oldest.node}, which was avoided ({oldest.reason}), the pods fit nowhere: it is used again"
    ended = _end(view, attempt, job, Reason.UNSCHEDULABLE, message)
    record = dataclasses.replace(_learn(view, ended, {}), excluded_nodes=tuple(others))
    return WriteRecord(record, dataclasses.replace(STARTING, message=message))


def _describe_start(attempt: Attempt, num_running: int, nodes: int) -> Situation:
    text = f"attempt {attempt.number}: {num_running} of {nodes} training pods are running"
    return dataclasses.replace(STARTING, message=text)


def _next_while_training(view: View, attempt: Attempt, job: Job, pods: list[Pod]) -> Step:
    if not attempt.start_time:
        # A pod that is deleted by force leaves nothing behind: what is known of it is remembered while it is there.
        return WriteRecord(view.record.with_attempt(_begin(attempt, pods)), RUNNING)
    started = find_start(attempt.resumed_from_step, _posted(view, attempt))
    settled = view.record if started is None else settle_work(view.record, attempt.number, started)
    if settled != view.record:
        return WriteRecord(settled, RUNNING)
    deadline = view.plan.failure.progress_deadline_seconds
    situation = dataclasses.replace(RUNNING, message=f"attempt {attempt.number} is training")
    if not deadline:
        return Wait(situation)
    progress = view.observed.progress
    moved = progress.moved_at if progress is not None and progress.attempt == attempt.number else None
    times = [time for time in (moved, earliest_start(pods), view.observed.progress_since) if time is not None]
    since = max(times, default=view.now)
    limit = deadline + NO_REPORT_SECONDS
    if view.seconds_since(since) < limit:
        return Wait(situation, until=since + datetime.timedelta(seconds=limit))
    message = (
        f"Job {job.name} has reported no step for {limit} s, and its pods have not ended by themselves after "
        f"{deadline} s (failurePolicy.progressDeadlineSeconds)"
    )
    pod = pods[0]
    failure = Failure(to_text(view.now), PodReason.NO_PROGRESS, message, pod=pod.name, node=pod.node)
    return close_attempt(view, attempt, job, Diagnosis(failure, True, True, False))


def revive_attempt(view: View, record: Record) -> WriteRecord:
    """Return the step that takes a failed training up again: its settings have been changed."""
    return start_attempt(view, dataclasses.replace(record, failures_without_progress=0))


def has_ended_well(terminal: Terminal | None) -> bool:
    """Has the job succeeded?"""
    return terminal is not None and terminal.result == "Succeeded"
