"""What a pod tells the operator: progress while it runs, and a report when it exits.

Progress travels in the Kubeflow Trainer protocol (KEP-2779), which `transformers` also speaks. The exit report is the
container's termination message, at most 4096 bytes of JSON.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping
from typing import Any

MAX_TERMINATION_BYTES = 4096
"""Kubernetes cuts a termination message at this many bytes."""

LAST_LINES = "last_lines"
"""Entry of `ExitReport.details` that holds the last lines of a failing rank's output."""

_SHORT = 300
"""Characters that are always left of the last lines."""


class ExitCode(enum.IntEnum):
    """Exit codes of the trainer program, after sysexits.h where it has one."""

    OK = 0
    USER_CODE = 1
    """An exception that no class below names."""
    USAGE = 64
    """Wrong command line."""
    DATA = 65
    """The data set cannot be parsed, or is empty before or after filtering. Not retried."""
    NO_INPUT = 66
    """A model, data set or file does not exist. Not retried."""
    UNAVAILABLE = 69
    """A remote service did not answer in time. Retried."""
    INTERNAL = 70
    """A broken promise of our own, such as a promoted tensor that differs from its checkpoint."""
    STORAGE_FULL = 73
    """The workspace has no room. Retried after it has grown."""
    SUSPENDED = 75
    """Stopped on request after SIGTERM, state saved where it could be."""
    NO_PERMISSION = 77
    """Credentials are missing or refused. Not retried."""
    CONFIG = 78
    """Settings that cannot work. Not retried."""
    OUT_OF_MEMORY = 79
    """The accelerator ran out of memory. Not retried: the message says which batch to try."""
    FENCED = 80
    """A newer attempt owns the workspace."""
    XID = 81
    """An accelerator failed: Xid, uncorrectable ECC, fallen off the bus. Retried on another node."""
    COLLECTIVE = 82
    """NCCL failed, or a collective did not end in time. Retried."""
    NO_PROGRESS = 83
    """No step within failurePolicy.progressDeadlineSeconds. Retried."""
    HOST_OUT_OF_MEMORY = 84
    """The kernel killed a rank for memory. Not retried: the message says how much to ask for."""
    PEERS_LOST = 85
    """The ranks of another pod went away first. Retried."""


class Phase(enum.StrEnum):
    """Phases of a job that run as pods."""

    INSPECT = "inspect"
    PREPARE = "prepare"
    TRAIN = "train"
    PROMOTE = "promote"
    EVALUATE = "evaluate"
    PUBLISH = "publish"
    COMPOSE = "compose"
    SERVE = "serve"


class Reason(enum.StrEnum):
    """Why a phase ended; used in exit reports, and by the operator in conditions and events."""

    COMPLETED = "Completed"
    SUSPENDED = "Suspended"
    INVALID_CONFIG = "InvalidConfig"
    DATASET_NOT_FOUND = "DatasetNotFound"
    DATASET_EMPTY = "DatasetEmpty"
    DATASET_EMPTY_AFTER_FILTER = "DatasetEmptyAfterFilter"
    DATASET_INVALID = "DatasetInvalid"
    MODEL_NOT_FOUND = "ModelNotFound"
    MODEL_INVALID = "ModelInvalid"
    CREDENTIALS_REFUSED = "CredentialsRefused"
    SOURCE_UNAVAILABLE = "SourceUnavailable"
    STORAGE_FULL = "StorageFull"
    OUT_OF_MEMORY = "CUDAOutOfMemory"
    HOST_OUT_OF_MEMORY = "OutOfMemoryKilled"
    XID_ERROR = "XidError"
    NCCL_ERROR = "NCCLError"
    NCCL_TIMEOUT = "NCCLTimeout"
    NO_PROGRESS = "NoProgress"
    NON_FINITE_LOSS = "NonFiniteLoss"
    RANK_FAILED = "RankFailed"
    KILLED = "Killed"
    FENCED = "Fenced"
    CHECKPOINT_INVALID = "CheckpointInvalid"
    PROMOTION_INVALID = "PromotionInvalid"
    EVALUATION_FAILED = "EvaluationFailed"
    DESTINATION_UNAVAILABLE = "DestinationUnavailable"
    USER_CODE_ERROR = "UserCodeError"


