"""One job through everything that happens to a job in production, on a real cluster.

A gate holds it back, a pod is killed, the operator is killed, the API server restarts and the S3 server is away while
it runs; it is suspended and resumed; its finished pods go by TTL. The fixture lives through it once and keeps what it
saw; each test reads one promise from that.
"""

import dataclasses
import json
import urllib.request

import pytest

from tests.demo.demo import ask, make_s3_client
from tests.support.jobs import JobHandle, apply_job, make_job
from tests.support.waiting import eventually

NAMESPACE_PREFIX = "story"
TOTAL_STEPS = 400
UNREACHABLE = 1000


@dataclasses.dataclass
class Seen:
    """What the story leaves to be judged."""

    job: JobHandle
    prepared: dict
    killed_at: int
    suspended: dict
    held: dict
    finished: dict
    answer: str
    training_jobs: list[str]
    scraped: set[str]


@pytest.fixture(scope="module")
def seen(operator, world, make_namespace):
    namespace = make_namespace(NAMESPACE_PREFIX)
    job = apply_job(world.cluster, namespace, _make_story_job(f"s3://tests/{namespace}"))
    status = job.wait_for_state("Training", within=300)
    prepared = status["dataset"]
    killed_at = _kill_training_pod(world, job)
    _kill_operator(world, operator)
    world.tool("stop", "apiserver")
    world.tool("start", "apiserver")
    _wait_for_progress(job, beyond=killed_at)
    scraped = _read_scraped_metrics(world, job)
    suspended = _suspend(job)
    job.patch(suspend=False)
    held = _wait_for_gate(job)
    world.tool("stop", "s3")
    job.patch(evaluation={"gates": [{"task": "holdout", "metric": "loss", "min": 0}]})
    eventually(lambda: job.pods("publish"), within=120, otherwise=job.describe)
    world.tool("start", "s3")
    status = job.wait_for_state("Succeeded", within=420)
    with world.cluster.forward(namespace, "svc/story", 80) as url:
        answer = ask(url, status["serving"]["model"], "What does `os.getcwd` do?")
    training_jobs = _job_names(world, job)
    return Seen(job, prepared, killed_at, suspended, held, status, answer, training_jobs, scraped)


def _make_story_job(destination):
    return make_job(
        "story",
        training={"maxSteps": TOTAL_STEPS},
        checkpoint={"everySteps": 50, "retention": {"latest": 2}},
        resources={"processesPerNode": 2},
        evaluation={"gates": [{"task": "holdout", "metric": "loss", "min": UNREACHABLE}]},
        promotion={"destinations": [{"destination": destination, "secretRef": {"name": "s3"}}]},
        # From the copy in S3: what serves from the workspace is shown by the roll-out.
        inference={"enabled": True, "runtime": "transformers", "loadFrom": "S3"},
    )


def _wait_between_checkpoints(job):
    """Wait until a complete checkpoint exists and training has gone on beyond it; return the step."""

    def look():
        status = job.live_status()
        complete = (status.get("checkpoints") or {}).get("latestComplete") or 0
        step = (status.get("progress") or {}).get("step") or 0
        return step if complete and step > complete else 0

    return eventually(look, within=240, otherwise=job.describe, every=0.1)


def _kill_training_pod(world, job):
    """Kill the training pod between two checkpoints; return the step it was killed at."""
    step = _wait_between_checkpoints(job)
    pod = next(pod for pod in job.pods("train") if pod["status"]["phase"] == "Running")
    world.cluster.run("delete", "pod", pod["metadata"]["name"], "-n", job.namespace, "--grace-period=0", "--force")
    return step


def _kill_operator(world, namespace):
    """Delete the operator's pod without grace, and wait until another one is ready."""
    selector = "app.kubernetes.io/name=finetune-operator"
    before = world.cluster.read("pods", "-n", namespace, "-l", selector)["items"][0]["metadata"]["name"]
    world.cluster.run("delete", "pod", before, "-n", namespace, "--grace-period=0", "--force")
    world.cluster.run("rollout", "status", "deploy/finetune-operator", "-n", namespace, "--timeout=120s", timeout=130)


def _wait_for_progress(job, beyond):
    def look():
        status = job.live_status()
        return status.get("restarts") and ((status.get("progress") or {}).get("step") or 0) > beyond

    eventually(look, within=300, otherwise=job.describe)


def _suspend(job):
    """Suspend between two checkpoints; return the status that tells of the checkpoint that the pod then saved."""
    step = _wait_between_checkpoints(job)
    job.patch(suspend=True)
    job.wait_for_state("Suspended", within=120)
    eventually(lambda: not job.pods("train"), within=120, otherwise=job.describe)

    def look():
        status = job.status()
        return status if status["checkpoints"]["latestComplete"] >= step else None

    return eventually(look, within=30, otherwise=job.describe)


def _wait_for_gate(job):
    return job.wait_for_condition("Evaluated", "False", reason="EvaluationBelowGate", within=420)


def _let_finished_pods_go(world, job):
    job.patch(ttlSecondsAfterFinished=0)
    eventually(lambda: not _job_names(world, job), within=60, otherwise=job.describe)


