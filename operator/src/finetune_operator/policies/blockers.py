"""What keeps pods from running, in words for their owner: images, secrets, room, volumes, refusals.

Called by `lifecycle` while a Job or the endpoint waits for its pods. Pure. Everything found here passes by itself as
soon as it is mended: the kubelet tries again.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Mapping, Sequence

from finetune_operator.conditions import Reason
from finetune_operator.observed import Claim, Pod
from finetune_operator.plan import Plan

IMAGE_REASONS = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
)
CONFIG_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
STALLED_AFTER_GRACES = 10
"""How many grace periods an unschedulable pod waits before a human is called: autoscalers need minutes."""
MOUNT_GRACE_SECONDS = 60.0
_MISSING_OBJECT = re.compile(r'(secret|configmap) "([^"]+)" not found')


@dataclasses.dataclass(frozen=True)
class Blocker:
    """One thing in the way."""

    reason: str
    message: str
    is_stalled: bool = True
    """A human must act."""
    is_scheduling: bool = False
    """The pod has no node yet."""


def find_pod_blocker(
    plan: Plan, pods: Sequence[Pod], warnings: Mapping[str, str], now: datetime.datetime
) -> Blocker | None:
    """Return what keeps the first blocked pod from running; None when nothing does."""
    for pod in pods:
        if pod.is_over or pod.deleting_since is not None:
            continue
        found = _find_waiting(plan, pod) or _find_unschedulable(plan, pod, now) or _find_unmounted(pod, warnings, now)
        if found is not None:
            return found
    return None


def _find_waiting(plan: Plan, pod: Pod) -> Blocker | None:
    if pod.waiting_reason in IMAGE_REASONS:
        return Blocker(
            Reason.IMAGE_PULL_FAILED,
            f"pod {pod.name}: {pod.waiting_reason}: {pod.waiting_message or 'the image cannot be pulled'}: check the "
            "image's name and pod.imagePullSecrets; the kubelet tries again by itself",
        )
    if pod.waiting_reason not in CONFIG_REASONS:
        return None
    missing = _MISSING_OBJECT.search(pod.waiting_message)
    if missing is not None:
        kind, name = missing.groups()
        return Blocker(
            Reason.SECRET_NOT_FOUND if kind == "secret" else Reason.CONTAINER_CONFIG_INVALID,
            f"pod {pod.name}: {kind} {name} does not exist in namespace {plan.namespace}: make it (kubectl -n "
            f"{plan.namespace} create {kind} {'generic ' if kind == 'secret' else ''}{name} ...), or name another "
            "one; the job goes on by itself",
        )
    return Blocker(
        Reason.CONTAINER_CONFIG_INVALID, f"pod {pod.name}: {pod.waiting_reason}: {pod.waiting_message or 'no message'}"
    )


def _find_unschedulable(plan: Plan, pod: Pod, now: datetime.datetime) -> Blocker | None:
    scheduled = pod.conditions.get("PodScheduled")
    if pod.node or scheduled is None or scheduled.status != "False" or scheduled.reason != "Unschedulable":
        return None
    since = scheduled.since or pod.created_at or now
    waited = (now - since).total_seconds()
    if waited < plan.unschedulable_seconds:
        return None
    return Blocker(
        Reason.UNSCHEDULABLE,
        f"pod {pod.name} fits on no node: {scheduled.message}: check resources, placement and pod.tolerations against "
        "the nodes (kubectl get nodes)",
        is_stalled=waited >= plan.unschedulable_seconds * STALLED_AFTER_GRACES,
        is_scheduling=True,
    )


def _find_unmounted(pod: Pod, warnings: Mapping[str, str], now: datetime.datetime) -> Blocker | None:
    warning = warnings.get(pod.uid)
    if warning is None or pod.phase != "Pending" or not pod.node or pod.waiting_reason not in ("", "ContainerCreating"):
        return None
    since = pod.started_at or pod.created_at or now
    if (now - since).total_seconds() < MOUNT_GRACE_SECONDS:
        return None
    return Blocker(Reason.VOLUME_NOT_MOUNTED, f"pod {pod.name} on node {pod.node} does not start: {warning}")


def find_job_blocker(warning: str, name: str) -> Blocker | None:
    """Return why a Job has no pods although it may: quotas, Pod Security, a missing service account."""
    if not warning:
        return None
    return Blocker(Reason.PODS_REFUSED, f"Job {name} cannot make pods: {warning}")


def find_claim_blocker(plan: Plan, claim: Claim, is_class_missing: bool, warning: str) -> Blocker | None:
    """Return what keeps the workspace from being bound; None while it is bound or only waits for a pod."""
    if claim.phase == "Bound":
        return None
    if claim.phase == "Lost":
        return Blocker(
            Reason.CLAIM_LOST,
            f"PersistentVolumeClaim {claim.name} has lost its volume: bring the volume back, or delete the claim "
            + ("to have the job resume from its mirror" if plan.run.checkpoint.mirror.destination else "and the job"),
        )
    name = plan.workspace.storage_class or claim.storage_class
    if is_class_missing and not plan.workspace.is_existing:
        return Blocker(
            Reason.STORAGE_CLASS_NOT_FOUND,
            f"workspace.storageClassName: there is no StorageClass {name}: see kubectl get storageclass, then delete "
            "this job and apply it with one of those",
        )
    if warning:
        return Blocker(Reason.CLAIM_PENDING, f"PersistentVolumeClaim {claim.name} is not bound: {warning}")
    return None
