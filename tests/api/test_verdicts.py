"""Good and bad jobs as the real API server judges them: the same verdicts as pydantic's, in words that help."""

from __future__ import annotations

import json

import pytest

from tests.demo.kubectl import ClusterError
from tests.support.manifests import BAD, EXAMPLES, GOOD, name_case, read_expected, read_job


@pytest.mark.parametrize("path", GOOD, ids=name_case)
def test_a_good_job_is_accepted(crd, path):
    answer = crd.run("apply", "--dry-run=server", "--namespace=default", "-f", str(path))
    assert "created (server dry run)" in answer


@pytest.mark.parametrize("path", BAD, ids=name_case)
def test_a_bad_job_is_refused_in_words_that_help(crd, path):
    with pytest.raises(ClusterError) as caught:
        crd.run("apply", "--dry-run=server", "-f", str(path))
    for fragment in read_expected(path):
        assert fragment in str(caught.value)


def test_defaults_show_in_the_stored_object(crd, namespace):
    minimal = next(path for path in EXAMPLES if path.stem == "minimal")
    crd.run("apply", "-n", namespace, "-f", str(minimal))
    spec = crd.read("finetunejob", "minimal", "-n", namespace)["spec"]
    assert spec["resources"] == {"nodes": 1, "gpusPerNode": 1}
    assert spec["checkpoint"]["retention"]["latest"] == 3
    assert spec["dataset"]["filter"] == {"refusals": True, "rules": "default"}
    assert spec["training"] == {"recipe": "efficient", "method": "full", "seed": 42, "deepspeed": {"offload": "none"}}
    assert spec["inference"] == {"enabled": True, "onDelete": "Delete", "replicas": 1, "loadFrom": "Workspace"}


def test_kubectl_explain_teaches_the_field(crd):
    text = crd.run("explain", "finetunejob.spec.checkpoint.retention.latest")
    assert "How many of the newest are kept." in text


def test_kubectl_shows_the_columns_and_selects_by_state(crd, namespace):
    for name, state in (("first", "Training"), ("second", "Failed")):
        make_job(crd, namespace, name)
        progress = {"percentage": 43, "summary": "43%", "eta": "2h11m", "loss": 1.182}
        write_status(crd, namespace, name, {"state": state, "restarts": 1, "progress": progress})
    header, first, _ = crd.run("get", "ftj", "-n", namespace).splitlines()
    assert header.split() == ["NAME", "STATE", "PROGRESS", "LOSS", "ETA", "RESTARTS", "AGE"]
    assert first.split()[:6] == ["first", "Training", "43%", "1.182", "2h11m", "1"]
    selected = crd.run("get", "ftj", "-n", namespace, "--field-selector=status.state=Failed", "-o", "name")
    assert selected.split() == ["finetunejob.finetune.dev/second"]


FROZEN_CHANGES = [
    ("model.source", {"model": {"source": "hf://org/other"}}),
    ("model.revision", {"model": {"revision": "main"}}),
    ("dataset.source", {"dataset": {"source": "hf://org/other"}}),
    ("dataset.seed", {"dataset": {"seed": 1}}),
    ("dataset.filter", {"dataset": {"filter": {"refusals": False}}}),
    ("training.learningRate", {"training": {"learningRate": 0.5}}),
    ("training.seed", {"training": {"seed": 1}}),
    ("training.recipe", {"training": {"recipe": "wizardlm-freeform"}}),
    ("training.epochs", {"training": {"epochs": 1}}),
    ("workspace.storageClassName", {"workspace": {"storageClassName": "fast"}}),
]

FREE_CHANGES = [
    {"training": {"perDeviceBatchSize": 1, "gradientAccumulationSteps": 32}},
    {"training": {"deepspeed": {"zeroStage": 3}}},
    {"resources": {"nodes": 2, "memory": "64Gi"}},
    {"placement": {"zones": ["z1"]}},
    {"failurePolicy": {"maxRestarts": 50}},
    {"model": {"secretRef": {"name": "other"}}},
    {"workspace": {"size": "200Gi"}},
    {"suspend": True},
    {"inference": {"version": "sha256-0"}},
    {"pod": {"nodeSelector": {"pool": "new"}}},
]


@pytest.mark.parametrize(("field", "change"), FROZEN_CHANGES, ids=[field for field, _ in FROZEN_CHANGES])
def test_what_a_job_is_can_change_until_it_starts_and_not_after(crd, namespace, field, change):
    make_job(crd, namespace, "job")
    patch(crd, namespace, "job", change, "--dry-run=server")
    write_status(crd, namespace, "job", {"startTime": "2026-11-23T10:00:00Z"})
    with pytest.raises(ClusterError) as caught:
        patch(crd, namespace, "job", change)
    assert f"spec.{field}" in str(caught.value)
    assert "cannot change once the job has started: put the old value back" in str(caught.value)


def test_how_a_job_runs_can_change_after_it_has_started(crd, namespace):
    make_job(crd, namespace, "job")
    write_status(crd, namespace, "job", {"startTime": "2026-11-23T10:00:00Z"})
    for change in FREE_CHANGES:
        patch(crd, namespace, "job", change, "--dry-run=server")


def test_the_workspace_only_grows(crd, namespace):
    make_job(crd, namespace, "job")
    patch(crd, namespace, "job", {"workspace": {"size": "0.2Ti"}})
    with pytest.raises(ClusterError, match=r"a volume only grows: write 0\.2Ti or more"):
        patch(crd, namespace, "job", {"workspace": {"size": "100Gi"}})


def test_a_started_job_can_still_get_its_status_and_finalizers(crd, namespace):
    """The rules on changes must never stand in the operator's way."""
    make_job(crd, namespace, "job")
    write_status(crd, namespace, "job", {"startTime": "2026-11-23T10:00:00Z"})
    write_status(crd, namespace, "job", {"state": "Training", "restarts": 3})
    metadata = json.dumps({"metadata": {"finalizers": ["finetune.dev/cleanup"]}})
    crd.run("patch", "ftj", "job", "-n", namespace, "--type=merge", "-p", metadata)
    metadata = json.dumps({"metadata": {"finalizers": []}})
    crd.run("patch", "ftj", "job", "-n", namespace, "--type=merge", "-p", metadata)
    assert crd.read("finetunejob", "job", "-n", namespace)["status"]["restarts"] == 3


def make_job(cluster, namespace, name):
    job = read_job(next(path for path in EXAMPLES if path.stem == "minimal"))
    job["metadata"] = {"name": name, "namespace": namespace}
    job["spec"]["workspace"] = {"size": "100Gi"}
    cluster.apply(job)


def patch(cluster, namespace, name, spec, *options):
    cluster.run(*("patch", "ftj", name, "-n", namespace, "--type=merge", "-p", json.dumps({"spec": spec})), *options)


def write_status(cluster, namespace, name, status):
    body = json.dumps({"status": status})
    cluster.run("patch", "ftj", name, "-n", namespace, "--subresource=status", "--type=merge", "-p", body)
