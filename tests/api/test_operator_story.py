"""Jobs from apply to the end with the real operator on a real API server; the test plays the kubelet."""

from __future__ import annotations

import datetime
import json

import pytest

from tests.support.played_job import PlayedJob
from tests.support.waiting import eventually

SERVED = {"inference": {"enabled": True}}


@pytest.fixture
def job(operator, kubelet):
    return PlayedJob(kubelet, "story")


def test_a_job_goes_from_apply_to_a_served_model(job, kubelet):
    job.apply(**SERVED).prepare()
    status = job.complete(served=True)
    conditions = {each["type"]: each["status"] for each in status["conditions"]}
    assert {name for name, value in conditions.items() if value == "True"} >= {
        *("Ready", "Validated", "ModelReady", "DatasetReady", "Scheduled", "Promoted", "Evaluated", "Deployed"),
        *("Succeeded", "Finished"),
    }
    assert (conditions["Reconciling"], conditions["Stalled"]) == ("False", "False")
    assert status["dataset"] == {
        "rowsRead": 1000,
        "rowsKept": 950,
        "rowsRemoved": 50,
        "tokens": 95000,
        "report": "reports/prepare.json",
    }
    assert status["serving"] == {
        "ready": True,
        "url": f"http://story.{job.namespace}.svc/v1",
        "model": "story",
        "version": "abc123",
        "digest": "abc123",
        "adapters": [],
        "timeToFirstTokenSeconds": 0.25,
        "tokensPerSecond": 40.0,
    }
    assert job.jobs() == ["evaluate", "inspect", "prepare", "promote", "train-1"]
    for reason in ("Validated", "DatasetReady", "AttemptStarted", "Promoted", "Succeeded"):
        job.wait_for_event(reason)


def test_the_first_status_is_already_in_progress_for_its_generation(job):
    job.apply()
    status = job.wait(lambda status: status.get("conditions"))
    conditions = {each["type"]: (each["status"], each["observedGeneration"]) for each in status["conditions"]}
    assert status["observedGeneration"] == 1
    assert (conditions["Ready"], conditions["Reconciling"]) == (("Unknown", 1), ("True", 1))


def test_training_that_fails_restarts_as_the_next_attempt_and_counts(job, kubelet):
    job.apply().prepare()
    (pod,) = job.train()
    kubelet.fail(pod, 1, "RankFailed", "rank 0: IndexError: list index out of range", details={"latest_complete": 40})
    job.wait_for_event("AttemptEnded")
    status = job.complete(attempt=2, resumed_from_step=40)
    assert (status["restarts"], status["restartsCountTowardsMax"]) == (1, 1)
    assert [(each["number"], each["reason"]) for each in status["attempts"]] == [(1, "RankFailed"), (2, "Completed")]
    assert status["checkpoints"] == {"latestComplete": 100, "count": 3, "resumedFrom": 40}
    assert "IndexError: list index out of range" in status["lastFailure"]["message"]


def test_a_node_that_is_taken_away_does_not_use_up_a_restart(job, kubelet):
    job.apply(failurePolicy={"maxRestarts": 0}).prepare()
    (pod,) = job.train()
    kubelet.mark(pod, "DisruptionTarget", "True", "PreemptionByScheduler", "preempted by a pod of higher priority")
    kubelet.end(pod, 137, "", "Error")
    status = job.complete(attempt=2)
    assert (status["restarts"], status["restartsCountTowardsMax"]) == (1, 0)
    assert status["attempts"][0]["reason"] == "Preempted"


def test_a_deleted_training_pod_is_followed_by_another_attempt(job, kubelet):
    job.apply().prepare()
    (pod,) = job.train()
    path = f"/api/v1/namespaces/{job.namespace}/pods/{pod['metadata']['name']}"
    kubelet.rest.request("DELETE", path)
    kubelet.end(pod, 137, "", "Error")
    kubelet.delete(pod)
    status = job.complete(attempt=2)
    assert status["restarts"] == 1
    assert status["attempts"][0]["reason"] in ("PodDeleted", "Interrupted")


def test_an_error_that_would_only_repeat_fails_the_job_at_once(job, kubelet):
    job.apply().prepare()
    (pod,) = job.train()
    kubelet.fail(pod, 79, "CUDAOutOfMemory", "rank 0 ran out of memory", hint="set training.perDeviceBatchSize: 4")
    status = job.wait_for_state("Failed")
    assert status["lastFailure"]["hint"] == "set training.perDeviceBatchSize: 4"
    assert job.condition("Finished")["status"] == "True"
    assert job.condition("Succeeded")["status"] == "False"
    assert job.condition("Stalled")["reason"] == "CUDAOutOfMemory"
    assert job.condition("Reconciling")["status"] == "False"


def test_a_failed_job_is_taken_up_again_when_its_spec_is_mended(job, kubelet):
    job.apply().prepare()
    (pod,) = job.train()
    kubelet.fail(pod, 79, "CUDAOutOfMemory", "rank 0 ran out of memory")
    job.wait_for_state("Failed")
    job.patch(training={"perDeviceBatchSize": 1, "gradientAccumulationSteps": None})
    status = job.complete(attempt=2)
    assert status["state"] == "Succeeded"
    run = json.loads(job.child("/api/v1", "configmaps", "story-train-2")["data"]["run.json"])
    assert (run["training"]["per_device_batch_size"], run["training"]["gradient_accumulation_steps"]) == (1, 2)


