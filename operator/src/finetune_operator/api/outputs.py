"""What comes out of a job: scores, the promoted model and its copies, the endpoint."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_operator.api.adapters import ADAPTER_RULES, Adapter, Composition
from finetune_operator.api.base import Model, Rule
from finetune_operator.api.pods import PodTemplate, SecretRef
from finetune_operator.api.scalars import DestinationUrl, DnsLabel, Revision, SourceUrl

TaskName = Annotated[str, Field(min_length=1, max_length=512)]

OPEN_LLM_V1 = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2")
"""Tasks of the group open-llm-v1; mmlu has parts of its own."""


class Gate(Model):
    """A score that the model must reach before it is uploaded and served."""

    task: TaskName
    """Task that is scored; `holdout` for the held-out rows, `refusals` for the rates of refusals."""
    metric: Annotated[str, Field(min_length=1, max_length=128)]
    """Metric of the task, as in acc_norm; for holdout: loss or perplexity; for refusals: refusal_rate, hedging_rate,
    over_refusal_rate or over_hedging_rate."""
    min: Annotated[float, Field(ge=-1e9, le=1e9)] | None = None
    """The score must be at least this."""
    max: Annotated[float, Field(ge=-1e9, le=1e9)] | None = None
    """The score must be at most this."""
    max_regression: Annotated[float, Field(ge=0, le=1e9)] | None = None
    """The score may be worse than the base model's by at most this: lower, or for losses, perplexities and rates of
    refusals higher."""

    validations = (
        Rule(
            "[has(self.min), has(self.max), has(self.maxRegression)].exists_one(written, written)",
            "write exactly one of min, max and maxRegression",
            lambda gate: [gate.min, gate.max, gate.max_regression].count(None) == 2,
        ),
    )


class EvaluatedModel(Model):
    """A further model that is scored beside the promoted one and its base."""

    name: DnsLabel
    """What it is called in the reports."""
    source: SourceUrl
    """Folder in Hugging Face layout: hf://organisation/name, s3://bucket/prefix, pvc://path on the workspace, or
    https:// of a tar archive."""
    revision: Revision | None = None
    """Branch, tag or commit of a hub repository; the newest by default."""
    secret_ref: SecretRef | None = None
    """Secret with credentials for the source; by default the pod's identity is used."""

    validations = (
        Rule(
            "!(self.name in ['tuned', 'base'])",
            "tuned and base are the job's own models: write another name",
            lambda model: model.name not in ("tuned", "base"),
            field="name",
        ),
    )


def _are_gates_scored(evaluation: Evaluation) -> bool:
    """Is there a task that may bring each gate's score? What lm-eval's own groups hold is known to lm-eval alone."""
    if any(task != "open-llm-v1" for task in evaluation.tasks):
        return True
    known = ("holdout", "refusals", *(OPEN_LLM_V1 if evaluation.tasks else ()))
    return all(
        gate.task in known or (bool(evaluation.tasks) and gate.task.startswith("mmlu_")) for gate in evaluation.gates
    )


