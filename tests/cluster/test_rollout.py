"""An endpoint through its versions while it is asked all the time: take-over, a broken candidate, a roll-back.

The fixture lives through it once; each test reads one promise from what it saw.
"""

import dataclasses

import pytest

from tests.support.jobs import apply_job, make_job
from tests.support.load import Load, list_failed
from tests.support.waiting import eventually

ENDPOINT = "support"
BROKEN = "b0" * 32
SERVED = {"inference": {"enabled": True, "endpoint": ENDPOINT, "runtime": "transformers", "replicas": 1}}


@dataclasses.dataclass
class Seen:
    """What the roll-outs leave to be judged."""

    first: str
    """Digest of the first job's model."""
    second: str
    serving: dict
    taken_over: dict
    broken: dict
    rolled_back: dict
    lines: list[dict]
    retired: list[dict]


@pytest.fixture(scope="module")
def seen(operator, world, make_namespace):
    namespace = make_namespace("rollout")
    cluster = world.cluster
    first = apply_job(cluster, namespace, make_job("first", **SERVED))
    serving = first.wait_for_state("Succeeded", within=300)["serving"]
    load = Load(cluster, namespace, "load").start(world.images["trainer"], ENDPOINT, rate=5, requests=100_000)
    second = apply_job(cluster, namespace, make_job("second", **SERVED, training={"seed": 7}))
    digest = second.wait_for_state("Succeeded", within=300)["serving"]["digest"]
    load.wait_for_digest(digest)
    taken_over = first.wait_for_condition("Deployed", "False", reason="TakenOver")
    retired = _wait_for_retirement(cluster, namespace, first)
    second.patch(inference={"version": BROKEN})
    broken = second.wait_for_condition("Stalled", "True", reason="EndpointUnhealthy", within=180)
    load.wait_for_digest(digest)
    second.patch(inference={"version": serving["digest"]})
    load.wait_for_digest(serving["digest"], within=120)
    rolled_back = second.wait_for_condition("Ready", "True")
    rolled_back = second.status()["serving"] | {"reason": rolled_back["reason"]}
    return Seen(serving["digest"], digest, serving, taken_over, broken, rolled_back, load.stop(), retired)


def _wait_for_retirement(cluster, namespace, job):
    """Wait until the version of a job has no pods any more; return its Deployments."""
    selector = f"finetune.dev/endpoint={ENDPOINT},finetune.dev/job={job.name}"

    def look():
        items = cluster.read("deployments", "-n", namespace, "-l", selector)["items"]
        pods = cluster.read("pods", "-n", namespace, "-l", selector)["items"]
        return items if items and not pods and not any(item["spec"]["replicas"] for item in items) else None

    return eventually(look, within=180, otherwise=lambda: cluster.run("get", "deployments,pods", "-n", namespace))


def test_no_request_failed(seen):
    assert len(seen.lines) > 100
    assert list_failed(seen.lines) == []


def test_only_models_that_passed_answered(seen):
    assert {line["digest"] for line in seen.lines} == {seen.first, seen.second}
    assert seen.first != seen.second


def test_versions_did_not_alternate(seen):
    """Each version answers, then the next: from first to second, and back once."""
    turns = [line["digest"] for line in seen.lines]
    changes = [place for place in range(1, len(turns)) if turns[place] != turns[place - 1]]
    # While the Service is switched the rules of the node change within a moment.
    assert len({seen.lines[place]["at"] // 5 for place in changes}) <= 4


def test_the_status_tells_what_the_smoke_prompt_measured(seen):
    assert seen.serving["ready"] is True
    assert seen.serving["timeToFirstTokenSeconds"] > 0
    assert seen.serving["tokensPerSecond"] > 0


def test_the_version_that_was_followed_gives_back_its_pods_and_can_be_gone_back_to(seen):
    assert [item["spec"]["replicas"] for item in seen.retired] == [0]


def test_a_broken_candidate_says_why_and_who_answers(seen):
    assert BROKEN in seen.broken["message"]
    assert f"{seen.second} of job second still answers" in seen.broken["message"]


def test_going_back_is_one_field(seen):
    assert seen.rolled_back["digest"] == seen.first
    assert seen.rolled_back["ready"] is True
