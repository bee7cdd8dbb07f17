"""The chart on a real API server: it installs where pods must be restricted, with the rights the operator needs."""

from __future__ import annotations

import json

import pytest

from tests.chart.conftest import CHART, REQUIRED

SYSTEM = "finetune-system"
ACCOUNT = f"system:serviceaccount:{SYSTEM}:finetune-operator"


@pytest.fixture(scope="module")
def installed(api_server, tmp_path_factory):
    """The chart in a namespace that enforces the restricted Pod Security Standard, with the CRD from the chart."""
    values = tmp_path_factory.mktemp("chart") / "values.yaml"
    values.write_text(json.dumps(REQUIRED))
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": SYSTEM, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
    }
    api_server.apply(namespace)
    api_server.run("create", "namespace", "team-a")
    arguments = ("--namespace", SYSTEM, "--values", str(values), "--take-ownership", "--force-conflicts")
    api_server.run_helm("upgrade", "--install", "finetune-operator", str(CHART), *arguments)
    yield api_server
    api_server.run_helm("uninstall", "finetune-operator", "--namespace", SYSTEM)
    # The definition stays, and with it every job.
    api_server.run("get", "crd", "finetunejobs.finetune.dev")
    api_server.run("delete", "namespace", SYSTEM, "team-a", "--wait=false")


def test_the_operators_pod_is_admitted_where_pods_must_be_restricted(installed):
    deployment = installed.read("deployment", "finetune-operator", "-n", SYSTEM)
    template = deployment["spec"]["template"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probe", "namespace": SYSTEM, "labels": template["metadata"]["labels"]},
        "spec": template["spec"],
    }
    answer = installed.run("create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))
    assert "pod/probe created" in answer


MAY = [
    ("team-a", "watch", "finetunejobs.finetune.dev"),
    ("team-a", "update", "finetunejobs.finetune.dev/status"),
    ("team-a", "create", "jobs.batch"),
    ("team-a", "delete", "persistentvolumeclaims"),
    ("team-a", "patch", "deployments.apps"),
    ("team-a", "update", "configmaps"),
    ("team-a", "list", "events"),
    ("team-a", "create", "events"),
    (SYSTEM, "get", "secrets:finetune-operator-progress-tls"),
    (SYSTEM, "create", "secrets"),
    (SYSTEM, "update", "secrets:finetune-operator-progress-tls"),
    ("", "get", "storageclasses.storage.k8s.io"),
    ("", "create", "tokenreviews.authentication.k8s.io"),
]

MAY_NOT = [
    ("team-a", "get", "secrets"),
    ("team-a", "list", "secrets"),
    ("team-a", "create", "secrets"),
    (SYSTEM, "list", "secrets"),
    (SYSTEM, "get", "secrets:other"),
    ("team-a", "delete", "finetunejobs.finetune.dev"),
    ("team-a", "create", "pods"),
    ("team-a", "patch", "jobs.batch"),
    ("team-a", "get", "pods/log"),
    ("team-a", "create", "pods/exec"),
    ("team-a", "create", "rolebindings.rbac.authorization.k8s.io"),
    ("team-a", "patch", "serviceaccounts"),
    ("", "list", "nodes"),
]


def is_allowed(cluster, namespace, verb, path):
    """Ask the API server; `path` is resource[.group][/subresource], or resource:name."""
    resource, _, name = path.partition(":")
    resource, _, subresource = resource.partition("/")
    resource, _, group = resource.partition(".")
    attributes = {"namespace": namespace, "verb": verb, "group": group, "resource": resource, "name": name}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": ACCOUNT, "resourceAttributes": attributes | {"subresource": subresource}},
    }
    answer = cluster.run("create", "-f", "-", "-o", "json", stdin=json.dumps(review))
    return json.loads(answer)["status"]["allowed"]


@pytest.mark.parametrize(("namespace", "verb", "resource"), MAY)
def test_the_operator_may(installed, namespace, verb, resource):
    assert is_allowed(installed, namespace, verb, resource)


@pytest.mark.parametrize(("namespace", "verb", "resource"), MAY_NOT)
def test_the_operator_may_not(installed, namespace, verb, resource):
    assert not is_allowed(installed, namespace, verb, resource)
