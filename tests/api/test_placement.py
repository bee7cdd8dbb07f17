"""Where pods go, judged by the real scheduler on nodes that carry the labels, taints and GPUs of A100 pools.

The nodes are KWOK's: no pod really runs there, so the test says how preparation ended.
"""

import dataclasses
import json

import pytest

from finetune_contract.reports import ExitReport
from tests.demo.kubectl import ClusterError
from tests.support.jobs import apply_job, make_job
from tests.support.waiting import eventually

ZONE = "topology.kubernetes.io/zone"
ONLY_HERE = {"key": "finetune.dev/placement-test", "operator": "Exists", "effect": "NoSchedule"}
FLAPPING = [{"key": f"node.kubernetes.io/{state}", "operator": "Exists"} for state in ("not-ready", "unreachable")]
"""KWOK renews its nodes' leases late, so that they count as lost now and then."""
INSPECTED = ExitReport(
    "inspect",
    "Completed",
    "inspected",
    details={
        "model_bytes": 1_000_000,
        "model_parameters": 250_000,
        "model_type": "llama",
        "model_revision": "",
        "dataset_bytes": 1000,
        "dataset_revisions": [""],
    },
)
PREPARED = ExitReport(
    "prepare",
    "Completed",
    "prepared",
    details={
        "rows_read": 10,
        "rows_kept": 10,
        "rows_removed": 0,
        "rows_bad": 0,
        "rows_train": 9,
        "rows_holdout": 1,
        "tokens": 1000,
        "removed_per_category": {},
        "dataset_digest": "0" * 64,
        "report": "datasets/report.json",
        "model_digest": "1" * 64,
        "model_revision": "",
    },
)


@dataclasses.dataclass(frozen=True)
class Pool:
    """One cloud's A100 pool as its nodes show it."""

    preset: str
    labels: dict
    taints: tuple


AKS = {"node.kubernetes.io/instance-type": "Standard_NC96ads_A100_v4", "kubernetes.azure.com/accelerator": "nvidia"}
AKS_TAINT = {"key": "sku", "value": "gpu", "effect": "NoSchedule"}
SPOT = {"kubernetes.azure.com/scalesetpriority": "spot"}
SPOT_TAINT = {"key": "kubernetes.azure.com/scalesetpriority", "value": "spot", "effect": "NoSchedule"}
POOLS = (
    Pool("aks-a100", AKS, (AKS_TAINT,)),
    Pool("aks-a100-spot", {**AKS, **SPOT}, (AKS_TAINT, SPOT_TAINT)),
    Pool(
        "gke-a100",
        {"cloud.google.com/gke-accelerator": "nvidia-a100-80gb", "node.kubernetes.io/instance-type": "a2-ultragpu-4g"},
        ({"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"},),
    ),
    Pool(
        "eks-a100",
        {"node.kubernetes.io/instance-type": "p4de.24xlarge", "karpenter.k8s.aws/instance-gpu-name": "a100"},
        ({"key": "nvidia.com/gpu", "value": "true", "effect": "NoSchedule"},),
    ),
)


def _make_node(name, zone, labels=None, taints=(), gpus=0):
    resources = {"cpu": "96", "memory": "880Gi", "pods": "110", **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": {"kwok.x-k8s.io/node": "fake"},
            "labels": {ZONE: zone, "kubernetes.io/hostname": name, **(labels or {})},
        },
        "spec": {"taints": list(taints)},
        "status": {"capacity": resources, "allocatable": resources},
    }


@pytest.fixture(scope="module")
def nodes(operator, api_server, run_component):
    """Two nodes of each pool in the right zone, one in another, a GPU node of no pool, and one for preparation."""
    run_component("scheduler")
    run_component("kwok")
    run_component("provisioner")
    mine = {"key": ONLY_HERE["key"], "value": "yes", "effect": "NoSchedule"}
    made = [
        _make_node("prepare-zone-1", "zone-1", taints=(mine,)),
        _make_node("prepare-zone-2", "zone-2", taints=(mine,)),
        _make_node("other-gpu", "zone-1", {"node.kubernetes.io/instance-type": "Standard_NC6s_v3"}, (mine,), gpus=8),
    ]
    for pool in POOLS:
        for index, zone in enumerate(("zone-1", "zone-1", "zone-2")):
            made.append(_make_node(f"{pool.preset}-{index}", zone, pool.labels, (*pool.taints, mine), gpus=4))
    for node in made:
        api_server.apply(node)
        patch = json.dumps({"status": node["status"]})
        api_server.run("patch", "node", node["metadata"]["name"], "--subresource=status", "--type=merge", "-p", patch)
    yield made
    api_server.run("delete", "nodes", *(node["metadata"]["name"] for node in made))


def _make_pool_job(preset):
    return make_job(
        f"on-{preset}",
        resources={"nodes": 2, "gpusPerNode": 4, "processesPerNode": None},
        placement={"preset": preset, "zones": ["zone-1"]},
        workspace={"storageClassName": "zonal", "accessMode": "ReadWriteMany", "size": "20Gi"},
        pod={"tolerations": [ONLY_HERE, *FLAPPING]},
    )


