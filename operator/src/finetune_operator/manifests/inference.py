"""The endpoint: one Deployment for each version of it, one Service that names the version which takes the traffic.

A version is a promoted model and the pods that serve it; whatever changes in either makes another one, with a name of
its own, so that nothing of a version ever changes while it answers. Owned by no job: a later job can take the endpoint
over, and a retained one outlives its job.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
import types
from collections.abc import Mapping
from typing import Any

from finetune_contract import environment, smoke_prompt, vllm_server
from finetune_contract.reports import Phase
from finetune_contract.run_config import (
    BASE_SUFFIX,
    CompositionConfig,
    DatasetConfig,
    PromotionConfig,
    RunConfig,
    ServingConfig,
    Source,
)
from finetune_contract.workspace import Workspace
from finetune_operator import naming
from finetune_operator.placement import stay_together
from finetune_operator.plan import AutoscalingPlan, Plan
from finetune_operator.record import Record
from finetune_operator.versions import find_served, serving_version, split_version

from .common import CONFIG_MOUNT, Container, build_labels, build_metadata, build_pod_spec
from .run_config import build_run_config, build_run_config_map

PORT = 8000
STARTING_SECONDS = {"transformers": 300, "vllm": 900}
"""How long a server may take to start, by runtime, besides reading the model: imports, and with vLLM its compiler."""
READ_BYTES_PER_SECOND = 100_000_000
"""Speed at which a model is read from the workspace, at the least."""
DRAIN_SECONDS = 60
"""How long requests that are under way may take when a version goes."""
UNHURRIED_SECONDS = 5
"""Between being taken off the Service and stopping: until then requests may still arrive."""
SCRIPT, SERVER = "smoke_prompt.py", "vllm_server.py"
LARGEST_RANK = 512
"""Of what vLLM accepts, where the rank of a composition is not known: it was made by another job."""


@dataclasses.dataclass(frozen=True)
class Served:
    """One version as it should be."""

    label: str
    name: str
    """Name of its Deployment, and of all that goes with it."""
    digest: str
    objects: tuple[dict[str, Any], ...]


def choose_start_seconds(plan: Plan, record: Record) -> int:
    """Return how long a server may take until it answers: as long as its model takes to read, and its runtime."""
    promoted = int(record.details(Phase.PROMOTE).get("bytes") or 0)
    size = max(promoted, int(record.details(Phase.INSPECT).get("model_bytes") or 0))
    return STARTING_SECONDS[plan.serving.runtime] + size // READ_BYTES_PER_SECOND


def build_served(plan: Plan, record: Record, *, is_on_one_node: bool = False) -> Served:
    """Return the version that the plan asks for. `is_on_one_node`: no second node can mount the workspace."""
    digest = serving_version(plan, record)
    run = _prune(_reduce(build_run_config(plan, record), digest, plan.serving.config))
    start_seconds = choose_start_seconds(plan, record)
    pod = _build_pod(plan, _list_vllm_args(plan, record, digest), start_seconds, is_on_one_node=is_on_one_node)
    settings = plan.pods[Phase.SERVE]
    identity = {
        "job": plan.uid,
        "pod": pod,
        "run": run,
        "settings": [dict(settings.labels), dict(settings.annotations)],
        "is_autoscaled": plan.serving.autoscaling is not None,
    }
    label = _make_label(digest, json.dumps(identity, sort_keys=True))
    served = Served(label, plan.names.version(label), digest, ())
    config_map = build_run_config_map(plan, served.name, Phase.SERVE, plan.run, "")
    config_map["metadata"] = _metadata(plan, served)
    files = {"run.json": json.dumps(run, sort_keys=True, indent=1), SCRIPT: _read(smoke_prompt)}
    if plan.serving.runtime == "vllm":
        files[SERVER] = _read(vllm_server)
    config_map["data"] |= files
    pod["volumes"][0]["configMap"]["name"] = served.name
    objects = (config_map, _build_deployment(plan, served, pod, choose_start_seconds(plan, record)))
    return dataclasses.replace(served, objects=(*objects, *build_companions(plan, label, digest)))


def _reduce(run: RunConfig, digest: str, serving: ServingConfig) -> RunConfig:
    """Keep what a server reads: another gate or retention makes no other version."""
    model, profile = split_version(digest)
    return RunConfig(
        model=Source(run.model.source),
        dataset=DatasetConfig(sources=()),
        job=run.job,
        workspace=run.workspace,
        trust_remote_code=run.trust_remote_code,
        promotion=PromotionConfig(digest=model),
        composition=CompositionConfig(digest=profile),
        serving=serving,
    )


def _prune(settings: Any) -> dict[str, Any]:
    """Return settings without what is at its default, and the version of their format.

    A release that knows more settings then makes no other version of what is served, nor a file that the image of an
    earlier one cannot read.
    """
    result: dict[str, Any] = {"version": settings.version} if isinstance(settings, RunConfig) else {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != field.default or field.default is dataclasses.MISSING:
            result[field.name] = _prune(value) if dataclasses.is_dataclass(value) else value
    return result


def _make_label(digest: str, identity: str) -> str:
    """Return the label of a version: the digest's beginning, to be read, and that of everything else."""
    start = re.sub("[^a-z0-9]", "", digest.lower())[:6] or "model"
    return f"{start}-{naming.short_digest(identity, 4)}"