def test_restarts_run_out(job, kubelet):
    job.apply(failurePolicy={"maxRestarts": 1}).prepare()
    for attempt in (1, 2):
        (pod,) = job.train(attempt)
        kubelet.fail(pod, 1, "RankFailed", f"boom {attempt}")
    job.wait_for_state("Failed")
    stalled = job.condition("Stalled")
    assert stalled["reason"] == "RestartsExhausted"
    assert "failurePolicy.maxRestarts" in stalled["message"]
    assert "boom 2" in stalled["message"]


def test_suspend_saves_and_removes_the_job_and_resume_goes_on(job, kubelet):
    job.apply().prepare()
    (pod,) = job.train()
    job.patch(suspend=True)
    eventually(
        lambda: (job.job("train-1") or {"metadata": {"deletionTimestamp": 1}})["metadata"].get("deletionTimestamp"),
        within=15,
    )
    kubelet.end(pod, 75, "")
    kubelet.let_go("story")
    job.wait_for_state("Suspended")
    eventually(lambda: job.jobs() == ["inspect", "prepare"], within=15, otherwise=job.describe)
    assert job.condition("Suspended")["status"] == "True"
    assert job.condition("Stalled")["status"] == "False"
    job.patch(suspend=False)
    status = job.complete(attempt=2)
    assert (status["restarts"], status["attempts"][0]["reason"]) == (0, "Suspended")


def test_a_resumed_job_waits_for_its_old_pods(job, kubelet):
    job.apply().prepare()
    (pod,) = job.train()
    job.patch(suspend=True)
    job.wait_for_state("Suspended")
    job.patch(suspend=False)
    job.wait(lambda status: any("waiting for pod" in each["message"] for each in status["conditions"]))
    assert job.job("train-2") is None
    kubelet.end(pod, 75, "")
    kubelet.let_go("story")
    assert job.complete(attempt=2)["state"] == "Succeeded"


def test_a_finished_job_gives_up_its_pods_and_never_trains_again(job, kubelet):
    job.apply(ttlSecondsAfterFinished=1, **SERVED).prepare()
    job.complete(served=True)
    eventually(lambda: not job.jobs(), within=20, otherwise=job.describe)
    job.patch(ttlSecondsAfterFinished=0)
    job.wait(lambda status: status["observedGeneration"] == 2)
    assert job.jobs() == []
    assert job.condition("Deployed")["status"] == "True"
    assert job.versions()
    assert job.child("/api/v1", "persistentvolumeclaims", "story-workspace") is not None


def test_a_deleted_job_takes_its_endpoint_and_leaves_its_workspace(job, kubelet):
    job.apply(**SERVED).prepare()
    job.complete(served=True)
    job.delete()
    eventually(lambda: job.read() is None, within=20, otherwise=job.describe)
    eventually(lambda: not job.versions(), within=40, otherwise="a version is still there")
    for api, kind, name in (
        ("/api/v1", "services", "story"),
        ("/api/v1", "configmaps", "story-record"),
        ("/apis/batch/v1", "jobs", "story-train-1"),
    ):
        eventually(lambda: job.child(api, kind, name) is None, within=40, otherwise=f"{kind} {name} is still there")  # noqa: B023
    assert job.child("/api/v1", "persistentvolumeclaims", "story-workspace") is not None


def test_a_retained_endpoint_outlives_its_job(job, kubelet):
    job.apply(inference={"enabled": True, "onDelete": "Retain"}).prepare()
    job.complete(served=True)
    assert job.read()["metadata"].get("finalizers") is None
    job.delete()
    eventually(lambda: job.read() is None, within=20, otherwise=job.describe)
    eventually(lambda: job.child("/apis/batch/v1", "jobs", "story-train-1") is None, within=40)
    assert job.versions()


def test_a_later_job_takes_the_endpoint_over(job, kubelet):
    job.apply(**SERVED).prepare()
    job.complete(served=True)
    later = PlayedJob(kubelet, "later").apply(inference={"enabled": True, "endpoint": "story"}).prepare()
    kubelet.finish_training("later", 1)
    kubelet.finish_phase("later", "promote", digest="def456")
    kubelet.finish_phase("later", "evaluate")
    eventually(lambda: len(job.versions()) == 2, within=20)
    assert read_live(job) == "abc123"
    assert job.condition("Deployed")["status"] == "True"
    kubelet.answer("story", "later")
    assert later.wait_for_state("Succeeded")["serving"]["digest"] == "def456"
    assert read_live(job) == "def456"
    assert job.wait_for_condition("Deployed", "False", "TakenOver")
    job.delete()
    eventually(lambda: job.read() is None, within=20)
    assert read_live(job) == "def456"