def _job_names(world, job):
    selector = f"finetune.dev/job={job.name},finetune.dev/component=train"
    return [
        item["metadata"]["name"] for item in world.cluster.read("jobs", "-n", job.namespace, "-l", selector)["items"]
    ]


def _read_scraped_metrics(world, job):
    """Wait until Prometheus has scraped the operator and the training pod; return the names it has about this job."""

    def look():
        query = f'{{__name__=~"finetune_.+",name="{job.name}"}}'
        url = f"{world.prometheus_url}/api/v1/query?query={urllib.request.quote(query)}"
        with urllib.request.urlopen(url, timeout=10) as response:
            names = {entry["metric"]["__name__"] for entry in json.load(response)["data"]["result"]}
        return names if {"finetune_job_progress_ratio", "finetune_job_loss"} <= names else None

    return eventually(look, within=90, otherwise="no metrics of the job in Prometheus")


def test_the_job_succeeds_in_spite_of_all(seen):
    assert seen.finished["state"] == "Succeeded"
    conditions = {entry["type"]: entry["status"] for entry in seen.finished["conditions"]}
    assert conditions["Ready"] == conditions["Finished"] == conditions["Succeeded"] == "True"
    assert conditions["Reconciling"] == conditions["Stalled"] == "False"
    assert seen.finished["observedGeneration"] == seen.job.read()["metadata"]["generation"]


def test_the_filter_counts_every_row(seen):
    assert seen.prepared["rowsRead"] == 240
    assert seen.prepared["rowsKept"] + seen.prepared["rowsRemoved"] == 240
    assert seen.prepared["rowsRemoved"] >= 9


def test_training_resumed_from_a_complete_checkpoint_and_counted_the_restart(seen):
    first, second, *_ = seen.finished["attempts"]
    assert first["number"] == 1
    assert second.get("resumedFromStep", 0) > 0, seen.finished["attempts"]
    assert seen.finished["restarts"] >= 1


def test_suspending_saved_the_state_and_released_the_pods(seen):
    assert seen.suspended["state"] == "Suspended"
    resumed = seen.finished["attempts"][-1]["resumedFromStep"]
    assert resumed == seen.suspended["checkpoints"]["latestComplete"]
    assert resumed >= seen.suspended["progress"]["step"] - 1


def test_only_as_many_checkpoints_as_asked_for_are_kept_and_the_one_resumed_from(seen):
    checkpoints = seen.finished["checkpoints"]
    assert checkpoints["count"] in (2, 3)
    assert checkpoints["latestComplete"] == TOTAL_STEPS


def test_the_gate_held_the_model_back_and_said_why(seen):
    assert seen.held["reason"] == "EvaluationBelowGate"
    assert "holdout" in seen.held["message"]
    assert "evaluation.gates" in seen.held["message"]


def test_the_model_was_published_although_the_storage_was_away(seen, world):
    digest = seen.finished["promotion"]["digest"]
    client = make_s3_client(world.storage)
    keys = {
        entry["Key"] for entry in client.list_objects_v2(Bucket="tests", Prefix=f"{seen.job.namespace}/")["Contents"]
    }
    assert any(digest in key and key.endswith(".safetensors") for key in keys), keys


def test_the_endpoint_answers(seen):
    assert seen.finished["serving"]["ready"] is True
    assert seen.finished["serving"]["digest"] == seen.finished["promotion"]["digest"]
    assert isinstance(seen.answer, str)


def test_the_operators_death_made_no_second_training_job(seen):
    numbers = sorted(int(name.rpartition("-")[2]) for name in seen.training_jobs)
    assert len(numbers) == len(set(numbers))
    assert numbers[-1] == seen.finished["attempts"][-1]["number"]


def test_prometheus_has_the_jobs_metrics(seen):
    assert {"finetune_job_progress_ratio", "finetune_job_loss"} <= seen.scraped


def test_after_its_time_to_live_the_pods_go_and_the_model_is_still_served(seen, world):
    job = seen.job
    _let_finished_pods_go(world, job)
    selector = "finetune.dev/endpoint=story"
    (version,) = world.cluster.read("deployments", "-n", job.namespace, "-l", selector)["items"]
    assert version["status"]["readyReplicas"] == 1
    volumes = version["spec"]["template"]["spec"]["volumes"]
    assert not [each for each in volumes if "persistentVolumeClaim" in each], "it serves the copy in S3"
    assert job.status()["state"] == "Succeeded"


def test_deleting_the_job_leaves_its_workspace_and_takes_the_rest(seen, world, operator):
    job = seen.job
    _let_finished_pods_go(world, job)
    world.cluster.run("delete", "finetunejob", job.name, "-n", job.namespace, "--timeout=90s", timeout=100)
    kinds = "pods,jobs,services,deployments"

    def gone():
        return not world.cluster.read(kinds, "-n", job.namespace, "-l", f"finetune.dev/job={job.name}")["items"]

    eventually(gone, within=90, otherwise=lambda: world.cluster.run("get", kinds, "-n", job.namespace))
    claim = world.cluster.read("pvc", f"{job.name}-workspace", "-n", job.namespace)
    assert claim["status"]["phase"] == "Bound"
