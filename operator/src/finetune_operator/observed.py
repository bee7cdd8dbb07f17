"""What exists of one job right now: a frozen picture, sorted into named buckets.

`cluster.observe_job` fills it from whole Kubernetes objects with the `view_*` functions below; everything above reads
it. Pure: no calls, no decisions.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_contract.reports import ExitReport, Phase, ProgressReport

from . import naming
from .errors import redact
from .record import Record, to_time
from .sizing import to_number

Time = datetime.datetime
Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class PodCondition:
    """One condition of a pod."""

    status: str
    reason: str = ""
    message: str = ""
    since: Time | None = None


@dataclasses.dataclass(frozen=True)
class Exit:
    """How the pod's container ended."""

    code: int
    reason: str
    """Kubernetes' word: Error, OOMKilled, Completed."""
    message: str
    """The termination message when it is no report of ours: the log's last lines."""
    report: ExitReport | None
    finished_at: Time | None


@dataclasses.dataclass(frozen=True)
class Pod:
    """One pod of the job."""

    name: str
    uid: str = ""
    component: str = ""
    attempt: int = 0
    index: int = 0
    node: str = ""
    phase: str = "Pending"
    reason: str = ""
    """Reason of the pod itself, as in Evicted."""
    message: str = ""
    conditions: Mapping[str, PodCondition] = dataclasses.field(default_factory=dict)
    waiting_reason: str = ""
    waiting_message: str = ""
    exit: Exit | None = None
    created_at: Time | None = None
    started_at: Time | None = None
    deleting_since: Time | None = None
    """When it was asked to go."""
    grace_seconds: int = 0
    """How long it may take to stop."""
    owner_uid: str = ""
    version: str = ""
    """Version of the endpoint that it serves."""
    restarts: int = 0
    """How often its container was started again."""
    last_exit: Exit | None = None
    """How its container ended before it was started again."""

    @property
    def is_over(self) -> bool:
        """Has its container ended, whatever Kubernetes made of it yet?"""
        return self.exit is not None or self.phase in ("Failed", "Succeeded")

    def has(self, condition: str) -> bool:
        """Is the condition True?"""
        found = self.conditions.get(condition)
        return found is not None and found.status == "True"


@dataclasses.dataclass(frozen=True)
class Job:
    """One batch/v1 Job of the job."""

    name: str
    uid: str = ""
    component: str = ""
    attempt: int = 0
    is_suspended: bool = False
    is_succeeded: bool = False
    is_failed: bool = False
    failure_reason: str = ""
    failure_message: str = ""
    active: int = 0
    created_at: Time | None = None
    ended_at: Time | None = None
    is_deleting: bool = False
    source_digest: str = ""
    """Digest of the sources that an inspect Job reads."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """The PersistentVolumeClaim of the workspace."""

    name: str
    uid: str = ""
    phase: str = "Pending"
    capacity_bytes: int = 0
    requested_bytes: int = 0
    access_modes: tuple[str, ...] = ()
    storage_class: str = ""
    created_at: Time | None = None
    is_deleting: bool = False
    is_owned: bool = False
    """It goes with the job."""


@dataclasses.dataclass(frozen=True)
class Version:
    """The Deployment of one version of an endpoint."""

    label: str
    name: str = ""
    uid: str = ""
    digest: str = ""
    job: str = ""
    job_uid: str = ""
    """Job that made it, or took it up."""
    image: str = ""
    workspace: tuple[str, str] = ("", "")
    """Claim that its model lies on, and the folder below it."""
    replicas: int = 0
    """0: it takes no traffic and is kept to go back to."""
    ready_replicas: int = 0
    is_ready: bool = False
    """All replicas run what the Deployment says now, and answer."""
    created_at: Time | None = None
    is_deleting: bool = False


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """The Service of the endpoint, with what its live version says."""

    is_ours: bool = False
    """Some job of this operator made it."""
    holder: str = ""
    """Job that made it what it is."""
    holder_uid: str = ""
    digest: str = ""
    version: str = ""
    """Label of the version that takes the traffic."""
    previous: str = ""
    refused: str = ""
    switched_at: Time | None = None
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What the smoke prompt measured before the version took traffic."""
    is_ready: bool = False
    """All replicas of the live version answer."""
    ready_replicas: int = 0


