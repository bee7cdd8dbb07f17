"""A real API server without nodes, shared by the tests of this rung, with the CRD installed."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.demo.kubectl import Cluster, ClusterError
from tests.support.kubelet import Kubelet
from tests.support.manifests import REPOSITORY
from tests.support.operator_process import OperatorProcess
from tests.support.rest import Rest
from tests.support.waiting import eventually

_TOOL = REPOSITORY / "tests" / "cluster" / "cluster.py"
_NAME = f"api-{os.getpid()}"


def pytest_collection_modifyitems(items):
    for item in items:
        if pathlib.Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.api)


def _run_tool(*arguments):
    result = subprocess.run(
        (sys.executable, str(_TOOL), *arguments, "--name", _NAME), check=False, stdout=subprocess.PIPE, text=True
    )
    assert result.returncode == 0, f"cluster.py {arguments[0]} failed; its log says why"
    return result.stdout


@pytest.fixture(scope="session")
def api_server():
    """An API server of our own, named by kubeconfig and context; gone when the tests are done."""
    status = json.loads(_run_tool("up", "--control-plane-only"))
    try:
        yield Cluster(status["kubeconfig"], status["context"], f"{status['bin']}/kubectl", f"{status['bin']}/helm")
    finally:
        _run_tool("down")


@pytest.fixture(scope="session")
def crd(api_server):
    """The CustomResourceDefinition, served."""
    api_server.run("apply", "--server-side", "--force-conflicts", "-f", str(REPOSITORY / "crds" / "finetunejobs.yaml"))

    def is_served():
        try:
            return api_server.run("explain", "finetunejob.spec")
        except ClusterError:
            return None

    # Its OpenAPI document is the last thing that appears.
    eventually(is_served, within=60, otherwise="kubectl explain does not know finetunejobs")
    return api_server


@pytest.fixture
def namespace(crd, request):
    """A namespace of the test's own."""
    name = f"t-{abs(hash(request.node.nodeid)) % 10**10}"
    crd.run("create", "namespace", name)
    yield name
    crd.run("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def rest(crd):
    """The API server without kubectl, with two nodes that exist in name only."""
    client = Rest(crd.kubeconfig)
    for name in ("node-a", "node-b"):
        client.request("POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    return client


@pytest.fixture(scope="module")
def operator(crd, tmp_path_factory):
    """One copy of the operator for all namespaces; tests that kill theirs start their own, and tests that write a
    status of their own have none beside them.
    """
    process = OperatorProcess(tmp_path_factory.mktemp("operator"), crd.kubeconfig).start().wait_until_healthy()
    yield process
    process.stop()


@pytest.fixture
def restart_api_server(crd):
    """Stop the API server, or start it again and wait until it answers."""

    def restart(command):
        _run_tool(command, "apiserver")

    yield restart
    _run_tool("start", "apiserver")


@pytest.fixture(scope="module")
def run_component(api_server):
    """A function that runs a further component of the cluster until the module is done."""
    started = []

    def run(name):
        _run_tool("start", name)
        started.append(name)

    yield run
    for name in started:
        _run_tool("stop", name)


@pytest.fixture
def kubelet(rest, namespace):
    """The test plays the kubelet of its namespace."""
    return Kubelet(rest, namespace)
