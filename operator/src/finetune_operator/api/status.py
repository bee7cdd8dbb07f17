"""What the operator reports in `status`. Written by the operator only; nothing here is read back as input."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_operator.api.base import StatusModel
from finetune_operator.api.scalars import StatusMessage, StatusText, Timestamp

State = Literal[
    "Pending",
    "Preparing",
    "Queued",
    "Training",
    "Restarting",
    "Suspended",
    "Promoting",
    "Evaluating",
    "Deploying",
    "Succeeded",
    "Failed",
]

Count = Annotated[int, Field(ge=0, le=2**62)]
Seconds = Annotated[float, Field(ge=0, le=2**40)]
Scores = Annotated[dict[str, Annotated[dict[str, float], Field(max_length=64)]], Field(max_length=128)]


class Condition(StatusModel):
    """One condition, in the shape all Kubernetes objects have."""

    type: Annotated[str, Field(min_length=1, max_length=317)]
    """Ready, Reconciling, Stalled, Finished, Succeeded, Validated, StorageReady, ModelReady, DatasetReady, Scheduled,
    Training, Promoted, Evaluated, Deployed or Suspended."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: Annotated[str, Field(min_length=1, max_length=256)]
    """Why, in one word that programs may rely on."""
    message: StatusMessage = ""
    """What happened, where, and what to do."""
    last_transition_time: Timestamp
    """When the status of the condition last changed."""
    observed_generation: Count | None = None
    """Generation of the job that the condition was set for."""


def _summarise(data: dict[str, Any]) -> str | None:
    percentage = data.get("percentage")
    return None if percentage is None else f"{percentage}%"


def _format_eta(data: dict[str, Any]) -> str | None:
    seconds = data.get("eta_seconds")
    if seconds is None:
        return None
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes}m"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


class Progress(StatusModel):
    """How far training is."""

    percentage: Annotated[int, Field(ge=0, le=100)] | None = None
    """Share of the steps that are done."""
    step: Count | None = None
    """Optimizer steps done."""
    total_steps: Count | None = None
    """Optimizer steps of the whole training."""
    epoch: float | None = None
    """Passes over the data done."""
    loss: float | None = None
    """Training loss, last logged."""
    tokens_per_second: float | None = None
    """Tokens trained on per second, all processes together."""
    eta_seconds: Count | None = None
    """Estimated time to the end of training."""
    updated_at: Timestamp | None = None
    """When the trainer last reported."""
    goodput: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the allocated time that was productive, over all attempts: productiveSeconds / allocatedSeconds."""
    productive_seconds: Count | None = None
    """Time in the optimizer steps that led to the present weights, over all attempts. Steps that a restart threw away,
    saves, evaluations, starts and the loading of models are not in it."""
    allocated_seconds: Count | None = None
    """Time with training pods, over all attempts, up to the last report."""
    steps_lost: Count | None = None
    """Optimizer steps that restarts threw away, over all attempts."""
    seconds_lost: Count | None = None
    """The time of those steps."""
    summary: Annotated[str, Field(max_length=64)] | None = Field(default_factory=_summarise)
    """The percentage for display; filled in from `percentage`."""
    eta: Annotated[str, Field(max_length=64)] | None = Field(default_factory=_format_eta)
    """The estimated time for display; filled in from `etaSeconds`."""


class Attempt(StatusModel):
    """One attempt at training."""

    number: Count
    """Number of the attempt, from 1."""
    job: StatusText
    """Job of the attempt."""
    nodes: Annotated[list[StatusText], Field(max_length=1024)] = []
    """Nodes its pods ran on."""
    start_time: Timestamp | None = None
    """When its first pod started."""
    end_time: Timestamp | None = None
    """When it ended."""
    resumed_from_step: Count | None = None
    """Step of the checkpoint it resumed from; absent when it started from the base model."""
    steps_lost: Count | None = None
    """Optimizer steps that were thrown away by restarts inside its pod and by the one that followed it: the last step
    done less the step that the next attempt resumed from. Complete once that attempt has started."""
    seconds_lost: Count | None = None
    """The time of those steps."""
    save_seconds: Seconds | None = None
    """Time from the start of its newest save until the checkpoint was committed."""
    reason: StatusText = ""
    """Why it ended."""


class ExcludedNode(StatusModel):
    """A node that the job avoids."""

    name: StatusText
    """Name of the node."""
    reason: StatusText = ""
    """Why it is avoided."""
    until: Timestamp | None = None
    """When it may be used again."""


class LastFailure(StatusModel):
    """The last failure."""

    time: Timestamp
    """When it was seen."""
    pod: StatusText = ""
    """Pod that failed first."""
    node: StatusText = ""
    """Node it ran on."""
    exit_code: int | None = None
    """Exit code of its container."""
    reason: StatusText
    """Why, in one word."""
    message: StatusMessage = ""
    """What happened: the last lines of the first failing rank."""
    hint: StatusText = ""
    """What to do, in the words of the job's spec."""


class Resolved(StatusModel):
    """What the job's words meant when it started."""

    model_revision: StatusText | None = None
    """Commit or digest of the base model."""
    dataset_digest: StatusText | None = None
    """Digest of the prepared data set."""
    images: Annotated[dict[str, StatusText], Field(max_length=8)] = {}
    """Image per phase."""
    plan_config_map: StatusText | None = None
    """ConfigMap that holds the frozen plan."""


