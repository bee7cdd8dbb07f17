"""A workspace that runs full in the middle of training costs no checkpoint, and more space is all it takes to go on."""

import re

import pytest

from tests.demo.kubectl import ClusterError
from tests.support.jobs import apply_job, make_job
from tests.support.waiting import eventually


def test_a_full_disk_is_named_and_training_goes_on_once_it_has_grown(world, operator, make_namespace):
    job = apply_job(
        world.cluster,
        make_namespace("full"),
        make_job(
            "full",
            training={"maxSteps": 200},
            checkpoint={"everySteps": 10},
            workspace={"size": "96Mi", "storageClassName": "limited"},
            evaluation={"holdout": True},
        ),
    )
    complete = eventually(
        lambda: (job.live_status().get("checkpoints") or {}).get("latestComplete"), within=300, otherwise=job.describe
    )
    pod = next(pod for pod in job.pods("train") if pod["status"]["phase"] == "Running")
    with pytest.raises(ClusterError, match="No space left"):
        world.cluster.run(
            *("exec", "-n", job.namespace, pod["metadata"]["name"], "--"),
            *("dd", "if=/dev/zero", "of=/workspace/ballast", "bs=1M"),
        )
    full = job.wait_for_condition("Stalled", reason="StorageFull", within=180)
    assert "workspace.size" in full["message"]
    assert re.search(r"the workspace of [\d.]+ [MG]iB is full", full["message"])
    assert job.condition("Finished")["status"] == "False"
    job.patch(workspace={"size": "256Mi"})
    job.wait_for_condition("Succeeded", within=420)
    status = job.status()
    assert status["attempts"][-1]["resumedFromStep"] >= complete
    assert status["checkpoints"]["latestComplete"] == 200
