"""One training through the faults of nodes and daemons, on a real cluster; beside it a job whose S3 comes and goes.

The fixture lives through it once, each fault in its hardest moment: kills fall into a save. Each test reads one
promise.
What `test_story.py` shows (API server restarted, operator killed, S3 away at the end) is not repeated here.
"""

import dataclasses
import pathlib
import re

import pytest

from tests.cluster.faults import LOSES_NODES_QUICKLY, Faults
from tests.support.jobs import JobHandle, apply_job, make_job
from tests.support.waiting import eventually

PATIENCE = 240


@dataclasses.dataclass
class Seen:
    """What the faults leave to be judged."""

    job: JobHandle
    refusal: str
    drained: dict
    after_drain: dict
    rank_killed: dict
    after_rank: dict
    process_killed: dict
    after_process: dict
    after_containerd: dict
    node_lost: dict
    after_node: dict


@pytest.fixture(scope="module")
def away(operator, world, make_namespace):
    """A job whose S3 server is down from the start, and whose workspace is not there yet."""
    namespace = make_namespace("away")
    status = world.read_status()["s3"]
    certificate = pathlib.Path(status["authority"]).read_text()
    world.write_secret(namespace, AWS_ENDPOINT_URL_S3=status["tlsUrl"], AWS_CA_BUNDLE=certificate)
    yield apply_job(world.cluster, namespace, make_job("away", workspace={"existingClaim": "later"}))
    world.tool("stop", "s3-tls")


@pytest.fixture(scope="module")
def seen(away, operator, world, make_namespace):
    job = apply_job(
        world.cluster,
        make_namespace("faults"),
        make_job(
            "faults",
            training={"maxSteps": 100000},
            checkpoint={"everySteps": 2},
            resources={"processesPerNode": 2},
            pod={"tolerations": LOSES_NODES_QUICKLY},
        ),
    )
    faults = Faults(world, job)
    faults.running_pod(within=300)
    _wait_for_save(job, beyond=0)
    told = {}
    try:
        told["refusal"] = faults.drain("--timeout=2s")
        told["drained"] = faults.running_pod()
        faults.drain("--disable-eviction", f"--timeout={PATIENCE}s")
    finally:
        faults.uncordon()
    told["after_drain"] = _wait_for_save(job, attempt=2)
    told["rank_killed"] = faults.running_pod()
    faults.kill_process(told["rank_killed"], "rank", in_save=True)
    told["after_rank"] = _wait_for_save(job, attempt=2, restarts=2)
    told["process_killed"] = faults.running_pod()
    faults.kill_process(told["process_killed"], in_save=True)
    told["after_process"] = _wait_for_save(job, attempt=3)
    faults.restart("containerd")
    told["after_containerd"] = _wait_for_save(job, attempt=3, beyond=told["after_process"]["progress"]["step"])
    told["node_lost"] = faults.running_pod()
    faults.lose_node(told["node_lost"])
    told["after_node"] = _wait_for_save(job, attempt=4)
    return Seen(job, **told)


def _wait_for_save(job, attempt=1, beyond=0, restarts=0):
    """Return the status once this attempt has made steps, and saves, since the fault."""
    start = {}

    def look():
        status = job.live_status()
        progress, newest = status.get("progress") or {}, (status.get("attempts") or [{}])[-1]
        if newest.get("number") != attempt or status["restarts"] < restarts or status["state"] != "Training":
            return None
        complete = (status.get("checkpoints") or {}).get("latestComplete") or 0
        start.setdefault("complete", max(complete, beyond))
        return status if complete > start["complete"] and progress.get("step", 0) > beyond else None

    return eventually(look, within=PATIENCE, otherwise=job.describe)


def _attempt(status, number):
    return next(each for each in status["attempts"] if each["number"] == number)


def test_a_drain_that_asks_is_refused(seen):
    assert "disruption budget" in seen.refusal


def test_a_drain_that_insists_costs_no_step_and_no_restart_of_the_budget(seen, world):
    first, second = (_attempt(seen.after_drain, number) for number in (1, 2))
    # Such a drain deletes the pod, and its last words with it: they are told if the operator was in time to read them.
    assert first["reason"] in ("Interrupted", "PodDeleted")
    assert seen.after_drain["restartsCountTowardsMax"] == 0
    assert second["resumedFromStep"] > 0
    assert first["stepsLost"] == 0
    stopped = re.search(r"stopped on request at step (\d+)", seen.after_drain["lastFailure"]["message"])
    assert stopped is None or second["resumedFromStep"] == int(stopped[1])


def test_a_rank_killed_in_a_save_restarts_inside_its_pod_and_is_counted(seen):
    assert seen.process_killed["metadata"]["uid"] == seen.rank_killed["metadata"]["uid"]
    assert (seen.after_rank["restarts"], seen.after_rank["restartsCountTowardsMax"]) == (2, 1)
    events = [event for event in seen.job.events() if event["reason"] == "RanksRestarted"]
    assert events
    assert events[0]["type"] == "Warning"


def test_a_container_killed_in_a_save_resumes_from_the_checkpoint_before_it(seen):
    assert _attempt(seen.after_process, 2)["reason"] == "Killed"
    assert _attempt(seen.after_process, 3)["resumedFromStep"] > 0
    assert (seen.after_process["restarts"], seen.after_process["restartsCountTowardsMax"]) == (3, 2)


def test_restarting_containerd_does_nothing_to_a_running_training(seen):
    assert seen.node_lost["metadata"]["name"].startswith(f"{seen.job.name}-train-3-")
    assert seen.after_containerd["restarts"] == 3


def test_a_lost_node_is_named_while_it_is_silent_and_uses_up_no_restart(seen):
    assert _attempt(seen.after_node, 3)["reason"] == "NodeLost"
    assert _attempt(seen.after_node, 4)["resumedFromStep"] > 0
    assert (seen.after_node["restarts"], seen.after_node["restartsCountTowardsMax"]) == (4, 2)


def test_no_checkpoint_was_lost_on_the_way(seen):
    resumed = [_attempt(seen.after_node, number)["resumedFromStep"] for number in (2, 3, 4)]
    assert resumed == sorted(resumed)


def test_a_storage_that_is_away_at_the_start_is_named_and_waited_for(seen, away, world):
    told = [event for event in away.events() if event["reason"] == "SourceUnavailable"]
    assert told
    assert told[0]["type"] == "Warning"
    assert "did not answer" in told[0]["message"]
    assert away.condition("Finished")["status"] == "False"
    world.tool("start", "s3-tls")
    away.wait_for_condition("StorageReady", "False", reason="ClaimNotFound", within=PATIENCE)


def test_a_storage_that_goes_between_two_phases_is_waited_for_by_the_pod_and_training_needs_none(seen, away, world):
    away.wait_for_condition("StorageReady", "False", reason="ClaimNotFound", within=PATIENCE)
    world.tool("stop", "s3-tls")
    world.cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "later", "namespace": away.namespace},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
        }
    )
    selector = ("-l", "finetune.dev/component=prepare", "-n", away.namespace, "--tail=-1", "--ignore-errors")
    eventually(lambda: "trying again" in world.cluster.run("logs", *selector), within=PATIENCE, otherwise=away.describe)
    world.tool("start", "s3-tls")
    away.wait_for_condition("DatasetReady", within=PATIENCE)
    world.tool("stop", "s3-tls")
    away.wait_for_condition("Promoted", within=PATIENCE)
    assert away.status()["restarts"] == 0
    away.patch(suspend=True)
