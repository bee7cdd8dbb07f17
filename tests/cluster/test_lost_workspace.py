"""A workspace that is gone, with the checkpoints on it, costs a job with a mirror no more than its last save."""

import re

from tests.cluster.world import BUCKET
from tests.demo.demo import make_s3_client
from tests.support.jobs import apply_job, make_job
from tests.support.waiting import eventually


def test_a_job_whose_claim_is_deleted_under_it_resumes_from_the_mirror(world, operator, make_namespace):
    job = apply_job(
        world.cluster,
        make_namespace("mirrored"),
        make_job(
            "mirrored",
            training={"maxSteps": 100000},
            checkpoint={
                "everySteps": 4,
                "mirror": {"destination": f"s3://{BUCKET}/mirror", "secretRef": {"name": "s3"}},
            },
        ),
    )
    client = make_s3_client(world.storage)

    def list_mirrored():
        listed = client.list_objects_v2(Bucket=BUCKET, Prefix=f"mirror/{job.namespace}/").get("Contents", ())
        manifests = (re.search(r"checkpoint-(\d+)/finetune-manifest\.json$", each["Key"]) for each in listed)
        return sorted(int(found[1]) for found in manifests if found)

    def read_mirrored():
        return (job.live_status().get("checkpoints") or {}).get("mirrored")

    mirrored = eventually(read_mirrored, within=300, otherwise=job.describe)
    claim = world.cluster.read("pvc", "mirrored-workspace", "-n", job.namespace)
    world.cluster.run("delete", "pvc", "mirrored-workspace", "-n", job.namespace, "--wait=false")
    # Kubernetes keeps a claim for as long as a pod has it mounted.
    world.cluster.run("delete", "pod", "-n", job.namespace, "-l", "finetune.dev/component=train", "--wait=false")

    def look():
        attempts = job.live_status().get("attempts") or [{}]
        return attempts if attempts[-1].get("resumedFromStep") else None

    attempts = eventually(look, within=300, otherwise=job.describe)
    made_again = world.cluster.read("pvc", "mirrored-workspace", "-n", job.namespace)
    assert made_again["metadata"]["uid"] != claim["metadata"]["uid"]
    assert "WorkspaceLost" in {event["reason"] for event in job.events()}
    # Further copies went up until the pod was gone.
    assert mirrored <= attempts[-1]["resumedFromStep"] <= list_mirrored()[-1]
    job.patch(suspend=True)
