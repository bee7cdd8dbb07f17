"""The embedded cluster for this rung: brought up once, with the operator installed from the chart."""

import pathlib
import secrets

import pytest

from tests.cluster.bring_up import bring_up, read_s3_keys
from tests.cluster.world import World
from tests.demo.demo import OPERATOR_NAMESPACE, Storage, install_chart
from tests.demo.kubectl import Cluster

NAME = "default"


@pytest.fixture(scope="session")
def world():
    status = bring_up(NAME)
    programs = pathlib.Path(status["bin"])
    cluster = Cluster(status["kubeconfig"], status["context"], str(programs / "kubectl"), str(programs / "helm"))
    url = status["s3"]["url"]
    storage = Storage(url, url, *read_s3_keys(status))
    made = World(NAME, cluster, storage, status["prometheus"], status["images"])
    made.write_test_data()
    return made


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
        name = f"{prefix}-{secrets.token_hex(3)}"
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        world.cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        world.write_secret(name)
        made.append(name)
        return name

    yield make
    for name in made:
        world.cluster.run("delete", "namespace", name, "--wait=false")