@dataclasses.dataclass(frozen=True)
class ExitReport:
    """How one container ended. `details` holds the phase's results under the names listed below.

    inspect: model_bytes, model_parameters, model_type, model_revision, dataset_bytes, dataset_revisions (list),
        evaluated_bytes and judge_bytes (of evaluation.models and dataset.judge, where there are any).
    prepare: rows_read, rows_kept, rows_removed, rows_bad, rows_train, rows_holdout, tokens, removed_per_category (map),
        dataset_digest, report (path below the workspace), model_digest, model_revision.
    Of a failed train: last_lines (of the failing rank's output), failed_at (seconds since 1970), in_pod_restarts, and
        where each rank stood when none made a step: `stacks`, by rank, as `{"at", "waits"}`.
    train: step, total_steps, loss, resumed_from_step (or null), checkpoints (steps kept), latest_complete,
        best (or null), checkpoint_bytes and committed_at (RFC 3339) of the newest, save_seconds and step_seconds
        (0: none was measured), stall_seconds (of the newest save), in_pod_restarts, steps_lost and productive_seconds
        (as the metrics of these names; a failed training reports them, too, with the last step done), packing,
        examples_truncated, examples_dropped and real_token_share (as the metrics of these names), mirrored (newest
        step on the mirror, or null; absent without a mirror).
    promote: digest, path, checkpoint_step, parameters, bytes, report (path of the run report below the workspace).
    evaluate: scores (task -> metric -> number), baseline (same shape), report (as of promote). Held-out rows are the
        task `holdout` with the metrics loss (nats per answer token), perplexity, and unigram_entropy (nats per answer
        token, of the answers).
    publish: destinations (list of URLs with the digest appended), weight_diff (path below the workspace, bytes of the
        compressed difference, ratio to the bytes of the weights; absent without one).
    compose: digest (of the profile), model (folder that the adapter is served over, below the workspace), rank,
        largest_error, adapters (list of name, digest and weight), scores (as of evaluate, of the composition), drift
        (nats per answer token, by `base` and the adapters' names).
    """

    phase: str
    reason: str
    message: str
    """One line: what happened, where."""
    exit_code: int = 0
    hint: str = ""
    """What to do, in the words of the job's spec."""
    attempt: int = 0
    rank: int = -1
    """Rank that failed first; -1: none."""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_termination_message(self) -> str:
        """Return JSON of at most 4096 bytes; last lines are shortened first, then the message from its middle."""
        report = self
        while len(text := json.dumps(dataclasses.asdict(report), sort_keys=True)) > MAX_TERMINATION_BYTES:
            report = report._shorten(len(text) - MAX_TERMINATION_BYTES)
        return text

    def _shorten(self, surplus: int) -> ExitReport:
        """Return a report that is shorter by up to `surplus` characters, at the place where it hurts least."""
        lines = self.details.get(LAST_LINES)
        if isinstance(lines, str) and len(lines) > _SHORT:
            kept = lines[-max(_SHORT, len(lines) - surplus) :]
            return dataclasses.replace(self, details={**self.details, LAST_LINES: kept})
        keep = (len(self.message) - surplus - 8) // 2
        if keep >= 40:
            return dataclasses.replace(self, message=f"{self.message[:keep]} ... {self.message[-keep:]}")
        if self.details:
            return dataclasses.replace(self, details={})
        # One character may take twelve bytes: what is left is halved until it fits.
        half = len(self.message) // 2
        return dataclasses.replace(self, message=self.message[:half], hint=self.hint if half else self.hint[:300])

    @classmethod
    def from_termination_message(cls, text: str) -> ExitReport | None:
        """Parse a termination message; None when it is not one of ours."""
        try:
            data = json.loads(text)
            names = {field.name for field in dataclasses.fields(cls)}
            return cls(**{name: value for name, value in data.items() if name in names})
        except (ValueError, TypeError, AttributeError):
            return None


