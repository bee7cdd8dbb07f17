"""What the manifests share: metadata, owner reference, and the restricted pod that every phase runs in."""

from __future__ import annotations

import dataclasses
import math
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_contract import environment
from finetune_contract.reports import Phase
from finetune_contract.workspace import MOUNT_PATH
from finetune_operator import naming
from finetune_operator.placement import PRESETS, Requirement, require_nodes, require_zones
from finetune_operator.plan import Plan
from finetune_operator.pods import PodPlan
from finetune_operator.sizing import to_number

USER_ID = 65532
TOKEN_SECONDS = 3600
CONFIG_VOLUME, TOKEN_VOLUME = "finetune-config", "finetune-token"
CONFIG_MOUNT = "/etc/finetune"
TOKEN_MOUNT = environment.PROGRESS_TOKEN_PATH.rpartition("/")[0]


@dataclasses.dataclass(frozen=True)
class Container:
    """What one phase's container differs in from the others'."""

    phase: Phase
    config_map: str
    """ConfigMap mounted at /etc/finetune."""
    gpus: int = 0
    requests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    limits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shared_memory: str = ""
    env: tuple[Mapping[str, Any], ...] = ()
    has_workspace: bool = True
    is_workspace_read_only: bool = False
    num_processes: int = 1


def build_labels(plan: Plan, component: str) -> dict[str, str]:
    """Return the labels of every child; `component` is its phase."""
    return {
        naming.LABEL_MANAGED_BY: naming.FIELD_MANAGER,
        naming.LABEL_JOB: plan.name,
        naming.LABEL_COMPONENT: component,
    }


def build_owner(plan: Plan) -> dict[str, Any]:
    """Return the owner reference with which a child goes when its job does."""
    return {
        "apiVersion": f"{naming.GROUP}/{naming.VERSION}",
        "kind": naming.KIND,
        "name": plan.name,
        "uid": plan.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def build_metadata(plan: Plan, name: str, component: str, *, is_owned: bool = True) -> dict[str, Any]:
    """Return the metadata of a child."""
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": plan.namespace,
        "labels": build_labels(plan, component),
    }
    if is_owned:
        metadata["ownerReferences"] = [build_owner(plan)]
    return metadata


def build_config_map(plan: Plan, name: str, component: str, data: Mapping[str, str]) -> dict[str, Any]:
    """Return a ConfigMap of the job."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": build_metadata(plan, name, component),
        "data": dict(data),
    }


def build_pod_spec(plan: Plan, container: Container, requirements: Sequence[Requirement] = ()) -> dict[str, Any]:
    """Return the pod of a phase: restricted, with its settings, credentials and volumes."""
    pod = plan.pods[container.phase]
    preset = PRESETS.get(plan.placement.preset) if container.gpus else None
    wanted = (*require_zones(plan.placement.zones), *(preset.requirements if preset else ()), *requirements)
    affinity = require_nodes(pod.affinity, wanted)
    tolerations = [*(preset.tolerations if preset else ()), *pod.tolerations]
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            # Changing the owner of a full workspace can take minutes; a root that fits is enough.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_build_container(plan, container, pod)],
        "volumes": _build_volumes(plan, container),
    }
    optional = {
        "serviceAccountName": pod.service_account,
        "priorityClassName": pod.priority_class,
        "imagePullSecrets": [{"name": name} for name in pod.pull_secrets],
        "nodeSelector": dict(pod.node_selector),
        "tolerations": [dict(each) for each in tolerations],
        "affinity": affinity,
    }
    return {**spec, **{name: value for name, value in optional.items() if value}}


def _build_container(plan: Plan, container: Container, pod: PodPlan) -> dict[str, Any]:
    gpu = plan.resources.gpu_resource
    gpus = {gpu: str(container.gpus)} if container.gpus else {}
    mounts = [
        {"name": CONFIG_VOLUME, "mountPath": CONFIG_MOUNT, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    if container.phase is not Phase.SERVE:
        mounts.append({"name": TOKEN_VOLUME, "mountPath": TOKEN_MOUNT, "readOnly": True})
    if container.has_workspace:
        workspace: dict[str, Any] = {"name": naming.WORKSPACE_VOLUME, "mountPath": MOUNT_PATH}
        if plan.workspace.sub_path:
            workspace["subPath"] = plan.workspace.sub_path
        if container.is_workspace_read_only:
            workspace["readOnly"] = True
        mounts.append(workspace)
    return {
        "name": naming.SERVE_CONTAINER if container.phase is Phase.SERVE else naming.CONTAINER,
        "image": pod.image,
        "imagePullPolicy": pod.pull_policy,
        "args": [container.phase.value, "--run-config", environment.RUN_CONFIG_PATH],
        "env": build_env(plan, container, pod),
        "envFrom": [*(dict(each) for each in plan.env_from[container.phase]), *(dict(each) for each in pod.env_from)],
        "resources": {
            "requests": {**container.requests, **gpus, **pod.requests},
            "limits": {**container.limits, **gpus, **pod.limits},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "terminationMessagePath": environment.TERMINATION_LOG_PATH,
        # A process that was killed leaves no report: the kubelet then takes the log's last lines.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }


def build_env(plan: Plan, container: Container, pod: PodPlan) -> list[dict[str, Any]]:
    """Return the environment of a phase's container; what the user writes comes last and wins."""
    values = {
        "HOME": "/tmp",
        environment.RUN_CONFIG: environment.RUN_CONFIG_PATH,
        environment.TERMINATION_LOG: environment.TERMINATION_LOG_PATH,
    }
    if container.phase is not Phase.SERVE:
        values |= {
            environment.PROGRESS_URL: (
                f"{plan.progress_url}/apis/{naming.GROUP}/{naming.VERSION}/namespaces/{plan.namespace}/"
                f"{naming.PLURAL}/{plan.name}/status"
            ),
            environment.PROGRESS_TOKEN: environment.PROGRESS_TOKEN_PATH,
            environment.PROGRESS_CA_CERT: environment.PROGRESS_CA_PATH,
        }
    if not container.gpus:
        values |= {
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": str(_threads(container, pod)),
        }
    values |= _proxy_env(plan)
    if plan.ca_bundle:
        names = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE")
        values |= dict.fromkeys(names, environment.CA_BUNDLE_PATH)
    entries: dict[str, Mapping[str, Any]] = {name: {"name": name, "value": value} for name, value in values.items()}
    entries |= {each["name"]: each for each in (*container.env, *pod.env)}
    return [dict(each) for each in entries.values()]


