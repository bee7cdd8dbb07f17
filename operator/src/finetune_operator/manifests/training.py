"""One attempt at training: an Indexed Job, its headless Service, and the budget that refuses voluntary eviction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_contract import environment
from finetune_contract.reports import Phase
from finetune_contract.run_config import RunConfig
from finetune_operator import naming
from finetune_operator.placement import avoid_nodes, spread_over_nodes
from finetune_operator.plan import Plan
from finetune_operator.record import Record
from finetune_operator.sizing import training_memory_bytes

from .common import Container, build_job, build_labels, build_metadata, build_pod_spec
from .run_config import build_run_config, build_run_config_map
from .stopping import choose_grace_seconds, choose_notice_seconds, expect_save_seconds

LOST_NODE_SECONDS = 60
"""How long a node may be unreachable before its pod is given up; Kubernetes' default is 300."""
METRICS_PORT = 9464
MORE_THAN_ANY_NODES = 1025
"""With fewer healthy pods than this no eviction is allowed; `resources.nodes` is at most 1024."""
SAFE_TO_EVICT = "cluster-autoscaler.kubernetes.io/safe-to-evict"


def build_training_service(plan: Plan) -> dict[str, Any]:
    """Return the headless Service that gives the pods host names."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": build_metadata(plan, plan.names.training_service, Phase.TRAIN),
        "spec": {
            "clusterIP": "None",
            # Ranks look each other up before any of them is ready.
            "publishNotReadyAddresses": True,
            "selector": {naming.LABEL_JOB: plan.name, naming.LABEL_COMPONENT: Phase.TRAIN.value},
            "ports": [{"name": "rendezvous", "port": plan.run.topology.rendezvous_port, "protocol": "TCP"}],
        },
    }


def build_disruption_budget(plan: Plan) -> dict[str, Any]:
    """Return the budget with which the API server refuses to evict training pods."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": build_metadata(plan, plan.names.training_service, Phase.TRAIN),
        "spec": {
            # Kubernetes cannot tell how many pods a Job should have, and complains when maxUnavailable makes it ask.
            "minAvailable": MORE_THAN_ANY_NODES,
            "selector": {
                "matchLabels": {naming.LABEL_JOB: plan.name, naming.LABEL_COMPONENT: Phase.TRAIN.value},
            },
        },
    }


def build_attempt(plan: Plan, record: Record, number: int, progress_ca: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the ConfigMap and the Job of an attempt."""
    name = plan.names.training_job(number)
    run = build_run_config(plan, record, number)
    config_map = build_run_config_map(plan, name, Phase.TRAIN, run, progress_ca)
    config_map["metadata"]["labels"][naming.LABEL_ATTEMPT] = str(number)
    grace_seconds = choose_grace_seconds(plan, record)
    own = {
        environment.ATTEMPT: str(number),
        environment.NOTICE_SECONDS: str(choose_notice_seconds(plan, grace_seconds)),
        environment.SAVE_SECONDS: f"{expect_save_seconds(plan, record):.1f}",
    }
    pod_spec = build_pod_spec(
        plan,
        _container(plan, name, _request_memory(plan, record, run), own),
        avoid_nodes([each.node for each in record.excluded_nodes]),
    )
    pod_spec |= {
        "subdomain": plan.names.training_service,
        "terminationGracePeriodSeconds": grace_seconds,
        "tolerations": [*pod_spec.get("tolerations", ()), *_lost_node_tolerations()],
    }
    nodes = plan.run.topology.nodes
    if nodes > 1:
        labels = {**build_labels(plan, Phase.TRAIN), naming.LABEL_ATTEMPT: str(number)}
        pod_spec["affinity"] = spread_over_nodes(pod_spec.get("affinity", {}), labels, plan.placement.topology_key)
    spec = {
        "backoffLimit": 0,
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
    }
    job = build_job(plan, name, Phase.TRAIN, spec, pod_spec)
    template = job["spec"]["template"]["metadata"]
    for metadata in (job["metadata"], template):
        metadata["labels"][naming.LABEL_ATTEMPT] = str(number)
    template["annotations"] = {**_annotations(), **template.get("annotations", {})}
    pod_spec["containers"][0]["ports"] = [{"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"}]
    return config_map, job


def _annotations() -> dict[str, str]:
    return {SAFE_TO_EVICT: "false", "prometheus.io/scrape": "true", "prometheus.io/port": str(METRICS_PORT)}


def _lost_node_tolerations() -> list[dict[str, Any]]:
    return [
        {
            "key": f"node.kubernetes.io/{state}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": LOST_NODE_SECONDS,
        }
        for state in ("not-ready", "unreachable")
    ]


def _request_memory(plan: Plan, record: Record, run: RunConfig) -> str:
    """Return what to ask for where nobody has said it; nothing where the model's size is unknown. It is no limit."""
    if "memory" in plan.pods[Phase.TRAIN].limits:
        # More than the limit would be refused; without a word Kubernetes asks for the limit.
        return ""
    parameters = int(record.details(Phase.INSPECT).get("model_parameters") or 0)
    return f"{max(1024, training_memory_bytes(parameters, run) >> 20)}Mi" if parameters else ""


def _container(plan: Plan, config_map: str, memory: str, env: Mapping[str, str]) -> Container:
    """Return the training container; `memory` is what it asks for where the job does not say it."""
    resources = plan.resources
    amounts = {"cpu": resources.cpu, "memory": resources.memory or memory}
    requests = {name: value for name, value in amounts.items() if value} | dict(resources.extended)
    limits = ({"memory": resources.memory} if resources.memory else {}) | dict(resources.extended)
    values = {**env, environment.METRICS_PORT: str(METRICS_PORT)}
    own = tuple({"name": variable, "value": value} for variable, value in values.items())
    return Container(
        phase=Phase.TRAIN,
        config_map=config_map,
        gpus=resources.gpus,
        requests=requests,
        limits=limits,
        shared_memory=resources.shared_memory,
        env=(*own, *plan.tracking_env),
        num_processes=plan.run.topology.processes_per_node,
    )
