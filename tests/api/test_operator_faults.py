"""Bad input and faults: each ends in a clear condition and an event, and passes by itself once it is mended."""

from __future__ import annotations

import json

import pytest

from tests.support.played_job import PlayedJob
from tests.support.waiting import eventually


@pytest.fixture
def job(operator, kubelet):
    return PlayedJob(kubelet, "faulty")


def test_a_missing_secret_is_named_and_the_job_goes_on_once_it_is_there(job, kubelet):
    job.apply()
    (pod,) = kubelet.wait_for_pods("faulty", "inspect")
    kubelet.wait_reason(pod, "CreateContainerConfigError", 'secret "s3" not found')
    stalled = job.wait_for_condition("Stalled", "True", "SecretNotFound")
    assert f"kubectl -n {job.namespace} create secret generic s3" in stalled["message"]
    job.wait_for_event("SecretNotFound")
    kubelet.succeed(pod, "inspect")
    job.wait_for_condition("Stalled", "False")
    assert job.prepare_after_inspect().complete()["state"] == "Succeeded"


def test_an_image_that_cannot_be_pulled_is_named(job, kubelet):
    job.apply().prepare()
    (pod,) = kubelet.wait_for_pods("faulty", "train")
    kubelet.wait_reason(pod, "ImagePullBackOff", 'Back-off pulling image "example.org/trainer:1"')
    stalled = job.wait_for_condition("Stalled", "True", "ImagePullFailed")
    assert "example.org/trainer:1" in stalled["message"]
    assert "pod.imagePullSecrets" in stalled["message"]


def test_pods_that_fit_nowhere_say_why_within_the_grace(job, kubelet):
    job.apply().prepare()
    (pod,) = kubelet.wait_for_pods("faulty", "train")
    kubelet.mark(
        pod, "PodScheduled", "False", "Unschedulable", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu"
    )
    scheduled = job.wait_for_condition("Scheduled", "False", "Unschedulable", within=15)
    assert "3 Insufficient nvidia.com/gpu" in scheduled["message"]
    # A cluster autoscaler may still bring a node: no human is called yet.
    assert job.condition("Stalled")["status"] == "False"
    job.wait_for_event("Unschedulable")
    kubelet.run(pod)
    job.wait_for_condition("Scheduled", "True")


def test_pods_that_never_run_end_at_the_startup_deadline(job, kubelet):
    job.apply(startupDeadlineSeconds=2).prepare()
    job.wait_for_condition("Finished", "True", "StartupDeadlineExceeded")
    assert "0 of 1 pods ran" in job.condition("Stalled")["message"]


def test_a_quota_that_refuses_pods_is_quoted(job, kubelet):
    quota = {"metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    kubelet.rest.request("POST", f"/api/v1/namespaces/{job.namespace}/resourcequotas", quota)
    eventually(
        lambda: (
            kubelet.rest.get(f"/api/v1/namespaces/{job.namespace}/resourcequotas/none").get("status", {}).get("hard")
        ),
        within=15,
    )
    job.apply()
    stalled = job.wait_for_condition("Stalled", "True", "PodsRefused")
    assert "exceeded quota: none" in stalled["message"]


def test_an_unknown_storage_class_is_named(job, kubelet):
    job.apply(workspace={"storageClassName": "fastest"})
    kubelet.finish_phase("faulty", "inspect")
    stalled = job.wait_for_condition("StorageReady", "False", "StorageClassNotFound")
    assert "no StorageClass fastest" in stalled["message"]
    assert job.condition("Stalled")["status"] == "True"


def test_an_existing_claim_that_is_not_there_is_named_and_waited_for(job, kubelet):
    job.apply(workspace={"existingClaim": "shared"})
    kubelet.finish_phase("faulty", "inspect")
    job.wait_for_condition("StorageReady", "False", "ClaimNotFound")
    claim = {
        "metadata": {"name": "shared"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "50Gi"}}},
    }
    kubelet.rest.request("POST", f"/api/v1/namespaces/{job.namespace}/persistentvolumeclaims", claim)
    (pod,) = kubelet.wait_for_pods("faulty", "prepare")
    (mount,) = [each for each in pod["spec"]["containers"][0]["volumeMounts"] if each["name"] == "workspace"]
    assert mount["subPath"] == "faulty"


def test_a_workspace_that_is_too_small_is_refused_with_both_numbers_until_it_is_enlarged(job, kubelet):
    job.apply(workspace={"size": "100Gi"})
    kubelet.finish_phase("faulty", "inspect", model_parameters=6_738_415_616, model_bytes=13_500_000_000)
    stalled = job.wait_for_condition("StorageReady", "False", "WorkspaceTooSmall")
    assert "workspace.size: 100.0 GiB is less than the 376.6 GiB" in stalled["message"]
    assert "ask for 453Gi" in stalled["message"]
    assert "prepare" not in job.jobs()
    job.patch(workspace={"size": "600Gi"})
    kubelet.wait_for_pods("faulty", "prepare")
    claim = job.child("/api/v1", "persistentvolumeclaims", "faulty-workspace")
    assert claim["spec"]["resources"]["requests"]["storage"] == "600Gi"


