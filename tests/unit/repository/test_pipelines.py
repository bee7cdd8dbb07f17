"""The pipelines and the GitOps tree as files: they parse, they only call make, and their jobs are good ones."""

from __future__ import annotations

import re

import pytest
import yaml

from finetune_operator.api.v1alpha1 import parse_job
from tests.support.manifests import GITOPS_JOBS, REPOSITORY, name_case, read_job

PIPELINES = REPOSITORY / "pipelines"
GITOPS = PIPELINES / "gitops"
ENVIRONMENTS = ("staging", "production")
WORKFLOWS = sorted(PIPELINES.glob("*.yaml"))

VERSIONS = {
    "Application": "argoproj.io/v1alpha1",
    "GitRepository": "source.toolkit.fluxcd.io/v1",
    "OCIRepository": "source.toolkit.fluxcd.io/v1",
    "HelmRelease": "helm.toolkit.fluxcd.io/v2",
    "FineTuneJob": "finetune.dev/v1alpha1",
    "Namespace": "v1",
}
KUSTOMIZATIONS = {
    "kustomization.yaml": "kustomize.config.k8s.io/v1beta1",
    "kustomizeconfig.yaml": None,
    "values.yaml": None,
}


def read_documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def read_make_targets():
    return set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))


def list_steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_step_of_a_pipeline_is_a_make_target(path):
    (workflow,) = read_documents(path)
    runs = [step["run"] for step in list_steps(workflow) if "run" in step]
    assert runs
    for command in runs:
        words = command.split()
        assert words[0] == "make", command
        assert set(words[1:]) <= read_make_targets(), command


def test_the_pipeline_runs_every_rung_of_the_tests():
    (workflow,) = read_documents(PIPELINES / "ci.yaml")
    commands = {step.get("run") for step in list_steps(workflow)}
    assert {"make verify", "make test-chart", "make test-api", "make test-trainer", "make test-cluster"} <= commands
    assert {"make demo", "make test-gpu"} <= commands


def test_a_release_is_tested_before_it_is_published():
    (workflow,) = read_documents(PIPELINES / "release.yaml")
    assert [step["run"] for step in list_steps(workflow) if "run" in step] == [
        *("make verify", "make test", "make release")
    ]


@pytest.mark.parametrize("path", sorted(GITOPS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(GITOPS)))
def test_every_object_of_the_tree_has_the_version_of_its_kind(path):
    for document in read_documents(path):
        if path.name in KUSTOMIZATIONS:
            assert document.get("apiVersion") == KUSTOMIZATIONS[path.name]
        elif document["kind"] == "Kustomization":
            assert document["apiVersion"] == "kustomize.toolkit.fluxcd.io/v1"
        else:
            assert document["apiVersion"] == VERSIONS[document["kind"]]
            assert document["metadata"]["name"]


@pytest.mark.parametrize("path", GITOPS_JOBS, ids=name_case)
def test_jobs_of_the_tree_are_good_and_named_after_their_file(path):
    assert parse_job(read_job(path)).metadata.name == path.stem.removesuffix("-job")


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_job_of_an_environment_is_applied(environment):
    folder = GITOPS / "jobs" / environment
    listed = set(yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"])
    assert listed == {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_argo_cd_reads_files_that_exist(environment):
    operator, jobs = read_documents(GITOPS / "argocd" / f"{environment}.yaml")
    chart, values = operator["spec"]["sources"]
    assert values["ref"] == "values"
    for file in chart["helm"]["valueFiles"]:
        assert (GITOPS / file.removeprefix("$values/")).is_file(), file
    assert (GITOPS / jobs["spec"]["source"]["path"] / "kustomization.yaml").is_file()


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_flux_reads_folders_that_exist_and_waits_for_the_operator(environment):
    (operator,) = read_documents(GITOPS / "flux" / environment / "operator.yaml")
    (jobs,) = read_documents(GITOPS / "flux" / environment / "jobs.yaml")
    for item in (operator, jobs):
        assert (GITOPS / item["spec"]["path"] / "kustomization.yaml").is_file()
    assert jobs["spec"]["dependsOn"] == [{"name": operator["metadata"]["name"]}]
    (check,) = jobs["spec"]["healthCheckExprs"]
    assert (check["apiVersion"], check["kind"]) == ("finetune.dev/v1alpha1", "FineTuneJob")


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_both_tools_follow_the_same_versions(environment):
    operator = read_documents(GITOPS / "argocd" / f"{environment}.yaml")[0]
    overlay = yaml.safe_load((GITOPS / "operator" / environment / "kustomization.yaml").read_text())
    (patch,) = yaml.safe_load(overlay["patches"][0]["patch"])
    assert patch["value"]["semver"] == operator["spec"]["sources"][0]["targetRevision"]


def test_no_secret_stands_in_the_tree():
    for path in GITOPS.rglob("*.yaml"):
        assert all(document.get("kind") != "Secret" for document in read_documents(path)), path