def _threads(container: Container, pod: PodPlan) -> int:
    cpus = pod.limits.get("cpu") or pod.requests.get("cpu") or container.requests.get("cpu")
    return max(1, math.floor(to_number(cpus) / container.num_processes)) if cpus else 1


def _proxy_env(plan: Plan) -> dict[str, str]:
    proxies = plan.proxies
    values = {"HTTP_PROXY": proxies.http_proxy, "HTTPS_PROXY": proxies.https_proxy}
    if any(values.values()):
        # Ranks and the progress server are inside the cluster: a proxy outside cannot reach them.
        inside = urllib.parse.urlsplit(plan.progress_url).hostname or ""
        values["NO_PROXY"] = ",".join(each for each in (proxies.no_proxy, inside, plan.names.training_service) if each)
    return {name: value for upper, value in values.items() if value for name in (upper, upper.lower())}


def _build_volumes(plan: Plan, container: Container) -> list[dict[str, Any]]:
    shared: dict[str, Any] = {"medium": "Memory"}
    if container.shared_memory:
        shared["sizeLimit"] = container.shared_memory
    volumes: list[dict[str, Any]] = [
        {"name": CONFIG_VOLUME, "configMap": {"name": container.config_map}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": shared},
    ]
    if container.phase is not Phase.SERVE:
        token = {"path": "token", "audience": environment.PROGRESS_AUDIENCE, "expirationSeconds": TOKEN_SECONDS}
        volumes.append({"name": TOKEN_VOLUME, "projected": {"sources": [{"serviceAccountToken": token}]}})
    if container.has_workspace:
        claim: dict[str, Any] = {"claimName": plan.workspace.claim}
        volumes.append({"name": naming.WORKSPACE_VOLUME, "persistentVolumeClaim": claim})
    return volumes


def build_job(
    plan: Plan, name: str, component: str, spec: Mapping[str, Any], pod_spec: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a Job of the job. `spec` holds what the phases differ in."""
    pod = plan.pods[Phase(component)]
    labels = {**pod.labels, **build_labels(plan, component)}
    metadata = build_metadata(plan, name, component)
    metadata["labels"] |= plan.placement.queue_labels
    template = {"metadata": {"labels": labels}, "spec": dict(pod_spec)}
    if pod.annotations:
        template["metadata"]["annotations"] = dict(pod.annotations)
    job: dict[str, Any] = {**spec, "template": template}
    if plan.placement.queue_labels:
        # Kueue unsuspends what it admits. Starting suspended closes the gap before its webhook has seen the Job.
        job["suspend"] = True
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job}
