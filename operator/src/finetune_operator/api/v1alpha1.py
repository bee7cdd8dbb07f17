"""FineTuneJob in version v1alpha1: the spec and status of one job, from instruction data to a served model.

The field docstrings are the CRD's descriptions. The operator parses with `parse_job`; `crd.py` generates the CRD. The
nested models live in the modules imported here, by subject; import them from this module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from finetune_operator.api.base import Model, Rule, StatusModel, explain_problems
from finetune_operator.api.inputs import (
    BaseModelSource,
    Dataset,
    DatasetFields,
    DatasetFilter,
    DatasetSource,
)
from finetune_operator.api.outputs import Autoscaling, Destination, Evaluation, Gate, Inference, Prepare, Promotion
from finetune_operator.api.pods import EnvFrom, EnvVar, ObjectRef, PodResources, PodTemplate, SecretRef, Toleration
from finetune_operator.api.running import (
    BestCheckpoints,
    Checkpoint,
    CheckpointRetention,
    FailurePolicy,
    FailureRule,
    Mirror,
    Placement,
    Resources,
    Workspace,
    WorkspaceRetention,
)
from finetune_operator.api.scalars import Timestamp
from finetune_operator.api.status import (
    Attempt,
    CheckpointStatus,
    Condition,
    DatasetStatus,
    EvaluationStatus,
    ExcludedNode,
    FineTuneJobStatus,
    LastFailure,
    Progress,
    PromotionStatus,
    Resolved,
    ServingStatus,
    State,
)
from finetune_operator.api.training import Deepspeed, Lora, Mlflow, Tracking, Training, Wandb, is_fp16

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"

_JOB_NAME = re.compile("[a-z]([-a-z0-9]{0,43}[a-z0-9])?")

Seconds = Annotated[int, Field(ge=1, le=31536000)]


class InvalidManifestError(ValueError):
    """The object is not a valid FineTuneJob; `problems` holds one line per field at fault."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def _fits_workspace(spec: FineTuneJobSpec) -> bool:
    return spec.resources.nodes == 1 or spec.workspace.access_mode != "ReadWriteOnce"


def _has_gpus_for_fp16(spec: FineTuneJobSpec) -> bool:
    return spec.resources.gpus_per_node > 0 or not is_fp16(spec.training)


def _keeps_workspace_for_endpoint(spec: FineTuneJobSpec) -> bool:
    retention = spec.workspace.retention_policy
    if not spec.inference.enabled or spec.inference.load_from == "S3":
        return True
    keeps_after_delete = spec.inference.on_delete == "Delete" or retention.when_deleted == "Retain"
    return retention.when_finished == "Retain" and keeps_after_delete


def _has_rows_for_gates(spec: FineTuneJobSpec) -> bool:
    return spec.dataset.holdout_fraction > 0 or not any(gate.task == "holdout" for gate in spec.evaluation.gates)


def _has_tasks_for_contamination(spec: FineTuneJobSpec) -> bool:
    quality = spec.dataset.quality
    return quality is None or quality.contamination is None or bool(spec.evaluation.tasks)


def _can_measure_adapters(spec: FineTuneJobSpec) -> bool:
    has_rows = spec.evaluation.holdout and spec.dataset.holdout_fraction > 0
    return not spec.inference.adapters or has_rows or bool(spec.evaluation.tasks) or spec.evaluation.refusals


def _has_adapter_to_publish(spec: FineTuneJobSpec) -> bool:
    return spec.training.method == "lora" or all(each.content == "Model" for each in spec.promotion.destinations)


def find_copy_to_serve(spec: FineTuneJobSpec) -> int | None:
    """Return which of the destinations servers load the model from; None: from the workspace, or there is none."""
    if spec.inference.load_from != "S3":
        return None
    listed = enumerate(spec.promotion.destinations)
    copies = (index for index, each in listed if each.content == "Model" and each.destination.startswith("s3://"))
    return next(copies, None)