class Metric(enum.StrEnum):
    """Names of metrics in progress posts. `transformers` posts current_step, total_steps and what the loop logs."""

    STEP = "current_step"
    TOTAL_STEPS = "total_steps"
    EPOCH = "epoch"
    LOSS = "loss"
    LEARNING_RATE = "learning_rate"
    TOKENS_PER_SECOND = "tokens_per_second"
    RESUMED_FROM = "resumed_from_step"
    LATEST_CHECKPOINT = "latest_checkpoint_step"
    BEST_CHECKPOINT = "best_checkpoint_step"
    NUM_CHECKPOINTS = "num_checkpoints"
    CHECKPOINT_TIME = "checkpoint_timestamp_seconds"
    """When the newest complete checkpoint was committed, in seconds since 1970."""
    CHECKPOINT_BYTES = "checkpoint_bytes"
    CHECKPOINT_SECONDS = "checkpoint_seconds"
    MIRRORED_CHECKPOINT = "mirrored_checkpoint_step"
    """Newest complete checkpoint on the mirror."""
    MIRRORED_BYTES = "mirrored_bytes"
    MIRROR_FAILURES = "mirror_failures"
    """How long training stood still for the newest save."""
    SAVE_SECONDS = "save_seconds"
    """From the start of the newest save until it was committed."""
    STEP_SECONDS = "step_seconds"
    """Longest step so far."""
    IN_POD_RESTARTS = "in_pod_restarts"
    """How often the ranks were restarted inside their pod."""
    PRODUCTIVE_SECONDS = "productive_seconds"
    """Time in the optimizer steps that led to the present weights, over all attempts: what a restart loses goes off."""
    STEPS_LOST = "steps_lost"
    """Optimizer steps of this attempt that restarts inside its pod threw away."""
    PACKING = "packing"
    """1: examples share sequences; 0: they do not, as the job says; -1: the architecture does not allow it."""
    EXAMPLES_TRUNCATED = "examples_truncated"
    """Training examples that lost answer tokens at the maximum length."""
    EXAMPLES_DROPPED = "examples_dropped"
    """Training examples without an answer token within the maximum length."""
    REAL_TOKEN_SHARE = "real_token_share"
    """Share of the places of training sequences that hold tokens."""
    ROWS_READ = "rows_read"
    ROWS_REMOVED = "rows_removed"


@dataclasses.dataclass(frozen=True)
class ProgressReport:
    """One progress post."""

    percentage: int
    """0 to 100."""
    eta_seconds: int | None
    metrics: Mapping[str, float]
    updated_at: str
    """RFC 3339, UTC."""

    def to_body(self) -> dict[str, Any]:
        """Return the body of the POST, in the shape of KEP-2779: metric values are strings."""
        status: dict[str, Any] = {
            "progressPercentage": self.percentage,
            "metrics": [{"name": name, "value": repr(value)} for name, value in self.metrics.items()],
            "lastUpdatedTime": self.updated_at,
        }
        if self.eta_seconds is not None:
            status["estimatedRemainingSeconds"] = self.eta_seconds
        return {"trainerStatus": status}

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> ProgressReport:
        """Parse such a body. Raises ValueError that names the field at fault."""
        status = body.get("trainerStatus")
        if not isinstance(status, Mapping):
            raise ValueError("trainerStatus: missing")
        metrics: dict[str, float] = {}
        for entry in status.get("metrics") or ():
            try:
                metrics[str(entry["name"])] = float(entry["value"])
            except (TypeError, KeyError, ValueError):
                continue
        percentage = status.get("progressPercentage")
        if percentage is None:
            percentage = 0
        if not isinstance(percentage, int | float) or not 0 <= percentage <= 100:
            raise ValueError(f"trainerStatus.progressPercentage: expected 0 to 100, found {percentage!r}")
        eta = status.get("estimatedRemainingSeconds")
        return cls(
            percentage=int(percentage),
            eta_seconds=int(eta) if isinstance(eta, int | float) else None,
            metrics=metrics,
            updated_at=str(status.get("lastUpdatedTime") or ""),
        )
