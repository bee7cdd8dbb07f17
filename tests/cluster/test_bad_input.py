"""What each bad input gets on a real cluster: a reason in the Stalled condition, an event, and what to type instead.

All jobs are applied at once, because each waits for pods of its own; each test then reads one verdict.
"""

import dataclasses

import pytest

from tests.support.jobs import apply_job, make_job
from tests.support.waiting import eventually


@dataclasses.dataclass(frozen=True)
class Case:
    """One mistake and what its author has to be told."""

    name: str
    spec: dict
    reason: str
    message: tuple[str, ...]
    """Fragments that the message must hold: where the mistake is, and what to do."""
    failed: bool = True
    """Whether the job has failed for good; otherwise it waits for the mistake to be mended."""
    condition: tuple[str, str] = ("Stalled", "True")
    """Where it stands. Pods that fit nowhere stall a job only after a while: nodes may be on their way."""


CASES = (
    Case(
        "dataset-missing",
        {"dataset": {"source": "s3://tests/datasets/nowhere.json"}},
        "DatasetNotFound",
        ("s3://tests/datasets/nowhere.json", "dataset.source"),
    ),
    Case("dataset-empty", {"dataset": {"source": "s3://tests/datasets/empty.json"}}, "DatasetEmpty", ("empty.json",)),
    Case(
        "dataset-broken",
        {"dataset": {"source": "s3://tests/datasets/broken.jsonl"}},
        "DatasetInvalid",
        ("broken.jsonl", "line 3"),
    ),
    Case(
        "dataset-refused",
        {"dataset": {"source": "s3://tests/datasets/refusals.json"}},
        "DatasetEmptyAfterFilter",
        ("filter",),
    ),
    Case(
        "model-missing",
        {"model": {"source": "s3://tests/models/nowhere"}},
        "ModelNotFound",
        ("s3://tests/models/nowhere", "model.source"),
    ),
    Case("model-broken", {"model": {"source": "s3://tests/models/broken"}}, "ModelInvalid", ("config.json",)),
    Case(
        "bad-credentials",
        {"model": {"secretRef": {"name": "wrong"}}},
        "CredentialsRefused",
        ("secretRef",),
    ),
    Case(
        "secret-missing",
        {"dataset": {"secretRef": {"name": "absent"}}},
        "SecretNotFound",
        ("absent",),
        failed=False,
    ),
    Case(
        "workspace-small",
        {"workspace": {"size": "1Mi"}},
        "WorkspaceTooSmall",
        ("workspace.size", "1.0 MiB", "ask for"),
        failed=False,
    ),
    Case(
        "class-unknown",
        {"workspace": {"storageClassName": "imaginary"}},
        "StorageClassNotFound",
        ("imaginary", "workspace.storageClassName"),
        failed=False,
    ),
    Case(
        "image-unpullable",
        {"pod": {"image": "registry.invalid/trainer:none"}},
        "ImagePullFailed",
        ("registry.invalid/trainer:none",),
        failed=False,
    ),
    Case(
        "gpus-absent",
        {"resources": {"gpusPerNode": 1, "processesPerNode": 1}},
        "Unschedulable",
        ("nvidia.com/gpu",),
        failed=False,
        condition=("Scheduled", "False"),
    ),
    Case(
        "memory-small",
        {"training": {"pod": {"resources": {"limits": {"memory": "96Mi"}}}}},
        "OutOfMemoryKilled",
        ("pod memory-small-train-1-0", "exit code 137", "raise resources.memory"),
    ),
    Case(
        "trainer-error",
        {"training": {"deepspeed": {"config": {"zero_optimization": {"stage": "many"}}}}},
        "InvalidConfig",
        ("pod trainer-error-train-1-0", "rank 0", "training.deepspeed.config"),
    ),
)


@pytest.fixture(scope="module")
def jobs(operator, world, make_namespace):
    namespace = make_namespace("bad")
    world.write_secret(namespace, "wrong", access_key="nobody", secret_key="wrong-secret-value")
    return {case.name: apply_job(world.cluster, namespace, make_job(case.name, **case.spec)) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_mistake_is_named_with_its_remedy(jobs, case):
    job = jobs[case.name]
    said = job.wait_for_condition(*case.condition, reason=case.reason, within=240)
    for fragment in case.message:
        assert fragment in said["message"], said["message"]
    finished = job.condition("Finished").get("status")
    assert finished == ("True" if case.failed else "False")
    event = eventually(
        lambda: next((event for event in job.events() if event["reason"] == case.reason), None),
        within=20,
        otherwise=lambda: str([event["reason"] for event in job.events()]),
    )
    assert event["type"] == "Warning"


def test_a_job_goes_on_by_itself_once_its_secret_appears(jobs, world):
    job = jobs["secret-missing"]
    job.wait_for_condition("Stalled", reason="SecretNotFound", within=240)
    world.write_secret(job.namespace, "absent")
    job.wait_for_condition("DatasetReady", within=180)
    job.patch(suspend=True)


def test_no_secret_value_stands_in_any_status_event_or_log(jobs, world, operator):
    namespace = next(iter(jobs.values())).namespace
    cluster = world.cluster
    texts = [
        cluster.run("get", "finetunejobs,events,configmaps,jobs,pods", "-n", namespace, "-o", "json"),
        cluster.run("logs", "-n", operator, "deploy/finetune-operator", "--tail=-1"),
        *(
            cluster.run("logs", pod["metadata"]["name"], "-n", namespace, "--ignore-errors")
            for pod in cluster.read("pods", "-n", namespace)["items"]
            if pod["status"]["phase"] in ("Succeeded", "Failed")
        ),
    ]
    for text in texts:
        assert world.storage.secret_key not in text
        assert "wrong-secret-value" not in text