class DatasetStatus(StatusModel):
    """What preparing the data did, and what training makes of it."""

    rows_read: Count | None = None
    """Rows read from the sources."""
    rows_kept: Count | None = None
    """Rows kept, held-out rows included."""
    rows_removed: Count | None = None
    """Rows removed by the filter."""
    tokens: Count | None = None
    """Tokens of the kept rows."""
    report: StatusText | None = None
    """Path of the report below /workspace."""
    packing: Literal["Packed", "Padded", "Refused"] | None = None
    """Whether training puts several examples into one sequence; Refused: the job wants it, and the architecture of the
    model would let the examples see each other."""
    examples_truncated: Count | None = None
    """Training examples that lost answer tokens at training.maxLength."""
    examples_dropped: Count | None = None
    """Training examples that are left out: no answer token fits training.maxLength."""
    real_token_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the training sequences that is not padding; where they are not packed, as if all were as long as the
    longest."""


class CheckpointStatus(StatusModel):
    """Checkpoints on the workspace."""

    latest_complete: Count | None = None
    """Step of the newest complete checkpoint."""
    time: Timestamp | None = None
    """When the newest complete checkpoint was committed."""
    bytes: Count | None = None
    """Its size."""
    save_seconds: Seconds | None = None
    """Time from the start of the newest save until the checkpoint was committed."""
    stall_seconds: Seconds | None = None
    """How long training stood still for that save."""
    best: Count | None = None
    """Step of the best checkpoint."""
    resumed_from: Count | None = None
    """Step that the newest attempt resumed from."""
    count: Count | None = None
    """Complete checkpoints kept."""
    mirrored: Count | None = None
    """Step of the newest complete checkpoint on the mirror: what a job would resume from without its workspace."""


class GateStatus(StatusModel):
    """What one gate says of the scores, as the gates are now."""

    task: Annotated[str, Field(max_length=512)]
    """Task of the gate."""
    metric: Annotated[str, Field(max_length=128)]
    """Metric of the gate."""
    verdict: Literal["Passed", "Failed", "ScoreMissing"]
    """Whether the score is good enough; ScoreMissing: there is none."""
    score: float | None = None
    """Score of the promoted model."""
    baseline: float | None = None
    """Score of the base model."""
    min: float | None = None
    """The score has to be at least this."""
    max: float | None = None
    """The score has to be at most this."""
    max_regression: float | None = None
    """The score may be worse than the base model's by at most this."""


class EvaluationStatus(StatusModel):
    """Scores."""

    scores: Scores = {}
    """Scores of the promoted model: task, metric, value."""
    baseline: Scores = {}
    """Scores of the base model."""
    gate: Literal["Passed", "Failed"] | None = None
    """Whether all gates, as they are now, are passed. A model that is served when a gate is raised stays served."""
    gates: Annotated[list[GateStatus], Field(max_length=32)] = []
    """Each gate's verdict."""


class WeightDiffStatus(StatusModel):
    """The difference of the promoted model from its base."""

    path: StatusText | None = None
    """Path below /workspace."""
    bytes: Count | None = None
    """Size of the compressed difference."""
    ratio: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """Its size by that of the promoted weights."""


class PromotionStatus(StatusModel):
    """The promoted model."""

    path: StatusText | None = None
    """Path of the model below /workspace."""
    digest: StatusText | None = None
    """Its digest, which is also its version."""
    report: StatusText | None = None
    """Path of the run report below /workspace: a page, with JSON and a model card beside it; also beside the model."""
    destinations: Annotated[list[Annotated[str, Field(max_length=2304)]], Field(max_length=8)] = []
    """Places it was copied to."""
    weight_diff: WeightDiffStatus | None = None
    """The difference from its base, where promotion.weightDiff asks for one."""


class ServingStatus(StatusModel):
    """The endpoint."""

    ready: bool = False
    """Whether it answers."""
    url: StatusText | None = None
    """URL inside the cluster."""
    model: StatusText | None = None
    """Name to put into requests as `model`."""
    version: StatusText | None = None
    """What it serves, as spec.inference.version takes it: the model's digest, with adapters also their profile's."""
    digest: StatusText | None = None
    """Digest of the model that it serves."""
    profile: StatusText | None = None
    """Digest of the profile of the adapters that it serves over the model."""
    adapters: Annotated[list[StatusText], Field(max_length=9)] = []
    """Names of these adapters; `own` is that of a LoRA job."""
    time_to_first_token_seconds: Seconds | None = None
    """Time from a request to the first token of its answer, as the smoke prompt measured it before this version took
    traffic."""
    tokens_per_second: Annotated[float, Field(ge=0, le=2**40)] | None = None
    """Tokens a second of that one answer."""


class FineTuneJobStatus(StatusModel):
    """What the operator knows about the job. The conditions are the truth; `state` is for display."""

    observed_generation: Count | None = None
    """Generation of the spec that this status describes."""
    state: State | None = None
    """One word for display."""
    conditions: Annotated[
        list[Condition],
        Field(
            max_length=32, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
        ),
    ] = []
    """What holds of the job."""
    start_time: Timestamp | None = None
    """When the job started; from then on what it is cannot change."""
    completion_time: Timestamp | None = None
    """When the job finished."""
    progress: Progress | None = None
    """How far training is."""
    attempts: Annotated[list[Attempt], Field(max_length=10)] = []
    """The last ten attempts."""
    restarts: Count | None = None
    """Restarts so far."""
    restarts_count_towards_max: Count | None = None
    """Those that count towards failurePolicy.maxRestarts."""
    excluded_nodes: Annotated[list[ExcludedNode], Field(max_length=64)] = []
    """Nodes that the job avoids."""
    last_failure: LastFailure | None = None
    """The last failure."""
    resolved: Resolved | None = None
    """What the job's words meant when it started."""
    dataset: DatasetStatus | None = None
    """What preparing the data did."""
    checkpoints: CheckpointStatus | None = None
    """Checkpoints on the workspace."""
    evaluation: EvaluationStatus | None = None
    """Scores."""
    promotion: PromotionStatus | None = None
    """The promoted model."""
    serving: ServingStatus | None = None
    """The endpoint."""