@dataclasses.dataclass(frozen=True)
class Progress:
    """What the trainer posted last, and when it arrived."""

    report: ProgressReport
    received_at: Time
    eta_seconds: int | None
    moved_at: Time
    """When the step last changed."""
    attempt: int = 0


@dataclasses.dataclass(frozen=True)
class Observed:
    """Everything that exists of one job."""

    record: Record
    record_version: str = ""
    """resourceVersion of the record's ConfigMap; empty: there is none."""
    frozen_plan: str = ""
    jobs: tuple[Job, ...] = ()
    pods: tuple[Pod, ...] = ()
    serving_pods: tuple[Pod, ...] = ()
    """Pods of the endpoint, of every version."""
    claim: Claim | None = None
    endpoint: Endpoint | None = None
    versions: tuple[Version, ...] = ()
    """Every version of the endpoint, those of other jobs included."""
    storage_class_is_missing: bool = False
    warnings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Newest warning event by the UID of the object it is about."""
    progress: Progress | None = None
    progress_since: Time | None = None
    """Since when posts have been received by this process."""
    progress_ca: str = ""
    config_maps: tuple[str, ...] = ()
    other_children: tuple[tuple[str, str, str], ...] = ()
    """Further objects as (apiVersion, kind, name)."""
    is_deleting: bool = False
    has_finalizer: bool = False

    def job(self, name: str) -> Job | None:
        """The child Job with this name, if it exists."""
        return next((job for job in self.jobs if job.name == name), None)

    def version(self, label: str) -> Version | None:
        """The version of the endpoint with this label, if it exists."""
        return next((each for each in self.versions if each.label == label), None)

    def pods_of(self, job: Job) -> tuple[Pod, ...]:
        """Pods that the Job made."""
        return tuple(pod for pod in self.pods if pod.owner_uid == job.uid)

    def exits_of(self, job: Job) -> tuple[Exit, ...]:
        """How those of the Job's pods ended that have."""
        return tuple(pod.exit for pod in self.pods_of(job) if pod.exit is not None)

    def training_pods(self, attempt: int) -> tuple[Pod, ...]:
        """Pods of one attempt, also of a Job that is gone."""
        return tuple(
            sorted(
                (pod for pod in self.pods if pod.component == Phase.TRAIN and pod.attempt == attempt),
                key=lambda pod: pod.index,
            )
        )


def view_pod(item: Json) -> Pod:
    """Return what matters of a v1 Pod."""
    meta, spec, status = item["metadata"], item.get("spec", {}), item.get("status", {})
    labels, annotations = meta.get("labels") or {}, meta.get("annotations") or {}
    container = _own_container(status)
    waiting = container.get("state", {}).get("waiting") or {}
    owners: list[dict[str, Any]] = meta.get("ownerReferences") or [{}]
    return Pod(
        name=meta["name"],
        uid=meta.get("uid", ""),
        component=labels.get(naming.LABEL_COMPONENT, ""),
        attempt=int(labels.get(naming.LABEL_ATTEMPT) or 0),
        index=int(annotations.get("batch.kubernetes.io/job-completion-index") or 0),
        node=spec.get("nodeName", ""),
        phase=status.get("phase", "Pending"),
        reason=status.get("reason", ""),
        message=redact(status.get("message", "")),
        conditions={each["type"]: _view_condition(each) for each in status.get("conditions") or ()},
        waiting_reason=waiting.get("reason", ""),
        waiting_message=redact(waiting.get("message", "")),
        exit=_view_exit(container.get("state") or {}),
        created_at=to_time(meta.get("creationTimestamp") or ""),
        started_at=to_time(status.get("startTime") or ""),
        deleting_since=_view_deletion(meta),
        grace_seconds=int(spec.get("terminationGracePeriodSeconds") or 0),
        owner_uid=owners[0].get("uid", ""),
        version=labels.get(naming.LABEL_VERSION, naming.FIRST_VERSION),
        restarts=int(container.get("restartCount") or 0),
        last_exit=_view_exit(container.get("lastState") or {}),
    )