def _end_pod(job, pod, report):
    terminated = {
        "exitCode": report.exit_code,
        "reason": "Completed",
        "message": report.to_termination_message(),
        "startedAt": "2026-01-01T00:00:00Z",
        "finishedAt": "2026-01-01T00:00:10Z",
    }
    state = {"name": "trainer", "image": "fake", "imageID": "fake", "ready": False, "restartCount": 0}
    status = {"phase": "Succeeded", "containerStatuses": [{**state, "state": {"terminated": terminated}}]}
    name = pod["metadata"]["name"]
    patch = json.dumps({"status": status})
    job.cluster.run("patch", "pod", name, "-n", job.namespace, "--subresource=status", "--type=merge", "-p", patch)


@pytest.fixture(scope="module")
def placed(api_server, nodes):
    """One two-node job per preset, brought to where its training pods run; (job, preparation pod, training pods)."""
    namespace = "placement"
    api_server.run("create", "namespace", namespace)
    jobs = {pool.preset: apply_job(api_server, namespace, _make_pool_job(pool.preset)) for pool in POOLS}
    prepared = {}

    def train():
        """Play every job's inspecting and preparing pods to their end; all training pods once they run."""
        for preset, job in jobs.items():
            for report, component in ((INSPECTED, "inspect"), (PREPARED, "prepare")):
                for pod in _running(job, component, 1) or ():
                    prepared[preset] = pod
                    _end_pod(job, pod, report)
        running = {preset: _running(job, "train", 2) for preset, job in jobs.items()}
        return running if all(running.values()) else None

    def describe():
        return "\n".join(job.describe() for job in jobs.values())

    running = eventually(train, within=240, otherwise=describe)
    yield {preset: (job, prepared[preset], running[preset]) for preset, job in jobs.items()}
    for job in jobs.values():
        api_server.run("delete", "finetunejob", job.name, "-n", job.namespace, "--timeout=60s")
    api_server.run("delete", "namespace", namespace, "--wait=false")


def _running(job, component, count):
    running = [pod for pod in job.pods(component) if pod["status"].get("phase") == "Running"]
    return running if len(running) == count else None


@pytest.mark.parametrize("preset", [pool.preset for pool in POOLS])
def test_two_pods_land_on_two_nodes_of_the_pool_and_zone_and_nowhere_else(placed, preset):
    _, _, pods = placed[preset]
    assert {pod["spec"]["nodeName"] for pod in pods} == {f"{preset}-0", f"{preset}-1"}


@pytest.mark.parametrize("preset", [pool.preset for pool in POOLS])
def test_preparation_lands_where_the_gpu_nodes_can_mount_its_volume(placed, preset, nodes):
    _, pod, _ = placed[preset]
    zone = {node["metadata"]["name"]: node["metadata"]["labels"][ZONE] for node in nodes}
    assert zone[pod["spec"]["nodeName"]] == "zone-1"


def test_each_node_knows_its_rank_and_where_the_first_one_is(placed):
    job, _, pods = placed["aks-a100"]
    indexes = sorted(int(pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"]) for pod in pods)
    assert indexes == [0, 1]
    run = json.loads(job.cluster.read("configmap", f"{job.name}-train-1", "-n", job.namespace)["data"]["run.json"])
    assert run["topology"]["nodes"] == 2
    assert run["topology"]["processes_per_node"] == 4
    assert run["topology"]["rendezvous_host"] == f"{job.name}-train-1-0.{job.name}-train"
    first = next(pod for pod in pods if pod["metadata"]["name"].startswith(f"{job.name}-train-1-0-"))
    assert first["spec"]["hostname"] == f"{job.name}-train-1-0"
    assert first["spec"]["subdomain"] == f"{job.name}-train"


def test_a_training_pod_refuses_voluntary_eviction(placed):
    job, _, pods = placed["aks-a100"]
    name = pods[0]["metadata"]["name"]
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": job.namespace}}
    path = f"/api/v1/namespaces/{job.namespace}/pods/{name}/eviction"

    def refused():
        with pytest.raises(ClusterError) as caught:
            job.cluster.run("create", "--raw", path, "-f", "-", stdin=json.dumps({**eviction, "dryRun": ["All"]}))
        return "disruption budget" in str(caught.value)

    eventually(refused, within=30, otherwise="the eviction was not refused by a disruption budget")


def test_a_job_with_a_queue_hands_the_queue_every_child(operator, api_server, namespace):
    job = apply_job(api_server, namespace, make_job("queued", placement={"queueName": "gpus"}))
    selector = f"finetune.dev/job={job.name}"

    def children():
        return api_server.read("jobs", "-n", job.namespace, "-l", selector)["items"]

    made = eventually(children, within=60, otherwise=job.describe)
    assert all(child["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus" for child in made)
