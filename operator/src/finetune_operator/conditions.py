"""Types, reasons and transitions of conditions. Reasons are words that programs rely on: documented, never free text.

Pure; used by `lifecycle`, `policies` and `status`.
"""

from __future__ import annotations

import datetime
import enum
from collections.abc import Mapping, Sequence

from .api.v1alpha1 import Condition


class Type(enum.StrEnum):
    """Conditions of a job, in the order in which they are listed."""

    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    VALIDATED = "Validated"
    STORAGE_READY = "StorageReady"
    MODEL_READY = "ModelReady"
    DATASET_READY = "DatasetReady"
    SCHEDULED = "Scheduled"
    TRAINING = "Training"
    PROMOTED = "Promoted"
    EVALUATED = "Evaluated"
    DEPLOYED = "Deployed"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FINISHED = "Finished"


class Reason(enum.StrEnum):
    """Reasons that the operator gives, besides those of exit reports (`finetune_contract.reports.Reason`)."""

    ACCEPTED = "Accepted"
    NOT_STARTED = "NotStarted"
    IN_PROGRESS = "InProgress"
    COMPLETED = "Completed"
    DISABLED = "Disabled"
    INVALID_SPEC = "InvalidSpec"
    GLOBAL_BATCH_NOT_KEPT = "GlobalBatchNotKept"
    NOT_ALLOWED = "NotAllowed"
    PLAN_UNREADABLE = "PlanUnreadable"
    INSPECTING = "Inspecting"
    WORKSPACE_TOO_SMALL = "WorkspaceTooSmall"
    CLAIM_NOT_FOUND = "ClaimNotFound"
    CLAIM_PENDING = "ClaimPending"
    CLAIM_LOST = "ClaimLost"
    WORKSPACE_LOST = "WorkspaceLost"
    INPUTS_CHANGED = "InputsChanged"
    CLAIM_TERMINATING = "ClaimTerminating"
    ACCESS_MODE_UNSUITABLE = "AccessModeUnsuitable"
    STORAGE_CLASS_NOT_FOUND = "StorageClassNotFound"
    PREPARING = "Preparing"
    QUEUED = "Queued"
    SCHEDULING = "Scheduling"
    UNSCHEDULABLE = "Unschedulable"
    STARTING = "Starting"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    SECRET_NOT_FOUND = "SecretNotFound"
    CONTAINER_CONFIG_INVALID = "ContainerConfigInvalid"
    VOLUME_NOT_MOUNTED = "VolumeNotMounted"
    PODS_REFUSED = "PodsRefused"
    RUNNING = "Running"
    WAITING_FOR_PODS = "WaitingForPods"
    SUSPENDED = "Suspended"
    PREEMPTED = "Preempted"
    EVICTED = "Evicted"
    NODE_LOST = "NodeLost"
    JOB_DELETED = "JobDeleted"
    POD_DELETED = "PodDeleted"
    INTERRUPTED = "Interrupted"
    RESTARTED_IN_POD = "RestartedInPod"
    RESTARTS_EXHAUSTED = "RestartsExhausted"
    FAILED_BY_RULE = "FailedByRule"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    REPORT_MISSING = "ReportMissing"
    STARTUP_DEADLINE_EXCEEDED = "StartupDeadlineExceeded"
    PROMOTING = "Promoting"
    EVALUATING = "Evaluating"
    PUBLISHING = "Publishing"
    COMPOSING = "Composing"
    EVALUATION_BELOW_GATE = "EvaluationBelowGate"
    SCORE_MISSING = "ScoreMissing"
    DEPLOYING = "Deploying"
    SERVING = "Serving"
    ENDPOINT_TAKEN = "EndpointTaken"
    ENDPOINT_UNHEALTHY = "EndpointUnhealthy"
    SMOKE_PROMPT_FAILED = "SmokePromptFailed"
    MODEL_TOO_LARGE = "ModelTooLarge"
    VERSION_REFUSED = "VersionRefused"
    TAKEN_OVER = "TakenOver"
    SUCCEEDED = "Succeeded"
    DELETING = "Deleting"
    NAME_IN_USE = "NameInUse"
    OBJECT_REFUSED = "ObjectRefused"


def build_conditions(
    wanted: Mapping[Type, tuple[str, str, str]], previous: Sequence[Condition], generation: int, now: datetime.datetime
) -> list[Condition]:
    """Return the conditions (status, reason, message by type); one whose status stays keeps its transition time."""
    old = {each.type: each for each in previous}
    result = []
    for kind, (status, reason, message) in wanted.items():
        before = old.get(kind)
        since = before.last_transition_time if before is not None and before.status == status else now
        result.append(
            Condition.model_validate(
                {
                    "type": kind.value,
                    "status": status,
                    "reason": str(reason),
                    "message": message,
                    "last_transition_time": since,
                    "observed_generation": generation,
                }
            )
        )
    return result
