"""Where and how a job runs: resources, placement, workspace, checkpoints, what happens after a failure."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_operator.api.base import Model, Rule
from finetune_operator.api.pods import QuantityMap, SecretRef
from finetune_operator.api.scalars import LogPattern, Name, Quantity, RelativePath, S3Url, VolumeSize

KeyText = Annotated[str, Field(min_length=1, max_length=317)]

Seconds = Annotated[int, Field(ge=1, le=31536000)]


class Resources(Model):
    """What one attempt runs on. CPU, memory and devices are per node."""

    nodes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Pods of an attempt, each on its own node."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 1
    """GPUs of each pod; 0 trains on CPUs."""
    processes_per_node: Annotated[int, Field(ge=1, le=64)] | None = None
    """Training processes in each pod; by default one per GPU, or 1 without GPUs."""
    gpu_resource_name: KeyText | None = None
    """Extended resource that counts GPUs; by default the administrators', usually nvidia.com/gpu."""
    cpu: Quantity | None = None
    """CPUs of each pod, as in 8 or 500m."""
    memory: Quantity | None = None
    """Memory of each pod, as in 64Gi. Not set: what saving needs is asked for, without a limit."""
    shared_memory: Quantity | None = None
    """Size of /dev/shm in each pod, which counts towards its memory."""
    extended: QuantityMap = {}
    """Further devices of each pod, as in rdma/hca: 1."""

    validations = (
        Rule(
            "!has(self.processesPerNode) || self.gpusPerNode == 0 || self.processesPerNode <= self.gpusPerNode",
            "a process needs a GPU of its own: set processesPerNode to at most gpusPerNode, or remove it",
            lambda resources: (
                resources.processes_per_node is None
                or resources.gpus_per_node == 0
                or resources.processes_per_node <= resources.gpus_per_node
            ),
            field="processesPerNode",
        ),
    )


class Placement(Model):
    """Which nodes the pods run on, and in which queue they wait."""

    preset: Literal["aks-a100", "aks-a100-spot", "gke-a100", "eks-a100"] | None = None
    """Node labels and tolerations of a known A100 node pool; spec.pod is merged over them."""
    zones: Annotated[list[Annotated[str, Field(min_length=1, max_length=63)]], Field(max_length=16)] = []
    """Zones (topology.kubernetes.io/zone) the pods may run in."""
    topology_key: KeyText | None = None
    """Node label whose value all pods of an attempt share, so that they are near each other."""
    queue_name: Name | None = None
    """Kueue LocalQueue that admits the Jobs."""
    workload_priority_class_name: Name | None = None
    """Kueue WorkloadPriorityClass of the Jobs."""


class WorkspaceRetention(Model):
    """When the workspace's volume is removed. A volume that the job did not make is never removed."""

    when_finished: Literal["Retain", "Delete"] = "Retain"
    """What happens when the job has finished."""
    when_deleted: Literal["Retain", "Delete"] = "Retain"
    """What happens when the job is deleted."""


class Workspace(Model):
    """The volume that every pod of the job mounts at /workspace."""

    size: VolumeSize = "auto"
    """Size of the volume, as in 1Ti; `auto` computes it from model, data and the checkpoints kept."""
    storage_class_name: Name | None = None
    """StorageClass of the volume; by default the administrators', or the cluster's default."""
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany"] | None = None
    """By default ReadWriteOnce on one node and ReadWriteMany on several."""
    existing_claim: Name | None = None
    """PersistentVolumeClaim to use instead of making one."""
    sub_path: RelativePath | None = None
    """Folder of the volume that is the job's; by default its root, or the job's name on an existing claim."""
    retention_policy: WorkspaceRetention = WorkspaceRetention()
    """When the volume is removed."""

    validations = (
        Rule(
            "!(has(self.existingClaim) && has(self.storageClassName))",
            "an existing claim has its storage class already: remove storageClassName or existingClaim",
            lambda workspace: workspace.existing_claim is None or workspace.storage_class_name is None,
            field="storageClassName",
        ),
        Rule(
            "!has(self.existingClaim) || (self.retentionPolicy.whenFinished == 'Retain'"
            " && self.retentionPolicy.whenDeleted == 'Retain')",
            "an existing claim is never removed: set whenFinished and whenDeleted to Retain, or remove existingClaim",
            lambda workspace: (
                workspace.existing_claim is None
                or workspace.retention_policy.when_finished == workspace.retention_policy.when_deleted == "Retain"
            ),
            field="retentionPolicy",
        ),
    )