@pytest.mark.parametrize(
    ("code", "reason", "condition"),
    [
        (66, "DatasetNotFound", "DatasetReady"),
        (66, "ModelNotFound", "ModelReady"),
        (77, "CredentialsRefused", "ModelReady"),
    ],
)
def test_what_inspect_cannot_find_fails_the_job_until_the_url_is_mended(job, kubelet, code, reason, condition):
    job.apply()
    (pod,) = kubelet.wait_for_pods("faulty", "inspect")
    kubelet.fail(pod, code, reason, "s3://tests/models/tiny: no such object", hint="check model.source")
    failed = job.wait_for_condition(condition, "False", reason)
    assert "s3://tests/models/tiny: no such object" in failed["message"]
    assert job.condition("Finished")["status"] == "True"
    job.wait_for_event(reason)
    job.patch(model={"source": "s3://tests/models/other"})
    fresh = eventually(
        lambda: [
            each
            for each in kubelet.wait_for_pods("faulty", "inspect")
            if each["metadata"]["name"] != pod["metadata"]["name"]
        ],
        within=20,
        otherwise=job.describe,
    )
    kubelet.succeed(fresh[0], "inspect")
    assert job.prepare_after_inspect().complete()["state"] == "Succeeded"


def test_data_that_the_filter_empties_fails_the_job(job, kubelet):
    job.apply()
    kubelet.finish_phase("faulty", "inspect")
    (pod,) = kubelet.wait_for_pods("faulty", "prepare")
    kubelet.fail(pod, 65, "DatasetEmptyAfterFilter", "all 12 rows were removed", hint="see dataset.filter")
    job.wait_for_condition("DatasetReady", "False", "DatasetEmptyAfterFilter")
    assert job.status()["lastFailure"]["hint"] == "see dataset.filter"


def test_storage_that_is_away_is_tried_again_and_said_so(job, kubelet):
    job.apply()
    (pod,) = kubelet.wait_for_pods("faulty", "inspect")
    kubelet.fail(pod, 69, "SourceUnavailable", "http://s3: connection refused")
    job.wait(lambda status: any("tried again" in each["message"] for each in status["conditions"]))
    assert job.condition("Finished")["status"] == "False"
    (fresh,) = kubelet.wait_for_pods("faulty", "inspect", within=40)
    kubelet.succeed(fresh, "inspect")
    assert job.prepare_after_inspect().complete()["state"] == "Succeeded"


def test_a_pod_that_the_kernel_killed_for_memory_says_so(job, kubelet):
    job.apply(failurePolicy={"maxRestarts": 0}).prepare()
    (pod,) = job.train()
    kubelet.end(pod, 137, "the last line of its log", "OOMKilled")
    job.wait_for_state("Failed")
    failure = job.status()["lastFailure"]
    assert (failure["reason"], failure["exitCode"]) == ("OutOfMemoryKilled", 137)
    assert "the last line of its log" in failure["message"]
    assert "resources.memory" in failure["hint"]


def bind_claim(kubelet, job: PlayedJob, size: str) -> None:
    """Play the storage provider: an expandable class, and a volume that the job's claim is bound to."""
    claim = {"namespace": job.namespace, "name": f"{job.name}-workspace"}
    classes = "/apis/storage.k8s.io/v1/storageclasses"
    if kubelet.rest.find(f"{classes}/expandable") is None:
        made = {"metadata": {"name": "expandable"}, "provisioner": "example.org/none", "allowVolumeExpansion": True}
        kubelet.rest.request("POST", classes, made)
    kubelet.finish_phase(job.name, "inspect")
    path = f"/api/v1/namespaces/{job.namespace}/persistentvolumeclaims/{job.name}-workspace"
    eventually(lambda: kubelet.rest.find(path), within=15)
    volume = {
        "metadata": {"name": f"volume-{job.namespace}"},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "capacity": {"storage": size},
            "storageClassName": "expandable",
            "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", **claim},
            "hostPath": {"path": "/none"},
        },
    }
    kubelet.rest.request("POST", "/api/v1/persistentvolumes", volume)
    eventually(lambda: kubelet.rest.get(path)["status"].get("phase") == "Bound", within=30)


