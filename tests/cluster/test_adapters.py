"""An endpoint whose job is given adapters after it has finished: composed, measured, served, refused, taken back.

The fixture lives through it once; each test reads one promise from what it saw.
"""

import contextlib
import dataclasses
import json
import urllib.request

import pytest

from tests.cluster.world import BUCKET, SHAPE
from tests.demo import second_version
from tests.demo.demo import ask, make_s3_client
from tests.support.jobs import apply_job, make_job
from tests.support.waiting import eventually

NAME = "answers"
STRANGER = "5a" * 32
"""Digest of a model that nobody has."""
SERVED = {"inference": {"enabled": True, "runtime": "transformers", "replicas": 1}}


@dataclasses.dataclass
class Seen:
    """What one version says, and what the job says of it."""

    serving: dict
    models: list[str]
    """As /v1/models lists them."""
    answers: dict[str, str]
    """By the model that was asked."""
    stalled: dict
    """The condition."""


@dataclasses.dataclass
class Story:
    """What the roll-outs leave to be judged."""

    plain: Seen
    composed: Seen
    table: str
    """What was measured of the composition."""
    refused: Seen
    rolled_back: Seen


@pytest.fixture(scope="module")
def story(operator, world, make_namespace):
    namespace, cluster = make_namespace("adapters"), world.cluster
    job = apply_job(cluster, namespace, make_job(NAME, **SERVED))
    digest = job.wait_for_state("Succeeded", within=300)["promotion"]["digest"]
    client = make_s3_client(world.storage)
    for name, model in (("polite", digest), ("stranger", STRANGER)):
        second_version.upload_adapter(client, BUCKET, f"adapters/{name}", model, SHAPE)
    plain = look_at(job)
    job.patch(inference={"adapters": [build_entry("polite")]})
    wait_for_version(job, lambda serving: serving.get("adapters") == ["polite"])
    composed = look_at(job)
    table = second_version.read_table(cluster, namespace, NAME, composed.serving["profile"])
    job.patch(inference={"adapters": [build_entry("polite"), build_entry("stranger")]})
    job.wait_for_condition("Stalled", reason="ModelInvalid", within=180)
    refused = look_at(job)
    job.patch(inference={"version": digest})
    wait_for_version(job, lambda serving: serving["version"] == digest)
    job.wait_for_condition("Ready")
    return Story(plain, composed, table, refused, look_at(job))


def build_entry(name):
    """Return an adapter as `spec.inference.adapters` takes it."""
    return {"name": name, "source": f"s3://{BUCKET}/adapters/{name}", "secretRef": {"name": "s3"}}


def wait_for_version(job, is_wanted):
    """Wait until the version that is wanted has the traffic and answers."""

    def look():
        serving = job.live_status()["serving"]
        return serving.get("ready") and is_wanted(serving)

    eventually(look, within=180, otherwise=job.describe)


def look_at(job):
    """Ask the endpoint which models it has, and each of them a question."""
    serving, answers = job.status()["serving"], {}
    with job.cluster.forward(job.namespace, f"svc/{NAME}", 80) as url:
        with contextlib.closing(urllib.request.urlopen(f"{url}/v1/models", timeout=60)) as response:
            models = [entry["id"] for entry in json.load(response)["data"]]
        for model in models:
            answers[model] = ask(url, model, "What is a list?")
    return Seen(serving, models, answers, job.condition("Stalled"))


def test_an_adapter_makes_another_version_of_the_same_model(story):
    plain, composed = story.plain.serving, story.composed.serving
    assert plain["version"] == plain["digest"] == composed["digest"]
    assert composed["version"] == f"{plain['version']}.{composed['profile']}"
    assert (plain.get("adapters", []), composed["adapters"]) == ([], ["polite"])


def test_a_composition_is_measured_beside_the_model_and_its_parts(story):
    header = story.table.splitlines()[0]
    assert all(side in header for side in ("base", "polite", "composition"))


def test_the_endpoints_name_means_the_adapter_and_the_model_alone_has_a_name_too(story):
    assert story.plain.models == [NAME]
    assert sorted(story.composed.models) == [NAME, f"{NAME}-base"]
    assert story.composed.answers[NAME] != story.plain.answers[NAME]
    assert story.composed.answers[f"{NAME}-base"] == story.plain.answers[NAME]


def test_an_adapter_of_another_base_is_refused_with_its_entry_and_what_is_served_stays(story):
    message = story.refused.stalled["message"]
    assert "spec.inference.adapters[1] (stranger)" in message
    assert STRANGER in message
    assert f"{story.composed.serving['version']} of job {NAME} still answers" in message
    assert story.refused.serving["version"] == story.composed.serving["version"]
    assert story.refused.answers == story.composed.answers


def test_the_version_without_the_adapter_is_gone_back_to_with_one_field(story):
    assert story.rolled_back.serving["version"] == story.plain.serving["version"]
    assert story.rolled_back.answers == story.plain.answers
    assert story.rolled_back.stalled.get("status") != "True"