def _view_deletion(meta: Json) -> Time | None:
    """Return when a pod was asked to go: Kubernetes writes when it has to be gone."""
    due = to_time(meta.get("deletionTimestamp") or "")
    return due - datetime.timedelta(seconds=meta.get("deletionGracePeriodSeconds") or 0) if due else None


def _own_container(status: Json) -> Json:
    for container in status.get("containerStatuses") or ():
        if container.get("name") in (naming.CONTAINER, naming.SERVE_CONTAINER):
            return dict(container)
    return {}


def _view_condition(item: Json) -> PodCondition:
    return PodCondition(
        status=item.get("status", "Unknown"),
        reason=item.get("reason") or "",
        message=redact(item.get("message") or ""),
        since=to_time(item.get("lastTransitionTime") or ""),
    )


def _view_exit(state: Json) -> Exit | None:
    ended = state.get("terminated")
    if ended is None:
        return None
    text = redact(ended.get("message") or "")
    report = ExitReport.from_termination_message(text)
    return Exit(
        code=int(ended.get("exitCode", 0)),
        reason=ended.get("reason") or "",
        message="" if report else text.strip(),
        report=report,
        finished_at=to_time(ended.get("finishedAt") or ""),
    )


def view_job(item: Json) -> Job:
    """Return what matters of a batch/v1 Job."""
    meta, status = item["metadata"], item.get("status", {})
    labels = meta.get("labels") or {}
    conditions = {each["type"]: each for each in status.get("conditions") or () if each.get("status") == "True"}
    # FailureTarget comes before Failed: the pods are being ended then, and their reports are not all there yet.
    failed, done = conditions.get("Failed"), conditions.get("Complete")
    ended = (failed or done or {}).get("lastTransitionTime") or status.get("completionTime") or ""
    return Job(
        name=meta["name"],
        uid=meta.get("uid", ""),
        component=labels.get(naming.LABEL_COMPONENT, ""),
        attempt=int(labels.get(naming.LABEL_ATTEMPT) or 0),
        is_suspended=bool(item.get("spec", {}).get("suspend")),
        is_succeeded=done is not None,
        is_failed=failed is not None,
        failure_reason=(failed or {}).get("reason") or "",
        failure_message=(failed or {}).get("message") or "",
        active=int(status.get("active") or 0),
        created_at=to_time(meta.get("creationTimestamp") or ""),
        ended_at=to_time(ended),
        is_deleting=bool(meta.get("deletionTimestamp")),
        source_digest=(meta.get("annotations") or {}).get(naming.ANNOTATION_SOURCES, ""),
    )


def view_claim(item: Json) -> Claim:
    """Return what matters of a v1 PersistentVolumeClaim."""
    meta, spec, status = item["metadata"], item.get("spec", {}), item.get("status", {})
    return Claim(
        name=meta["name"],
        uid=meta.get("uid", ""),
        phase=status.get("phase", "Pending"),
        capacity_bytes=int(to_number((status.get("capacity") or {}).get("storage", 0))),
        requested_bytes=int(to_number(((spec.get("resources") or {}).get("requests") or {}).get("storage", 0))),
        access_modes=tuple(status.get("accessModes") or spec.get("accessModes") or ()),
        storage_class=spec.get("storageClassName") or "",
        created_at=to_time(meta.get("creationTimestamp") or ""),
        is_deleting=bool(meta.get("deletionTimestamp")),
        is_owned=bool(meta.get("ownerReferences")),
    )


def earliest_start(pods: Sequence[Pod]) -> Time | None:
    """Return when the first of the pods started; None when none has."""
    return min((pod.started_at for pod in pods if pod.started_at), default=None)
