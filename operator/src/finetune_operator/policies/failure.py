"""What a failed pod means: which pod failed first, why, and whether it failed at all or was taken away.

Called by `lifecycle` when a Job has failed. Pure; what is done about it is decided in `restart`.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_contract.reports import ExitCode
from finetune_contract.reports import Reason as PodReason
from finetune_operator.conditions import Reason
from finetune_operator.observed import Job, Pod
from finetune_operator.record import Failure, to_text

DISRUPTIONS = {
    "PreemptionByScheduler": Reason.PREEMPTED,
    "DeletionByTaintManager": Reason.NODE_LOST,
    "DeletionByPodGC": Reason.NODE_LOST,
    "EvictionByEvictionAPI": Reason.EVICTED,
    "TerminationByKubelet": Reason.EVICTED,
}
"""Reasons of the pod condition DisruptionTarget."""
NOT_COUNTED = frozenset(
    {*DISRUPTIONS.values(), Reason.JOB_DELETED, Reason.POD_DELETED, Reason.INTERRUPTED, PodReason.FENCED}
)
"""The pod did nothing wrong: the restart does not use up failurePolicy.maxRestarts."""
NOT_RETRIED = frozenset(
    {
        ExitCode.USAGE,
        ExitCode.DATA,
        ExitCode.NO_INPUT,
        ExitCode.INTERNAL,
        ExitCode.NO_PERMISSION,
        ExitCode.CONFIG,
        ExitCode.OUT_OF_MEMORY,
    }
)
"""Exit codes after which the same settings would only fail again."""
_SIGKILL, _SIGTERM = 137, 143


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Why a Job failed."""

    failure: Failure
    is_counted: bool
    is_retried: bool
    is_storage_full: bool
    conditions: tuple[tuple[str, str], ...] = ()
    """Type and status of the failed pod's conditions, for the job's own rules."""
    log: str = ""
    last_step: int = 0
    resumed_from_step: int | None = None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the failed pod reported besides."""


def explain_failure(job: Job, pods: Sequence[Pod], now: datetime.datetime) -> Diagnosis:
    """Return why a failed Job failed, told from the pod that failed first."""
    pod = choose_first_failed(pods)
    if pod is None:
        # A pod that vanished was deleted: one that failed stays until its Job goes.
        reason = Reason.DEADLINE_EXCEEDED if job.failure_reason == "DeadlineExceeded" else Reason.POD_DELETED
        what = "a pod was deleted before it ended" if reason == Reason.POD_DELETED else "it ran too long"
        text = f"Job {job.name}: {what}" + (f" ({job.failure_message})" if job.failure_message else "")
        failure = Failure(to_text(job.ended_at or now), reason, text)
        return Diagnosis(failure, reason not in NOT_COUNTED, True, False)
    return explain_pod(pod, now)


def choose_first_failed(pods: Sequence[Pod]) -> Pod | None:
    """Return the pod that failed first: one that was disrupted, then by time, a report of its own before none.

    When one node goes, the ranks elsewhere fail too; theirs is the consequence.
    """
    failed = [pod for pod in pods if _has_failed(pod)]
    far = datetime.datetime.max.replace(tzinfo=datetime.UTC)

    def order(pod: Pod) -> tuple[bool, bool, datetime.datetime, int]:
        ended = (pod.exit.finished_at if pod.exit else None) or pod.deleting_since or far
        code = pod.exit.code if pod.exit else 0
        return (not pod.has("DisruptionTarget"), code in (ExitCode.SUSPENDED, _SIGTERM), ended, pod.index)

    return min(failed, key=order, default=None)


def is_on_lost_node(pod: Pod) -> bool:
    """Was the pod given up because its node does not answer?"""
    disruption = pod.conditions.get("DisruptionTarget")
    return disruption is not None and DISRUPTIONS.get(disruption.reason) == Reason.NODE_LOST


def _has_failed(pod: Pod) -> bool:
    if pod.exit is not None:
        return pod.exit.code != 0
    return pod.phase == "Failed" or pod.has("DisruptionTarget") or pod.deleting_since is not None


def explain_pod(pod: Pod, now: datetime.datetime) -> Diagnosis:
    """Return why one pod failed."""
    ended = pod.exit
    report = ended.report if ended else None
    code = ended.code if ended else 0
    reason = _reason(pod)
    is_disrupted = reason in NOT_COUNTED
    own = (
        report.message if report and not (is_disrupted and code in (_SIGKILL, 0)) else (ended.message if ended else "")
    )
    message = _message(pod, reason, own)
    failure = Failure(
        time=to_text((ended.finished_at if ended else None) or now),
        reason=reason,
        message=message,
        hint=(report.hint if report else "") or _hint(reason),
        pod=pod.name,
        node=pod.node,
        exit_code=code,
    )
    details = report.details if report else {}
    resumed = details.get("resumed_from_step")
    return Diagnosis(
        failure=failure,
        is_counted=not is_disrupted,
        is_retried=is_disrupted or code not in NOT_RETRIED,
        is_storage_full=code == ExitCode.STORAGE_FULL and not is_disrupted,
        conditions=tuple((kind, each.status) for kind, each in pod.conditions.items()),
        log=own,
        last_step=int(details.get("latest_complete") or 0),
        resumed_from_step=int(resumed) if resumed is not None else None,
        details=details,
    )


def _reason(pod: Pod) -> str:
    disruption = pod.conditions.get("DisruptionTarget")
    if disruption is not None and disruption.status == "True":
        return DISRUPTIONS.get(disruption.reason, Reason.EVICTED)
    if pod.reason in ("Evicted", "Preempting"):
        return Reason.EVICTED if pod.reason == "Evicted" else Reason.PREEMPTED
    if pod.reason in ("NodeLost", "NodeShutdown", "Terminated"):
        return Reason.NODE_LOST
    ended = pod.exit
    if ended is None:
        return Reason.POD_DELETED
    if ended.reason == "OOMKilled":
        return Reason.HOST_OUT_OF_MEMORY
    if ended.code == ExitCode.SUSPENDED or (pod.deleting_since and ended.code in (_SIGTERM, _SIGKILL)):
        return Reason.INTERRUPTED
    if ended.report is not None and ended.report.reason:
        return ended.report.reason
    return PodReason.KILLED if ended.code in (_SIGKILL, _SIGTERM) else PodReason.USER_CODE_ERROR


def _message(pod: Pod, reason: str, own: str) -> str:
    where = f"pod {pod.name}" + (f" on node {pod.node}" if pod.node else "")
    disruption = pod.conditions.get("DisruptionTarget")
    text = own or pod.message or (disruption.message if disruption else "")
    if not text:
        text = {
            Reason.HOST_OUT_OF_MEMORY: "the kernel killed it for using more memory than its limit",
            PodReason.KILLED: "its process was killed",
            Reason.POD_DELETED: "it was deleted",
            Reason.INTERRUPTED: "it was asked to stop",
        }.get(reason, "it failed and left no message")  # type: ignore[call-overload]
    code = f" (exit code {pod.exit.code})" if pod.exit else ""
    return f"{where}{code}: {text}"


def _hint(reason: str) -> str:
    if reason == Reason.HOST_OUT_OF_MEMORY:
        return "raise resources.memory, or the memory limit in the phase's pod.resources"
    if reason == PodReason.KILLED:
        return "see the node's events and kernel log; a restart resumes from the last complete checkpoint"
    return ""