class Evaluation(Model):
    """How the promoted model is scored."""

    tasks: Annotated[list[TaskName], Field(max_length=32)] = []
    """lm-eval tasks by name, the group open-llm-v1, or task files (YAML) with their data beside them: on the workspace
    as in pvc://tasks/own.yaml, or s3://bucket/tasks/own.yaml, whose whole folder is fetched."""
    holdout: bool = True
    """Score the held-out rows: loss and perplexity."""
    baseline: bool = True
    """Score the base model beside the promoted one."""
    refusals: bool = False
    """Score how often the model refuses or hedges: requests on sensitive matters that may be answered, and harmless
    ones that only sound dangerous. The scores are the task `refusals`."""
    models: Annotated[list[EvaluatedModel], Field(max_length=8)] = []
    """Further models to score beside the promoted one and its base."""
    secret_ref: SecretRef | None = None
    """Secret with credentials for task files on s3://."""
    limit: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Examples per task; by default all."""
    gates: Annotated[list[Gate], Field(max_length=32)] = []
    """Scores that must be reached before the model is uploaded and served."""
    pod: PodTemplate | None = None
    """Settings of the evaluation pod, merged over spec.pod."""

    validations = (
        Rule(
            "self.baseline || !has(self.gates) || !self.gates.exists(gate, has(gate.maxRegression))",
            "maxRegression compares with the base model: set baseline: true, or write min",
            lambda evaluation: (
                evaluation.baseline or not any(gate.max_regression is not None for gate in evaluation.gates)
            ),
            field="baseline",
        ),
        Rule(
            "self.holdout || !has(self.gates) || !self.gates.exists(gate, gate.task == 'holdout')",
            "a gate needs the held-out rows: set holdout: true, or remove the gate",
            lambda evaluation: evaluation.holdout or not any(gate.task == "holdout" for gate in evaluation.gates),
            field="holdout",
        ),
        Rule(
            "self.refusals || !has(self.gates) || !self.gates.exists(gate, gate.task == 'refusals')",
            "a gate needs the rates of refusals: set refusals: true, or remove the gate",
            lambda evaluation: evaluation.refusals or not any(gate.task == "refusals" for gate in evaluation.gates),
            field="refusals",
        ),
        Rule(
            "!has(self.gates) || (has(self.tasks) && self.tasks.exists(task, task != 'open-llm-v1'))"
            " || self.gates.all(gate, gate.task in ['holdout', 'refusals'] || (has(self.tasks) && size(self.tasks) > 0"
            " && (gate.task in ['arc_challenge', 'hellaswag', 'mmlu', 'truthfulqa_mc2']"
            " || gate.task.startsWith('mmlu_'))))",
            "a gate names a task that is not scored: add the task to tasks, or name holdout, refusals or one of tasks",
            _are_gates_scored,
            field="gates",
        ),
        Rule(
            "!has(self.models) || self.models.all(model, self.models.exists_one(other, other.name == model.name))",
            "two models have one name: give each its own",
            lambda evaluation: len({model.name for model in evaluation.models}) == len(evaluation.models),
            field="models",
        ),
    )


class Destination(Model):
    """A place that the promoted model, or its adapter, is copied to, below a folder named by the digest of that."""

    destination: DestinationUrl
    """s3://bucket/prefix, pvc://path on the workspace, or hf://organisation/name."""
    content: Literal["Model", "Adapter"] = "Model"
    """Model: all of it, ready to serve. Adapter: with training.method lora the LoRA adapter alone, which is small and
    needs the base model."""
    secret_ref: SecretRef | None = None
    """Secret with credentials for the destination."""


class WeightDiff(Model):
    """The promoted model as the difference from its base, exact to the bit."""

    enabled: bool = False
    """Whether it is made, after the gates, at /workspace/weight-diffs/<digest>, and copied with the model."""


def _has_repositories_of_its_own(promotion: Promotion) -> bool:
    """Is no hub repository named for a model and for an adapter?"""
    listed = [each for each in promotion.destinations if each.destination.startswith("hf://")]
    models, adapters = ({each.destination for each in listed if each.content == kind} for kind in ("Model", "Adapter"))
    return not models & adapters


class Promotion(Model):
    """Where the promoted model goes, besides /workspace/output."""

    destinations: Annotated[list[Destination], Field(max_length=8)] = []
    """Places that the promoted model is copied to after the gates."""
    weight_diff: WeightDiff = WeightDiff()
    """The promoted model as the difference from its base: smaller, and of no use without it."""

    validations = (
        Rule(
            "!has(self.destinations) || !self.destinations.exists(one, one.content == 'Adapter'"
            " && one.destination.startsWith('hf://') && self.destinations.exists(other, other.content == 'Model'"
            " && other.destination == one.destination))",
            "model and adapter in one repository are taken for each other: write another repository for one of them",
            _has_repositories_of_its_own,
            field="destinations",
        ),
    )


METRICS = ("cpu", "memory", "vllm:num_requests_waiting")
"""Metrics with a target of their own."""


