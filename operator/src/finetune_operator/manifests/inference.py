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
from collections.abc import Mapping
from typing import Any

from finetune_contract import smoke_prompt
from finetune_contract.reports import Phase
from finetune_contract.run_config import DatasetConfig, PromotionConfig, RunConfig, Source
from finetune_contract.workspace import Workspace
from finetune_operator import naming
from finetune_operator.plan import Plan
from finetune_operator.record import Record

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
SCRIPT = "smoke_prompt.py"


@dataclasses.dataclass(frozen=True)
class Served:
    """One version as it should be."""

    label: str
    name: str
    """Name of its Deployment, and of all that goes with it."""
    digest: str
    objects: tuple[dict[str, Any], ...]


def serving_digest(plan: Plan, record: Record) -> str:
    """Return the digest of the model that the endpoint is to serve."""
    return plan.serving.version or str(record.details(Phase.PROMOTE).get("digest") or "")


def choose_start_seconds(plan: Plan, record: Record) -> int:
    """Return how long a server may take until it answers: as long as its model takes to read, and its runtime."""
    promoted = int(record.details(Phase.PROMOTE).get("bytes") or 0)
    size = max(promoted, int(record.details(Phase.INSPECT).get("model_bytes") or 0))
    return STARTING_SECONDS[plan.serving.runtime] + size // READ_BYTES_PER_SECOND


def build_served(plan: Plan, record: Record) -> Served:
    """Return the version that the plan asks for."""
    digest = serving_digest(plan, record)
    run = _reduce(build_run_config(plan, record), digest)
    pod = _build_pod(plan, digest, choose_start_seconds(plan, record))
    identity = {"job": plan.uid, "pod": pod, "run": run.to_json(), "labels": dict(plan.pods[Phase.SERVE].labels)}
    label = _make_label(digest, json.dumps(identity, sort_keys=True))
    served = Served(label, plan.names.version(label), digest, ())
    config_map = build_run_config_map(plan, served.name, Phase.SERVE, run, "")
    config_map["metadata"] = _metadata(plan, served)
    config_map["data"][SCRIPT] = _read_script()
    pod["volumes"][0]["configMap"]["name"] = served.name
    objects = (config_map, _build_deployment(plan, served, pod, choose_start_seconds(plan, record)))
    return dataclasses.replace(served, objects=(*objects, *build_companions(plan, label, digest)))


def _reduce(run: RunConfig, digest: str) -> RunConfig:
    """Keep what a server reads: another gate or retention makes no other version."""
    return RunConfig(
        model=Source(run.model.source),
        dataset=DatasetConfig(sources=()),
        job=run.job,
        workspace=run.workspace,
        trust_remote_code=run.trust_remote_code,
        promotion=PromotionConfig(digest=digest),
        serving=run.serving,
    )


def _make_label(digest: str, identity: str) -> str:
    """Return the label of a version: the digest's beginning, to be read, and that of everything else."""
    start = re.sub("[^a-z0-9]", "", digest.lower())[:6] or "model"
    return f"{start}-{naming.short_digest(identity, 4)}"


@functools.cache
def _read_script() -> str:
    return pathlib.Path(smoke_prompt.__file__).read_text(encoding="utf-8")


def _metadata(plan: Plan, served: Served) -> dict[str, Any]:
    metadata = build_metadata(plan, served.name, Phase.SERVE, is_owned=False)
    metadata["labels"] |= {naming.LABEL_ENDPOINT: plan.names.endpoint, naming.LABEL_VERSION: served.label}
    metadata["annotations"] = {naming.ANNOTATION_DIGEST: served.digest, naming.ANNOTATION_JOB_UID: plan.uid}
    return metadata


def _build_deployment(plan: Plan, served: Served, pod: dict[str, Any], start_seconds: int) -> dict[str, Any]:
    settings = plan.pods[Phase.SERVE]
    endpoint = {naming.LABEL_ENDPOINT: plan.names.endpoint, naming.LABEL_VERSION: served.label}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(plan, served),
        "spec": {
            "replicas": plan.serving.replicas,
            "selector": {"matchLabels": endpoint},
            "progressDeadlineSeconds": start_seconds,
            "revisionHistoryLimit": 0,
            "template": {
                "metadata": {
                    "labels": {**settings.labels, **build_labels(plan, Phase.SERVE), **endpoint},
                    "annotations": {**settings.annotations, naming.ANNOTATION_DIGEST: served.digest},
                },
                "spec": pod,
            },
        },
    }


def _build_pod(plan: Plan, digest: str, start_seconds: int) -> dict[str, Any]:
    container = Container(
        phase=Phase.SERVE,
        config_map="",
        gpus=plan.serving.gpus,
        requests=dict(plan.preparation_resources.get("requests", {})),
        is_workspace_read_only=True,
    )
    spec = build_pod_spec(plan, container)
    spec["restartPolicy"] = "Always"
    spec["terminationGracePeriodSeconds"] = UNHURRIED_SECONDS + DRAIN_SECONDS
    server = spec["containers"][0]
    health = {"httpGet": {"path": "/health", "port": "http"}}
    # The trainer's server answers /health with a completion; of vLLM one is asked for before a pod counts.
    started, stop, period = health, {"sleep": {"seconds": UNHURRIED_SECONDS}}, 1
    if plan.serving.runtime == "vllm":
        server["args"] = [
            str(Workspace().promoted_model(digest)),
            f"--served-model-name={plan.names.endpoint}",
            f"--port={PORT}",
            f"--tensor-parallel-size={max(1, plan.serving.gpus)}",
        ]
        url = f"--url=http://127.0.0.1:{PORT}"
        period = 2
        started = _run_script("check", url, f"--model={plan.names.endpoint}")
        # vLLM breaks off what it is answering when it is asked to stop.
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


def _run_script(*arguments: str) -> dict[str, Any]:
    return {"exec": {"command": ["python3", f"{CONFIG_MOUNT}/{SCRIPT}", *arguments]}}


def build_companions(plan: Plan, label: str, digest: str) -> tuple[dict[str, Any], ...]:
    """Return what goes with the Deployment of a version: the Service that the smoke prompt goes through."""
    served = Served(label, plan.names.version(label), digest, ())
    return (
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": _metadata(plan, served),
            "spec": {
                **_service_spec(plan, label),
                # Asked before it is ready: the smoke prompt waits for the server, not for its probes.
                "publishNotReadyAddresses": True,
            },
        },
    )


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
    pod = build_pod_spec(plan, Container(phase=Phase.SERVE, config_map=name, has_workspace=False))
    (container,) = pod["containers"]
    for key in ("args", "envFrom"):
        container.pop(key)
    kept = {"FINETUNE_TERMINATION_LOG"}
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
    pod["affinity"] = {"podAffinity": _beside({naming.LABEL_VERSION: label})}
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


def _beside(labels: Mapping[str, str]) -> dict[str, Any]:
    term = {"labelSelector": {"matchLabels": dict(labels)}, "topologyKey": "kubernetes.io/hostname"}
    return {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
