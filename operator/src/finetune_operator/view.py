"""What every stage of the lifecycle looks at, and the few steps that all of them end in. Pure; used by `lifecycle`."""

from __future__ import annotations

import dataclasses
import datetime

from .conditions import Reason, Type
from .observed import Job, Observed, Pod, earliest_start
from .plan import Plan
from .policies.blockers import Blocker, find_job_blocker, find_pod_blocker
from .record import Failure, Record, Terminal, to_text
from .steps import Situation, Wait, WriteRecord

PODS_GRACE_SECONDS = 5.0
"""How long a Job may have no pods before a warning about it counts."""


@dataclasses.dataclass(frozen=True)
class View:
    """One job at one moment."""

    plan: Plan
    observed: Observed
    now: datetime.datetime

    @property
    def record(self) -> Record:
        """What is remembered of the job."""
        return self.observed.record

    def seconds_since(self, time: datetime.datetime | None) -> float:
        """Seconds from a time to now; 0 when there is none."""
        return (self.now - time).total_seconds() if time else 0.0

    def active_seconds(self) -> float:
        """Time with pods so far, over all attempts and phases."""
        running = (self._pod_seconds(job) for job in self.observed.jobs if not (job.is_succeeded or job.is_failed))
        return self.record.active_seconds + sum(running)

    def _pod_seconds(self, job: Job) -> float:
        return max(0.0, self.seconds_since(earliest_start(self.observed.pods_of(job))))

    def ended_seconds(self, job: Job | None) -> float:
        """Time that the pods of a Job that has ended were there."""
        if job is None:
            return 0.0
        start = earliest_start(self.observed.pods_of(job))
        return max(0.0, ((job.ended_at or self.now) - start).total_seconds()) if start else 0.0


def write_failure(view: View, phase: str, reason: str, message: str, record: Record | None = None) -> WriteRecord:
    """Return the step that ends the job as failed."""
    terminal = Terminal("Failed", reason, message, to_text(view.now), phase, view.plan.digest)
    record = dataclasses.replace(record or view.record, terminal=terminal)
    if record.last_failure is None:
        record = dataclasses.replace(record, last_failure=Failure(to_text(view.now), reason, message))
    return WriteRecord(record, Situation("Failed", reason, message, is_stalled=True))


def wait_for_job(view: View, job: Job, running: Situation) -> Wait:
    """Return the wait for a Job that has not ended, with what is in its way if anything is."""
    if job.is_deleting:
        return Wait(dataclasses.replace(running, reason=Reason.WAITING_FOR_PODS, message=f"Job {job.name} is going"))
    if job.is_suspended:
        queue = next(iter(view.plan.placement.queue_labels.values()), "")
        text = f"Job {job.name} waits in queue {queue}" if queue else f"Job {job.name} is suspended"
        return Wait(Situation("Queued", Reason.QUEUED, text, condition=Type.SCHEDULED))
    pods = [pod for pod in view.observed.pods_of(job) if not pod.is_over]
    blocker = find_pod_blocker(view.plan, pods, view.observed.warnings, view.now)
    if not pods and view.seconds_since(job.created_at) >= PODS_GRACE_SECONDS:
        blocker = find_job_blocker(view.observed.warnings.get(job.uid, ""), job.name)
    if blocker is not None:
        return Wait(block(running, blocker))
    return Wait(running, until=next_look(view, pods))


def block(running: Situation, blocker: Blocker) -> Situation:
    """Return the situation of a phase that something is in the way of."""
    return Situation(
        running.state,
        blocker.reason,
        blocker.message,
        is_stalled=blocker.is_stalled,
        condition=Type.SCHEDULED if blocker.is_scheduling else running.condition,
    )


def next_look(view: View, pods: list[Pod]) -> datetime.datetime | None:
    """Return when a pod that has no node will have waited long enough to say so."""
    waiting = [pod.created_at for pod in pods if not pod.node and pod.created_at]
    if not waiting:
        return None
    due = min(waiting) + datetime.timedelta(seconds=view.plan.unschedulable_seconds)
    return due if due > view.now else None