def read_live(job):
    """Return the digest of the model that the endpoint's Service gives the traffic to."""
    service = job.child("/api/v1", "services", "story")
    (live,) = [
        each
        for each in job.versions()
        if each["metadata"]["labels"]["finetune.dev/version"] == service["spec"]["selector"]["finetune.dev/version"]
    ]
    digests = {each["metadata"]["annotations"]["finetune.dev/model-digest"] for each in (service, live)}
    assert len(digests) == 1
    return digests.pop()


def test_a_version_that_answers_nonsense_leaves_the_one_before_answering(job, kubelet):
    job.apply(**SERVED).prepare()
    job.complete(served=True)
    job.patch(inference={"version": "older"})
    (pod,) = kubelet.wait_for_pods("story", "smoke")
    kubelet.fail(pod, 65, "SmokePromptFailed", "the smoke prompt was not answered: HTTP 500: boom")
    stalled = job.wait_for_condition("Stalled", "True", "SmokePromptFailed")
    assert "HTTP 500: boom" in stalled["message"]
    assert read_live(job) == "abc123"
    job.patch(inference={"version": None})
    job.wait_for_condition("Ready", "True")
    eventually(lambda: [each["spec"]["replicas"] for each in job.versions()] == [1, 0], within=20)


def test_an_endpoint_that_was_damaged_by_hand_is_mended(job, kubelet):
    job.apply(**SERVED).prepare()
    job.complete(served=True)
    (version,) = job.versions()
    path = f"/apis/apps/v1/namespaces/{job.namespace}/deployments/{version['metadata']['name']}"
    kubelet.rest.merge(path, {"spec": {"replicas": 0}})
    eventually(lambda: kubelet.rest.get(path)["spec"]["replicas"] == 1, within=20)


def test_a_gate_that_is_not_passed_fails_the_job_until_it_is_lowered(job, kubelet):
    job.apply(evaluation={"gates": [{"task": "holdout", "metric": "perplexity", "maxRegression": 0}]}).prepare()
    kubelet.finish_training("story", 1)
    kubelet.finish_phase("story", "promote")
    worse = {"scores": {"holdout": {"perplexity": 9.0}}, "baseline": {"holdout": {"perplexity": 8.0}}}
    kubelet.finish_phase("story", "evaluate", **worse)
    job.wait_for_condition("Evaluated", "False", "EvaluationBelowGate")
    (gate,) = job.status()["evaluation"]["gates"]
    assert (gate["verdict"], gate["score"], gate["baseline"], gate["maxRegression"]) == ("Failed", 9.0, 8.0, 0)
    assert job.status()["evaluation"]["gate"] == "Failed"
    scored = job.job("evaluate")["metadata"]["uid"]
    job.patch(evaluation={"gates": [{"task": "holdout", "metric": "perplexity", "maxRegression": 1.5}]})
    status = job.wait_for_state("Succeeded")
    assert status["evaluation"]["gate"] == "Passed"
    assert status["evaluation"]["gates"][0]["verdict"] == "Passed"
    # Judged again with the scores there are: the same Job, and nothing trained.
    assert job.job("evaluate")["metadata"]["uid"] == scored
    assert [each["number"] for each in status["attempts"]] == [1]


def test_a_job_that_runs_too_long_fails(job, kubelet):
    job.apply(activeDeadlineSeconds=3).prepare()
    job.train()
    job.wait_for_state("Failed")
    assert job.condition("Stalled")["reason"] == "DeadlineExceeded"
    eventually(lambda: "train-1" not in job.jobs(), within=15, otherwise=job.describe)


def test_two_nodes_get_two_ranks_on_two_nodes(job, kubelet):
    job.apply(resources={"nodes": 2}, workspace={"accessMode": "ReadWriteMany"}).prepare()
    pods = job.train(count=2)
    assert sorted(pod["spec"]["hostname"] for pod in pods) == ["story-train-1-0", "story-train-1-1"]
    terms = pods[0]["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert terms[0]["topologyKey"] == "kubernetes.io/hostname"
    run = json.loads(job.child("/api/v1", "configmaps", "story-train-1")["data"]["run.json"])
    assert run["topology"]["rendezvous_host"] == "story-train-1-0.story-train"
    assert job.complete()["state"] == "Succeeded"


def test_the_queue_label_is_on_every_job_and_a_queued_job_says_so(job, kubelet):
    job.apply(placement={"queueName": "team-a"})
    job.wait_for_state("Queued")
    found = eventually(lambda: job.job("inspect"), within=10)
    assert found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    kubelet.rest.merge(f"/apis/batch/v1/namespaces/{job.namespace}/jobs/story-inspect", {"spec": {"suspend": False}})
    kubelet.finish_phase("story", "inspect")
    found = eventually(lambda: job.job("prepare"), within=10)
    assert (found["spec"]["suspend"], found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]) == (True, "team-a")


def test_times_of_the_status_are_those_of_what_happened(job, kubelet):
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    job.apply().prepare()
    status = job.complete()
    times = [datetime.datetime.fromisoformat(status[name]) for name in ("startTime", "completionTime")]
    assert before <= times[0] <= times[1] <= datetime.datetime.now(datetime.UTC)