def test_a_full_disk_waits_for_room_and_goes_on(job, kubelet):
    bind_claim(kubelet, job.apply(workspace={"size": "5Gi", "storageClassName": "expandable"}), "5Gi")
    (pod,) = job.prepare_after_inspect().train()
    kubelet.fail(pod, 73, "StorageFull", "no space left on device", details={"latest_complete": 20})
    stalled = job.wait_for_condition("Stalled", "True", "StorageFull")
    assert "workspace.size" in stalled["message"]
    assert job.jobs() == ["inspect", "prepare", "train-1"]
    path = f"/api/v1/namespaces/{job.namespace}/persistentvolumeclaims/faulty-workspace"
    job.patch(workspace={"size": "20Gi"})
    eventually(lambda: kubelet.rest.get(path)["spec"]["resources"]["requests"]["storage"] == "20Gi", within=15)
    kubelet.rest.merge(f"{path}/status", {"status": {"capacity": {"storage": "20Gi"}}})
    assert job.complete(attempt=2)["state"] == "Succeeded"


def test_what_the_administrators_forbid_is_refused_before_anything_is_made(job, kubelet):
    job.apply(model={"source": "pvc://models/base", "secretRef": None})
    validated = job.wait_for_condition("Validated", "False")
    assert "workspace.existingClaim" in validated["message"]
    assert job.jobs() == []
    job.patch(model={"source": "s3://tests/models/tiny"})
    job.wait_for_condition("Validated", "True")


def test_an_endpoint_whose_name_is_taken_says_so_and_leaves_the_other_alone(job, kubelet):
    service = {"metadata": {"name": "faulty"}, "spec": {"ports": [{"port": 80}]}}
    kubelet.rest.request("POST", f"/api/v1/namespaces/{job.namespace}/services", service)
    job.apply(inference={"enabled": True}).prepare()
    kubelet.finish_training("faulty", 1)
    for phase in ("promote", "evaluate"):
        kubelet.finish_phase("faulty", phase)
    job.wait_for_condition("Deployed", "False", "EndpointTaken")
    assert "selector" not in job.child("/api/v1", "services", "faulty")["spec"]


def test_secrets_that_a_pod_prints_reach_neither_status_nor_events_nor_the_log(job, kubelet, operator):
    job.apply(failurePolicy={"maxRestarts": 0}).prepare()
    (pod,) = job.train()
    token, key = "hf_abcdefghijklmnopqrstuvwx", "wJalrXUtnFEMIbPxRfiCYEXAMPLEKEY"
    kubelet.end(pod, 1, f"failed with HF_TOKEN={token} and AWS_SECRET_ACCESS_KEY={key} at https://me:{key}@host/")
    job.wait_for_state("Failed")
    job.wait_for_event("AttemptEnded")
    record = job.child("/api/v1", "configmaps", "faulty-record")
    everything = json.dumps([job.read(), job.events(), record]) + operator.log()
    assert "[redacted]" in everything
    assert token not in everything
    assert key not in everything


def test_a_node_with_a_broken_device_is_avoided_by_the_next_attempt(job, kubelet):
    job.apply().prepare()
    (pod,) = job.train()
    kubelet.fail(pod, 81, "XidError", "rank 0: NVRM: Xid (PCI:0000:c1:00): 79, GPU has fallen off the bus.")
    (pod,) = kubelet.wait_for_pods("faulty", "train", attempt=2)
    terms = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = terms["nodeSelectorTerms"]
    avoided = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["node-a"]}
    assert avoided in term["matchExpressions"]
    (node,) = job.wait(lambda status: status.get("excludedNodes"))["excludedNodes"]
    assert (node["name"], node["reason"]) == ("node-a", "XidError")
    assert node["until"] > job.status()["lastFailure"]["time"]
    assert "node node-a is avoided until" in job.wait_for_event("NodeExcluded")["message"]


def test_a_hang_names_the_pod_whose_rank_holds_up_the_others(job, kubelet):
    job.apply(resources={"nodes": 2}, failurePolicy={"progressDeadlineSeconds": 600}).prepare()
    pods = job.train(count=2)
    run = job.child("/api/v1", "configmaps", "faulty-train-1")
    assert json.loads(run["data"]["run.json"])["progress_deadline_seconds"] == 600
    stuck = pods[0]
    for rank, pod in enumerate(pods):
        place = {"at": "data.py:7 in read" if pod is stuck else "distributed.py:79 in any", "waits": pod is not stuck}
        kubelet.fail(pod, 83, "NoProgress", "no step for 600 s", details={"stacks": {str(rank): place}})
    failure = job.wait(lambda status: status.get("lastFailure"))["lastFailure"]
    assert (failure["reason"], failure["exitCode"], failure["pod"]) == ("NoProgress", 83, stuck["metadata"]["name"])
    assert "rank 0 stands at data.py:7 in read; rank 1 waits for the others" in failure["message"]
    kubelet.wait_for_pods("faulty", "train", count=2, attempt=2)