class FineTuneJobSpec(Model):
    """What the user asks for."""

    model: BaseModelSource
    """The base model."""
    dataset: Dataset
    """The instruction data."""
    training: Training = Training()
    """How the model is trained."""
    resources: Resources = Resources()
    """What one attempt runs on."""
    placement: Placement = Placement()
    """Which nodes the pods run on, and in which queue they wait."""
    workspace: Workspace = Workspace()
    """The volume that every pod of the job mounts at /workspace."""
    checkpoint: Checkpoint = Checkpoint()
    """When checkpoints are written, which are kept and which is resumed from."""
    failure_policy: FailurePolicy = FailurePolicy()
    """What happens after a failure."""
    evaluation: Evaluation = Evaluation()
    """How the promoted model is scored."""
    promotion: Promotion = Promotion()
    """Where the promoted model goes, besides /workspace/output."""
    inference: Inference = Inference()
    """The OpenAI-compatible endpoint that serves the promoted model."""
    prepare: Prepare = Prepare()
    """How the data is prepared."""
    pod: PodTemplate | None = None
    """Settings of every pod of the job; each phase's own `pod` is merged over them."""
    suspend: bool = False
    """Stop and save the job and release its pods; false again resumes it from the last complete checkpoint."""
    active_deadline_seconds: Seconds | None = None
    """Time with pods, over all attempts, after which the job fails; by default none."""
    startup_deadline_seconds: Seconds | None = None
    """Time an attempt may wait for its pods to run before it fails; by default none."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=31536000)] | None = None
    """Time after which the pods of a finished job are removed; its model stays served. By default they stay."""

    validations = (
        Rule(
            "self.resources.nodes == 1 || !has(self.workspace.accessMode)"
            " || self.workspace.accessMode != 'ReadWriteOnce'",
            "several nodes cannot share a ReadWriteOnce workspace: set accessMode: ReadWriteMany or nodes: 1",
            _fits_workspace,
            field="workspace.accessMode",
        ),
        Rule(
            "self.resources.gpusPerNode > 0 || (has(self.training.precision) ? self.training.precision != 'fp16'"
            " : self.training.recipe != 'wizardlm-freeform')",
            "fp16 needs GPUs: set precision: bf16",
            _has_gpus_for_fp16,
            field="training.precision",
        ),
        Rule(
            "!self.inference.enabled || self.inference.loadFrom == 'S3'"
            " || (self.workspace.retentionPolicy.whenFinished == 'Retain'"
            " && (self.inference.onDelete == 'Delete' || self.workspace.retentionPolicy.whenDeleted == 'Retain'))",
            "the endpoint serves from the workspace: set whenFinished: Retain (and whenDeleted: Retain with onDelete:"
            " Retain), inference.loadFrom: S3, or inference.enabled: false",
            _keeps_workspace_for_endpoint,
            field="workspace.retentionPolicy",
        ),
        Rule(
            "self.dataset.holdoutFraction > 0.0 || !has(self.evaluation.gates)"
            " || !self.evaluation.gates.exists(gate, gate.task == 'holdout')",
            "a gate needs held-out rows: set holdoutFraction above 0, or remove the gate on holdout",
            _has_rows_for_gates,
            field="dataset.holdoutFraction",
        ),
        Rule(
            "!has(self.dataset.quality) || !has(self.dataset.quality.contamination)"
            " || (has(self.evaluation.tasks) && size(self.evaluation.tasks) > 0)",
            "contamination is looked for with the texts of evaluation.tasks: name a task there, or leave this out",
            _has_tasks_for_contamination,
            field="dataset.quality.contamination",
        ),
        Rule(
            "!has(self.inference.adapters) || size(self.inference.adapters) == 0"
            " || (has(self.evaluation.tasks) && size(self.evaluation.tasks) > 0) || self.evaluation.refusals"
            " || (self.evaluation.holdout && self.dataset.holdoutFraction > 0.0)",
            "a composition is measured before it is served: set evaluation.holdout with a holdoutFraction above 0, or "
            "name evaluation.tasks",
            _can_measure_adapters,
            field="inference.adapters",
        ),
        Rule(
            "self.training.method == 'lora' || !has(self.promotion.destinations)"
            " || self.promotion.destinations.all(each, each.content == 'Model')",
            "with training.method: full there is no adapter to publish: write content: Model, or training.method: lora",
            _has_adapter_to_publish,
            field="promotion.destinations",
        ),
        Rule(
            "self.inference.loadFrom != 'S3' || (has(self.promotion.destinations)"
            " && self.promotion.destinations.exists(each, each.content == 'Model' && each.destination.startsWith('s3://')))",
            "loadFrom: S3 needs a copy of the model there: add one with destination: s3://BUCKET/PREFIX to "
            "promotion.destinations",
            lambda spec: spec.inference.load_from != "S3" or find_copy_to_serve(spec) is not None,
            field="inference.loadFrom",
        ),
    )


class ObjectMeta(StatusModel):
    """The metadata that the operator reads."""

    name: str
    namespace: str = "default"
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    finalizers: list[str] = []
    creation_timestamp: Timestamp | None = None
    deletion_timestamp: Timestamp | None = None


class FineTuneJob(StatusModel):
    """One job, from instruction data to a served model."""

    api_version: Literal["finetune.dev/v1alpha1"] = "finetune.dev/v1alpha1"
    """finetune.dev/v1alpha1"""
    kind: Literal["FineTuneJob"] = "FineTuneJob"
    """FineTuneJob"""
    metadata: ObjectMeta
    """Name, namespace and the rest of the object's metadata."""
    spec: FineTuneJobSpec
    """What the user asks for."""
    status: FineTuneJobStatus = FineTuneJobStatus()
    """What the operator knows about the job."""

    validations = (
        Rule(
            "self.metadata.name.matches('^[a-z]([-a-z0-9]{0,43}[a-z0-9])?$')",
            "metadata.name: use at most 45 lower-case letters, digits and '-', starting with a letter: the names of"
            " pods and Services are made from it",
            lambda job: _JOB_NAME.fullmatch(job.metadata.name) is not None,
        ),
    )