@functools.cache
def _read(program: types.ModuleType) -> str:
    return pathlib.Path(str(program.__file__)).read_text(encoding="utf-8")


def _metadata(plan: Plan, served: Served) -> dict[str, Any]:
    metadata = build_metadata(plan, served.name, Phase.SERVE, is_owned=False)
    metadata["labels"] |= {naming.LABEL_ENDPOINT: plan.names.endpoint, naming.LABEL_VERSION: served.label}
    metadata["annotations"] = {naming.ANNOTATION_DIGEST: served.digest, naming.ANNOTATION_JOB_UID: plan.uid}
    return metadata


def _build_deployment(plan: Plan, served: Served, pod: dict[str, Any], start_seconds: int) -> dict[str, Any]:
    settings = plan.pods[Phase.SERVE]
    selected = _select(plan, served.label)
    workspace = {} if plan.serving.is_from_copy else _label_workspace(plan)
    labels = {**settings.labels, **build_labels(plan, Phase.SERVE), **selected, **workspace}
    # With an autoscaler the number is its own: applied here, it would be set back on every pass.
    replicas, metadata = {"replicas": plan.serving.replicas}, _metadata(plan, served)
    if plan.serving.autoscaling is not None:
        replicas = {}
        metadata["annotations"][naming.ANNOTATION_LEAST] = str(plan.serving.least_replicas)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": {
            **replicas,
            "selector": {"matchLabels": selected},
            "progressDeadlineSeconds": start_seconds,
            "revisionHistoryLimit": 0,
            "template": {
                "metadata": {
                    "labels": labels,
                    "annotations": {**settings.annotations, naming.ANNOTATION_DIGEST: served.digest},
                },
                "spec": pod,
            },
        },
    }


def _label_workspace(plan: Plan) -> dict[str, str]:
    return {naming.LABEL_WORKSPACE: naming.short_digest(plan.workspace.claim)}


def _list_vllm_args(plan: Plan, record: Record, version: str) -> list[str]:
    """Return how vLLM is started. A version's name in requests is the endpoint's, with adapters or without."""
    model, profile = split_version(version)
    name, workspace = plan.names.endpoint, Workspace()
    copy = plan.serving.config
    promoted = f"{copy.source}/{model}" if copy.source else str(workspace.promoted_model(model))
    common = [f"--port={PORT}", f"--tensor-parallel-size={max(1, plan.serving.gpus)}"]
    if plan.run.trust_remote_code:
        common.append("--trust-remote-code")
    if copy.source:
        common.append("--load-format=runai_streamer")
    field = [f"--field={copy.source_field}", f"--secret-prefix={copy.secret_prefix}"] if copy.source else []
    start = [f"--promoted={promoted}", *field, "--", "vllm", "serve"]
    if not profile:
        return [*start, promoted, f"--served-model-name={name}", *common]
    composed = find_served(record, version)
    served = str(workspace.root / str(composed["model"])) if composed.get("model") else promoted
    return [
        *start,
        served,
        f"--served-model-name={name}{BASE_SUFFIX}",
        *common,
        # The chat template is the promoted model's, also over the base of a LoRA job.
        *([f"--tokenizer={promoted}", f"--generation-config={promoted}"] if served != promoted else ()),
        "--enable-lora",
        f"--max-lora-rank={composed.get('rank') or LARGEST_RANK}",
        "--lora-modules",
        f"{name}={workspace.composed_adapter(profile)}",
    ]


