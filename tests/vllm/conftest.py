"""Real vLLM on CPUs: a promoted model, a composition on it, and the pods of an endpoint that serve them."""

from __future__ import annotations

import pathlib

import pytest

from tests.support.training_runs import SMALL, Run, build_llama, import_stack, write_data
from tests.support.vllm_pod import STARTING_SECONDS, VllmPod, build_objects
from tests.support.waiting import eventually
from tests.trainer.test_adapters_job import name_adapters, write_adapter


def pytest_collection_modifyitems(items):
    for item in items:
        if pathlib.Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A workspace with a promoted model that has learned something."""
    import_stack()
    root = tmp_path_factory.mktemp("run")
    settings = (*SMALL, "training.learning_rate=0.01", "checkpoint.every_steps=0")
    run = Run(root / "workspace", build_llama(root / "model"), write_data(root / "data"), settings)
    run.train("training.max_steps=60")
    assert run.call("promote") == 0
    return run


@pytest.fixture(scope="session")
def promoted(run):
    return pathlib.Path(run.report("promote")["details"]["path"])


@pytest.fixture(scope="session")
def composed(run, promoted, tmp_path_factory):
    """What `compose` reports of an adapter on the promoted model."""
    polite = write_adapter(promoted, tmp_path_factory.mktemp("adapters") / "polite", std=0.4)
    assert run.call("compose", name_adapters((polite, {"name": "polite"}))) == 0, run.report("compose")
    return run.report("compose")["details"]


@pytest.fixture(scope="session")
def pods(run, composed, tmp_path_factory):
    """Two pods, which start at the same time: the promoted model's, and that of the composition on it."""
    started = [
        VllmPod(build_objects(run, adapters)[1].objects, run.root, tmp_path_factory.mktemp("pod") / "container")
        for adapters in (None, composed)
    ]
    try:
        assert not started[0].is_started(), "nothing answers yet"
        for pod in started:
            eventually(pod.is_started, within=STARTING_SECONDS, otherwise=lambda pod=pod: pod.log[-3000:])
        yield started
    finally:
        for pod in started:
            pod.end()


@pytest.fixture
def plain(pods):
    """The pod of the promoted model, under the endpoint's name, support-7b."""
    return pods[0]