class BestCheckpoints(Model):
    """Checkpoints that are kept because they score best."""

    count: Annotated[int, Field(ge=0, le=100)] = 0
    """How many are kept."""
    metric: Annotated[str, Field(min_length=1, max_length=128)] = "eval_loss"
    """Metric that ranks them, as the training loop logs it."""
    mode: Literal["min", "max"] = "min"
    """Whether a low or a high value is better."""


class CheckpointRetention(Model):
    """Which checkpoints are kept."""

    latest: Annotated[int, Field(ge=1, le=100)] = 3
    """How many of the newest are kept."""
    best: BestCheckpoints = BestCheckpoints()
    """Which of the best are kept besides."""


class Mirror(Model):
    """A copy of the checkpoints in object storage, from which a job goes on after its workspace is lost."""

    destination: S3Url
    """Bucket and prefix, as in s3://bucket/checkpoints; the job writes below it under its namespace and name."""
    secret_ref: SecretRef | None = None
    """Secret with credentials for the bucket."""


class Checkpoint(Model):
    """When checkpoints are written, which are kept and which is resumed from."""

    every_steps: Annotated[int, Field(ge=1, le=1000000)] | None = None
    """Optimizer steps between checkpoints; 800 by default."""
    every_minutes: Annotated[int, Field(ge=1, le=10080)] | None = None
    """Minutes between checkpoints, instead of steps."""
    retention: CheckpointRetention = CheckpointRetention()
    """Which checkpoints are kept."""
    resume: Literal["LatestComplete", "Never"] = "LatestComplete"
    """What an attempt starts from: the newest complete checkpoint, or always the base model."""
    mirror: Mirror | None = None
    """Where committed checkpoints are copied to while training goes on."""

    validations = (
        Rule(
            "!has(self.mirror) || self.resume != 'Never'",
            "with resume: Never nothing is ever read from a mirror: remove mirror, or write resume: LatestComplete",
            lambda checkpoint: checkpoint.mirror is None or checkpoint.resume != "Never",
            field="mirror",
        ),
        Rule(
            "!(has(self.everySteps) && has(self.everyMinutes))",
            "write either everySteps or everyMinutes, not both",
            lambda checkpoint: checkpoint.every_steps is None or checkpoint.every_minutes is None,
            field="everyMinutes",
        ),
    )


class ExitCodes(Model):
    """Exit codes of the trainer's container."""

    operator: Literal["In", "NotIn"] = "In"
    """Whether the code is one of the values, or none of them."""
    values: Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=1, max_length=255)]
    """The codes."""


class PodConditionPattern(Model):
    """A condition of the failed pod."""

    type: KeyText
    """Type of the condition, as in DisruptionTarget."""
    status: Literal["True", "False", "Unknown"] = "True"
    """Its status."""


class FailureRule(Model):
    """What to do after a failure of a certain kind."""

    name: Annotated[str, Field(min_length=1, max_length=63)]
    """Name of the rule, shown in events and metrics."""
    on_exit_codes: ExitCodes | None = None
    """Applies to these exit codes."""
    on_pod_conditions: Annotated[list[PodConditionPattern], Field(max_length=20)] = []
    """Applies when the failed pod has one of these conditions."""
    on_log_pattern: LogPattern | None = None
    """Applies when one of the last lines of the failing rank matches this regular expression (RE2)."""
    action: Literal["RestartJob", "RestartJobIgnoreLimit", "FailJob", "ExcludeNode"]
    """RestartJob counts towards maxRestarts, RestartJobIgnoreLimit does not, FailJob ends the job, ExcludeNode restarts
    and keeps the job off the failed pod's node for a day."""

    validations = (
        Rule(
            "(has(self.onExitCodes) ? 1 : 0) + (has(self.onPodConditions) && size(self.onPodConditions) > 0 ? 1 : 0)"
            " + (has(self.onLogPattern) ? 1 : 0) == 1",
            "write exactly one of onExitCodes, onPodConditions and onLogPattern",
            lambda rule: (
                sum((rule.on_exit_codes is not None, bool(rule.on_pod_conditions), rule.on_log_pattern is not None))
                == 1
            ),
        ),
    )


class FailurePolicy(Model):
    """What happens after a failure."""

    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 5
    """Restarts from the last complete checkpoint before the job fails."""
    progress_deadline_seconds: Seconds | None = None
    """Restart an attempt whose ranks stand still for so long after the first step; by default never."""
    rules: Annotated[list[FailureRule], Field(max_length=20)] = []
    """Rules for certain failures; the first that applies wins, and every other failure restarts."""