def _build_pod(plan: Plan, vllm_args: list[str], start_seconds: int, *, is_on_one_node: bool) -> dict[str, Any]:
    container = Container(
        phase=Phase.SERVE,
        config_map="",
        gpus=plan.serving.gpus,
        requests=dict(plan.preparation_resources.get("requests", {})),
        env=_build_keys(plan),
        has_workspace=not plan.serving.is_from_copy,
        is_workspace_read_only=True,
    )
    spec = build_pod_spec(plan, container)
    if is_on_one_node:
        spec["affinity"] = stay_together(spec.get("affinity") or {}, _label_workspace(plan))
    spec["restartPolicy"] = "Always"
    spec["terminationGracePeriodSeconds"] = UNHURRIED_SECONDS + DRAIN_SECONDS
    server = spec["containers"][0]
    health = {"httpGet": {"path": "/health", "port": "http"}}
    # The trainer's server answers /health with a completion; of vLLM one is asked for before a pod counts.
    started, stop, period = health, {"sleep": {"seconds": UNHURRIED_SECONDS}}, 1
    if plan.serving.runtime == "vllm":
        server |= {"command": ["python3", f"{CONFIG_MOUNT}/{SERVER}"], "args": vllm_args}
        url = f"--url=http://127.0.0.1:{PORT}"
        period = 2
        started = _run_script("check", url, f"--model={plan.names.endpoint}")
        # Asked to stop, vLLM ends its engine at once: requests that are under way then get no end.
        stop = _run_script("drain", url, f"--delay={UNHURRIED_SECONDS}", f"--within={DRAIN_SECONDS - 5}")
    server |= {
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "startupProbe": {
            **started,
            "periodSeconds": period,
            "timeoutSeconds": 60,
            "failureThreshold": start_seconds // period,
        },
        "readinessProbe": {**health, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 3},
        "livenessProbe": {**health, "periodSeconds": 20, "timeoutSeconds": 25, "failureThreshold": 6},
        "lifecycle": {"preStop": stop},
    }
    return spec


def _build_keys(plan: Plan) -> tuple[dict[str, Any], ...]:
    """Return the variables with the API key: the one that vLLM reads, and the one that our own programs do."""
    if not plan.serving.api_key_secret:
        return ()
    key = {"secretKeyRef": {"name": plan.serving.api_key_secret, "key": smoke_prompt.API_KEY}}
    names = ("VLLM_API_KEY", smoke_prompt.API_KEY) if plan.serving.runtime == "vllm" else (smoke_prompt.API_KEY,)
    return tuple({"name": name, "valueFrom": key} for name in names)


def _run_script(*arguments: str) -> dict[str, Any]:
    return {"exec": {"command": ["python3", f"{CONFIG_MOUNT}/{SCRIPT}", *arguments]}}


def build_companions(plan: Plan, label: str, digest: str) -> tuple[dict[str, Any], ...]:
    """Return what goes with the pods of a version, all under its name."""
    served = Served(label, plan.names.version(label), digest, ())
    # Asked before it is ready: the smoke prompt waits for the server, not for its probes.
    service = {**_service_spec(plan, label), "publishNotReadyAddresses": True}
    policy = {
        "podSelector": {"matchLabels": _select(plan, label)},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"ports": [{"port": PORT, "protocol": "TCP"}]}],
        # A model on the workspace is there when the node has mounted it: such a server has nothing to ask of anybody.
        # Where a bucket is, and who gives credentials for it, is known to the Secret and the cluster only.
        "egress": [{}] if plan.serving.is_from_copy else [],
    }
    objects = [
        _build_companion(plan, served, "v1", "Service", service),
        _build_companion(plan, served, "networking.k8s.io/v1", "NetworkPolicy", policy),
    ]
    if plan.serving.least_replicas > 1:
        budget = {"maxUnavailable": 1, "selector": {"matchLabels": _select(plan, label)}}
        objects.append(_build_companion(plan, served, "policy/v1", "PodDisruptionBudget", budget))
    if plan.serving.autoscaling is not None:
        spec = _autoscale(plan.serving.autoscaling, served.name)
        objects.append(_build_companion(plan, served, "autoscaling/v2", "HorizontalPodAutoscaler", spec))
    return tuple(objects)