FROZEN_FIELDS = (
    *(f"model.{name}" for name in ("source", "revision")),
    *(
        f"dataset.{name}"
        for name in (
            *("source", "sources", "revision", "format", "fields", "promptTemplate", "filter"),
            *("quality", "holdoutFraction", "maxBadRows", "seed"),
        )
    ),
    *(
        f"training.{name}"
        for name in (
            *("recipe", "method", "epochs", "maxSteps", "maxLength", "learningRate", "warmupSteps", "scheduler"),
            *("precision", "packing", "seed", "lora"),
        )
    ),
    *(f"workspace.{name}" for name in ("storageClassName", "accessMode", "existingClaim", "subPath")),
)
"""Fields below spec that cannot change once the job has started: they decide what it is."""


def parse_job(body: Mapping[str, Any]) -> FineTuneJob:
    """Parse an object as the API server returns it. Raises InvalidManifestError with one line per field at fault."""
    try:
        return FineTuneJob.model_validate(dict(body), by_alias=True, by_name=False)
    except pydantic.ValidationError as error:
        raise InvalidManifestError(explain_problems(error, FineTuneJob)) from error


__all__ = [
    "API_VERSION",
    "FROZEN_FIELDS",
    "GROUP",
    "KIND",
    "PLURAL",
    "VERSION",
    "Attempt",
    "Autoscaling",
    "BaseModelSource",
    "BestCheckpoints",
    "Checkpoint",
    "CheckpointRetention",
    "CheckpointStatus",
    "Condition",
    "Dataset",
    "DatasetFields",
    "DatasetFilter",
    "DatasetSource",
    "DatasetStatus",
    "Deepspeed",
    "Destination",
    "EnvFrom",
    "EnvVar",
    "Evaluation",
    "EvaluationStatus",
    "ExcludedNode",
    "FailurePolicy",
    "FailureRule",
    "FineTuneJob",
    "FineTuneJobSpec",
    "FineTuneJobStatus",
    "Gate",
    "Inference",
    "InvalidManifestError",
    "LastFailure",
    "Lora",
    "Mirror",
    "Mlflow",
    "ObjectMeta",
    "ObjectRef",
    "Placement",
    "PodResources",
    "PodTemplate",
    "Prepare",
    "Progress",
    "Promotion",
    "PromotionStatus",
    "Resolved",
    "Resources",
    "SecretRef",
    "ServingStatus",
    "State",
    "Toleration",
    "Tracking",
    "Training",
    "Wandb",
    "Workspace",
    "WorkspaceRetention",
    "parse_job",
]
