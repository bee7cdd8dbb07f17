"""The endpoint: a Deployment that serves the promoted model from the workspace, and its Service.

Owned by no job, so that a later job can take the endpoint over and a retained one outlives its job.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from finetune_contract.reports import Phase
from finetune_contract.workspace import Workspace
from finetune_operator import naming
from finetune_operator.plan import Plan
from finetune_operator.record import Record

from .common import Container, build_labels, build_metadata, build_pod_spec
from .run_config import build_run_config, build_run_config_map

PORT = 8000
START_SECONDS = 1800
"""How long a server may take to load the model before it is restarted."""


def serving_digest(plan: Plan, record: Record) -> str:
    """Return the digest of the model that the endpoint is to serve."""
    return plan.serving.version or str(record.details(Phase.PROMOTE).get("digest") or "")


def build_endpoint(plan: Plan, record: Record, progress_ca: str) -> tuple[dict[str, Any], ...]:
    """Return ConfigMap, Deployment and Service of the endpoint."""
    digest = serving_digest(plan, record)
    run = build_run_config(plan, record)
    run = dataclasses.replace(run, promotion=dataclasses.replace(run.promotion, digest=digest))
    config_map = build_run_config_map(plan, plan.names.serving_map, Phase.SERVE, run, progress_ca)
    config_map["metadata"] = _metadata(plan, plan.names.serving_map, digest)
    return config_map, _build_deployment(plan, digest), _build_service(plan, digest)


def _metadata(plan: Plan, name: str, digest: str) -> dict[str, Any]:
    metadata = build_metadata(plan, name, Phase.SERVE, is_owned=False)
    metadata["labels"][naming.LABEL_ENDPOINT] = plan.names.endpoint
    metadata["annotations"] = {naming.ANNOTATION_DIGEST: digest, naming.ANNOTATION_JOB_UID: plan.uid}
    return metadata


def _build_deployment(plan: Plan, digest: str) -> dict[str, Any]:
    pod = plan.pods[Phase.SERVE]
    labels = {**pod.labels, **build_labels(plan, Phase.SERVE), naming.LABEL_ENDPOINT: plan.names.endpoint}
    # The digest in the template makes a new version a rollout; without it the pods would keep the old one.
    annotations = {**pod.annotations, naming.ANNOTATION_DIGEST: digest}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(plan, plan.names.endpoint, digest),
        "spec": {
            "replicas": plan.serving.replicas,
            "selector": {"matchLabels": {naming.LABEL_ENDPOINT: plan.names.endpoint}},
            # The old version answers until the new one does.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "progressDeadlineSeconds": START_SECONDS,
            "template": {
                "metadata": {"labels": labels, "annotations": annotations},
                "spec": _build_pod(plan, digest),
            },
        },
    }


def _build_pod(plan: Plan, digest: str) -> dict[str, Any]:
    requests = dict(plan.preparation_resources.get("requests", {}))
    container = Container(
        phase=Phase.SERVE,
        config_map=plan.names.serving_map,
        gpus=plan.serving.gpus,
        requests=requests,
        is_workspace_read_only=True,
    )
    spec = build_pod_spec(plan, container)
    spec["restartPolicy"] = "Always"
    spec["terminationGracePeriodSeconds"] = 60
    server = spec["containers"][0]
    if plan.serving.runtime == "vllm":
        server["args"] = [
            str(Workspace().promoted_model(digest)),
            f"--served-model-name={plan.names.endpoint}",
            f"--port={PORT}",
            f"--tensor-parallel-size={max(1, plan.serving.gpus)}",
        ]
    check = {"httpGet": {"path": "/health", "port": "http"}}
    server |= {
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "startupProbe": {**check, "periodSeconds": 2, "timeoutSeconds": 5, "failureThreshold": START_SECONDS // 2},
        "readinessProbe": {**check, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 3},
        "livenessProbe": {**check, "periodSeconds": 20, "timeoutSeconds": 10, "failureThreshold": 6},
        # Requests that are under way when the endpoint moves on are answered before the server stops.
        "lifecycle": {"preStop": {"sleep": {"seconds": 5}}},
    }
    return spec


def _build_service(plan: Plan, digest: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(plan, plan.names.endpoint, digest),
        "spec": {
            "type": "ClusterIP",
            "selector": {naming.LABEL_ENDPOINT: plan.names.endpoint},
            "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}],
        },
    }