def _build_companion(
    plan: Plan, served: Served, api_version: str, kind: str, spec: Mapping[str, Any]
) -> dict[str, Any]:
    return {"apiVersion": api_version, "kind": kind, "metadata": _metadata(plan, served), "spec": dict(spec)}


def _autoscale(autoscaling: AutoscalingPlan, name: str) -> dict[str, Any]:
    if autoscaling.metric in ("cpu", "memory"):
        target = {"type": "Utilization", "averageUtilization": autoscaling.target}
        metric = {"type": "Resource", "resource": {"name": autoscaling.metric, "target": target}}
    else:
        target = {"type": "AverageValue", "averageValue": str(autoscaling.target)}
        metric = {"type": "Pods", "pods": {"metric": {"name": autoscaling.metric}, "target": target}}
    return {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
        "minReplicas": autoscaling.least,
        "maxReplicas": autoscaling.most,
        "metrics": [metric],
    }


def _select(plan: Plan, label: str) -> dict[str, str]:
    return {naming.LABEL_ENDPOINT: plan.names.endpoint, naming.LABEL_VERSION: label}


def build_service(plan: Plan, label: str, digest: str, annotations: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the Service of the endpoint, whose traffic goes to the version with this label."""
    metadata = build_metadata(plan, plan.names.endpoint, Phase.SERVE, is_owned=False)
    metadata["labels"][naming.LABEL_ENDPOINT] = plan.names.endpoint
    metadata["annotations"] = {
        naming.ANNOTATION_DIGEST: digest,
        naming.ANNOTATION_JOB_UID: plan.uid,
        **(annotations or {}),
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": _service_spec(plan, label)}


def _service_spec(plan: Plan, label: str) -> dict[str, Any]:
    selector = {naming.LABEL_ENDPOINT: plan.names.endpoint}
    if label != naming.FIRST_VERSION:
        selector[naming.LABEL_VERSION] = label
    return {
        "type": "ClusterIP",
        "selector": selector,
        "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}],
    }


def build_smoke_job(plan: Plan, label: str, image: str, within_seconds: int) -> dict[str, Any]:
    """Return the Job that asks a version the smoke prompt and reports what it measured.

    It runs beside a server, where the image is, and needs neither its GPU nor its volume.
    """
    name = plan.names.version(label)
    asked = Container(phase=Phase.SERVE, config_map=name, env=_build_keys(plan), has_workspace=False)
    pod = build_pod_spec(plan, asked)
    (container,) = pod["containers"]
    for key in ("args", "envFrom"):
        container.pop(key)
    kept = {environment.TERMINATION_LOG, smoke_prompt.API_KEY}
    container |= {
        "name": naming.CONTAINER,
        "image": image,
        "command": [
            *("python3", f"{CONFIG_MOUNT}/{SCRIPT}", "smoke", f"--url=http://{name}.{plan.namespace}.svc"),
            *(f"--model={plan.names.endpoint}", f"--within={within_seconds}"),
        ],
        "env": [each for each in container["env"] if each["name"] in kept],
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
    }
    pod["affinity"] = stay_together({}, {naming.LABEL_VERSION: label})
    pod["nodeSelector"] = {}
    pod["tolerations"] = [{"operator": "Exists"}]
    labels = build_labels(plan, naming.SMOKE)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": build_metadata(plan, plan.names.smoke_job(label), naming.SMOKE),
        "spec": {
            "backoffLimit": 2,
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": naming.CONTAINER,
                            "operator": "In",
                            "values": [smoke_prompt.EXIT_REFUSED, smoke_prompt.EXIT_NO_ANSWER],
                        },
                    },
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
