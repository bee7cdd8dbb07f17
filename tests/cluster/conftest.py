"""The embedded cluster for this rung: brought up once, with the operator installed from the chart."""

import pytest

from tests.cluster.world import open_world
from tests.demo.demo import OPERATOR_NAMESPACE, install_chart

NAME = "default"


@pytest.fixture(scope="session")
def world():
    return open_world(NAME)


@pytest.fixture(scope="session")
def operator(world):
    """Install the chart; returns the operator's namespace."""
    install_chart(world.cluster, world.images)
    return OPERATOR_NAMESPACE


@pytest.fixture(scope="module")
def make_namespace(world):
    """A function that makes a namespace with the storage's Secret in it; all go when the module is done."""
    made = []

    def make(prefix):
        made.append(world.make_namespace(prefix))
        return made[-1]

    yield make
    for name in made:
        world.cluster.run("delete", "namespace", name, "--wait=false")
