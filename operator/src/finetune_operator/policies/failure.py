"""What a failed pod means: which pod failed first, why, and whether it failed at all or was taken away.

Called by `lifecycle` when a Job has failed. Pure; what is done about it is decided in `restart`.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_contract.reports import LAST_LINES, ExitCode, ExitReport
from finetune_contract.reports import Reason as PodReason
from finetune_contract.stacks import STACKS, choose_culprit, describe_stacks
from finetune_operator.conditions import Reason
from finetune_operator.observed import Job, Pod
from finetune_operator.record import Failure, to_text
from finetune_operator.sizing import to_number

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
        ExitCode.HOST_OUT_OF_MEMORY,
    }
)
"""Exit codes after which the same settings would only fail again."""
_CONSEQUENCES = {
    PodReason.NCCL_ERROR: 1,
    PodReason.NO_PROGRESS: 1,
    PodReason.NCCL_TIMEOUT: 2,
    PodReason.RANK_FAILED: 3,
}
"""What pods report when another one failed or hangs; of several pods the one with the lowest number began it."""
_SIGKILL, _SIGTERM = 137, 143
NUM_SHOWN_LINES = 3
SHOWN_CHARACTERS = 160
"""Last lines that go into a message, and the length of each."""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Why a Job failed."""

    failure: Failure
    is_counted: bool
    is_retried: bool
    is_storage_full: bool
    conditions: tuple[tuple[str, str], ...] = ()
    """Type and status of the failed pod's conditions, for the job's own rules."""
    lines: tuple[str, ...] = ()
    """What it said and its last lines of output, for rules on the log."""
    is_node_at_fault: bool = False
    last_step: int = 0
    resumed_from_step: int | None = None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the failed pod reported besides."""


def explain_failure(
    job: Job,
    pods: Sequence[Pod],
    now: datetime.datetime,
    *,
    num_pods: int = 1,
    memory: str = "",
    disruption: Failure | None = None,
) -> Diagnosis:
    """Return why a failed Job failed, told from the pod that failed first.

    `num_pods` is how many there were, `memory` what each was given, `disruption` what was seen of one that was being
    taken away.
    """
    pod = choose_first_failed(pods)
    reason = _report_reason(pod) if pod is not None else ""
    if pod is None or (reason == PodReason.RANK_FAILED and len({each.index for each in pods}) < num_pods):
        # A pod that vanished was deleted: one that failed stays until its Job goes.
        if disruption is not None and job.failure_reason != "DeadlineExceeded":
            return Diagnosis(disruption, disruption.reason not in NOT_COUNTED, True, False)
        reason = Reason.DEADLINE_EXCEEDED if job.failure_reason == "DeadlineExceeded" else Reason.POD_DELETED
        what = "a pod was deleted before it ended" if reason == Reason.POD_DELETED else "it ran too long"
        text = f"Job {job.name}: {what}" + (f" ({job.failure_message})" if job.failure_message else "")
        failure = Failure(to_text(job.ended_at or now), reason, text)
        return Diagnosis(failure, reason not in NOT_COUNTED, True, False)
    if reason == PodReason.NO_PROGRESS:
        return _explain_hang(pod, pods, now)
    diagnosis = explain_pod(pod, now)
    failure = diagnosis.failure
    if failure.reason == PodReason.HOST_OUT_OF_MEMORY and failure.hint == _hint(failure.reason) and memory:
        more = math.ceil(1.5 * to_number(memory) / 2**30)
        hint = f"raise resources.memory, which is {memory}, to {more}Gi"
        diagnosis = dataclasses.replace(diagnosis, failure=dataclasses.replace(failure, hint=hint))
    return diagnosis


def _explain_hang(pod: Pod, pods: Sequence[Pod], now: datetime.datetime) -> Diagnosis:
    """Tell the rank that holds up the others by the stacks of all pods: one pod knows its own ranks only."""
    stacks: dict[str, Any] = {}
    owners: dict[str, Pod] = {}
    for each in pods:
        report = each.exit.report if each.exit else None
        found = report.details.get(STACKS) if report else None
        if isinstance(found, Mapping):
            known = {str(rank): stack for rank, stack in found.items() if isinstance(stack, Mapping)}
            stacks |= known
            owners |= dict.fromkeys(known, each)
    culprit = choose_culprit(stacks)
    chosen = owners[culprit] if culprit is not None else pod
    diagnosis = explain_pod(chosen, now)
    if len({each.index for each in owners.values()}) < 2:
        return diagnosis
    message = f"{_place(chosen)}: over all pods: {describe_stacks(stacks)}"
    return dataclasses.replace(diagnosis, failure=dataclasses.replace(diagnosis.failure, message=message))


def choose_first_failed(pods: Sequence[Pod]) -> Pod | None:
    """Return the pod that failed first: one that was disrupted, then one whose error is its own, then by time.

    When one node goes, the ranks elsewhere fail too; theirs is the consequence. Kubernetes tells times to the second,
    reports to the millisecond.
    """
    failed = [pod for pod in pods if _has_failed(pod)]

    def order(pod: Pod) -> tuple[bool, bool, int, float, int]:
        code = pod.exit.code if pod.exit else 0
        was_stopped = code in (ExitCode.SUSPENDED, _SIGTERM)
        consequence = _CONSEQUENCES.get(_report_reason(pod), 0)  # type: ignore[call-overload]
        return (not pod.has("DisruptionTarget"), was_stopped, consequence, _ended_at(pod), pod.index)

    return min(failed, key=order, default=None)


def _ended_at(pod: Pod) -> float:
    report = pod.exit.report if pod.exit else None
    noted = report.details.get("failed_at") if report else None
    if isinstance(noted, int | float):
        return float(noted)
    ended = (pod.exit.finished_at if pod.exit else None) or pod.deleting_since
    return ended.timestamp() if ended else math.inf


def _report_reason(pod: Pod) -> str:
    report = pod.exit.report if pod.exit else None
    return report.reason if report else ""


def is_on_lost_node(pod: Pod) -> bool:
    """Was the pod given up because its node does not answer?

    The pods of such a node are unready. A pod that a taint drove off a node that answers stays ready while it saves.
    """
    disruption = pod.conditions.get("DisruptionTarget")
    is_given_up = disruption is not None and DISRUPTIONS.get(disruption.reason) == Reason.NODE_LOST
    return is_given_up and not pod.is_over and not pod.has("Ready")


def find_disruption(pods: Sequence[Pod], known: Failure | None, now: datetime.datetime) -> Failure | None:
    """Return what there is to say of a pod that is being taken away; `known`, what was said before, when nothing new.

    It may vanish at any moment, also before its Job has failed.
    """
    pod = choose_first_failed(pods)
    if pod is None or (pod.deleting_since is None and not pod.has("DisruptionTarget")):
        return known
    found = explain_pod(pod, now).failure
    return known if known is not None and dataclasses.replace(found, time=known.time) == known else found


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
    message = _message(pod, reason, own, report)
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
        is_retried=is_disrupted or (code not in NOT_RETRIED and reason != PodReason.HOST_OUT_OF_MEMORY),
        is_storage_full=code == ExitCode.STORAGE_FULL and not is_disrupted,
        conditions=tuple((kind, each.status) for kind, each in pod.conditions.items()),
        lines=_list_lines(own, ended.message if ended else "", report),
        is_node_at_fault=reason == PodReason.XID_ERROR,
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
        return PodReason.HOST_OUT_OF_MEMORY
    if ended.code == ExitCode.SUSPENDED or (pod.deleting_since and ended.code in (_SIGTERM, _SIGKILL)):
        return Reason.INTERRUPTED
    if ended.report is not None and ended.report.reason:
        return ended.report.reason
    return PodReason.KILLED if ended.code in (_SIGKILL, _SIGTERM) else PodReason.USER_CODE_ERROR


def _list_lines(own: str, message: str, report: ExitReport | None) -> tuple[str, ...]:
    texts = [own, message, str(report.details.get(LAST_LINES) or "") if report else ""]
    return tuple(dict.fromkeys(line.strip() for text in texts for line in text.splitlines() if line.strip()))


def _place(pod: Pod) -> str:
    """Return which pod it was, where, and its exit code."""
    where = f"pod {pod.name}" + (f" on node {pod.node}" if pod.node else "")
    return where + (f" (exit code {pod.exit.code})" if pod.exit else "")


def _message(pod: Pod, reason: str, own: str, report: ExitReport | None) -> str:
    disruption = pod.conditions.get("DisruptionTarget")
    text = own or pod.message or (disruption.message if disruption else "")
    if not text:
        text = {
            PodReason.HOST_OUT_OF_MEMORY: "the kernel killed it for using more memory than its limit",
            PodReason.KILLED: "its process was killed",
            Reason.POD_DELETED: "it was deleted",
            Reason.INTERRUPTED: "it was asked to stop",
        }.get(reason, "it failed and left no message")  # type: ignore[call-overload]
    elif report is None:
        # The kubelet's part of the log: its end says most.
        text = _show_lines(text.splitlines())
    elif report.rank >= 0 and own and f"rank {report.rank}" not in own:
        text = f"rank {report.rank}: {text}"
    shown = _show_lines(str(report.details.get(LAST_LINES) or "").splitlines(), said=text) if report and own else ""
    return f"{_place(pod)}: {text}" + (f"; last lines: {shown}" if shown else "")


def _show_lines(lines: Sequence[str], said: str = "") -> str:
    """Return the last lines in one, each shortened, without those that have been said."""
    kept = [line.strip()[:SHOWN_CHARACTERS] for line in lines if line.strip() and line.strip() not in said]
    return " | ".join(kept[-NUM_SHOWN_LINES:])


def _hint(reason: str) -> str:
    if reason == PodReason.HOST_OUT_OF_MEMORY:
        return "raise resources.memory, or the memory limit in the phase's pod.resources"
    if reason == PodReason.KILLED:
        return "see the node's events and kernel log; a restart resumes from the last complete checkpoint"
    return ""