class Autoscaling(Model):
    """How the number of pods follows the load (HorizontalPodAutoscaler)."""

    min_replicas: Annotated[int, Field(ge=1, le=100)] = 1
    """Pods at the least."""
    max_replicas: Annotated[int, Field(ge=1, le=100)]
    """Pods at the most."""
    metric: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """cpu or memory (share of what is requested), or the name of a metric that the cluster has for pods; by default
    vllm:num_requests_waiting with vllm and cpu with transformers."""
    target: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Value of the metric to keep, on average over the pods; by default 5 waiting requests, or 80 percent."""

    validations = (
        Rule(
            "self.minReplicas <= self.maxReplicas",
            "minReplicas is more than maxReplicas: write the smaller number first",
            lambda autoscaling: autoscaling.min_replicas <= autoscaling.max_replicas,
            field="minReplicas",
        ),
        Rule(
            "!has(self.metric) || self.metric in ['cpu', 'memory', 'vllm:num_requests_waiting'] || has(self.target)",
            "a metric of your own needs a target: write the value to keep",
            lambda autoscaling: autoscaling.metric in (None, *METRICS) or autoscaling.target is not None,
            field="target",
        ),
    )


class Inference(Model):
    """The OpenAI-compatible endpoint that serves the promoted model."""

    enabled: bool = True
    """Whether the model is served."""
    endpoint: DnsLabel | None = None
    """Name of the endpoint and its Service; by default the job's. A later job with the same endpoint takes it over."""
    version: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Version to serve, as in status.serving.version; by default the job's newest. Writing an earlier one goes back."""
    on_delete: Literal["Delete", "Retain"] = "Delete"
    """Whether the endpoint outlives the job."""
    runtime: Literal["vllm", "transformers"] | None = None
    """Server: vllm on GPUs, transformers also on CPUs; by default vllm where the job has GPUs."""
    replicas: Annotated[int, Field(ge=0, le=100)] = 1
    """Pods of the endpoint; without meaning where autoscaling is written."""
    autoscaling: Autoscaling | None = None
    """Let the number of pods follow the load."""
    api_key_secret_ref: SecretRef | None = None
    """Secret whose key INFERENCE_API_KEY requests must carry as Authorization: Bearer; by default none is asked for."""
    gpus_per_replica: Annotated[int, Field(ge=0, le=64)] | None = None
    """GPUs of each pod; by default 1 with vllm and 0 with transformers."""
    adapters: Annotated[list[Adapter], Field(max_length=8)] = []
    """LoRA adapters over the promoted model. They are composed into one and measured, by a pod with the settings of
    evaluation.pod, and served when the composition passes evaluation.gates; what is served until then stays."""
    composition: Composition | None = None
    """How several adapters become one; by default exactly."""
    load_from: Literal["Workspace", "S3"] = "Workspace"
    """Workspace: the servers mount the job's volume. S3: they read the model's copy below the first s3:// URL of
    promotion.destinations, need no volume, and run on any node."""
    pod: PodTemplate | None = None
    """Settings of the endpoint's pods, merged over spec.pod."""

    validations = (
        Rule(
            "self.loadFrom != 'S3' || !has(self.adapters) || size(self.adapters) == 0",
            "a composition of adapters lies on the workspace: write loadFrom: Workspace, or leave adapters out",
            lambda inference: inference.load_from != "S3" or not inference.adapters,
            field="loadFrom",
        ),
        Rule(
            "!has(self.runtime) || self.runtime != 'vllm' || !has(self.gpusPerReplica) || self.gpusPerReplica > 0",
            "vllm needs GPUs: set gpusPerReplica to at least 1, or runtime: transformers",
            lambda inference: inference.runtime != "vllm" or inference.gpus_per_replica != 0,
            field="gpusPerReplica",
        ),
        *ADAPTER_RULES,
    )


class Prepare(Model):
    """How the data is prepared."""

    pod: PodTemplate | None = None
    """Settings of the inspecting and preparing pods, merged over spec.pod."""
