"""The GitOps tree as its tools build it: kustomize and Helm, without a network."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml
from pipelines import release

from tests.support.manifests import REPOSITORY

GITOPS = REPOSITORY / "pipelines" / "gitops"
FOLDERS = sorted(path.parent for path in GITOPS.rglob("kustomization.yaml") if path.parent.name != "base")
ENVIRONMENTS = ("staging", "production")
IMAGES = {
    name: f"registry.example.com/finetune/{name}@sha256:{index:064x}" for index, name in enumerate(release.IMAGES)
}


def build(tools, folder):
    command = (str(tools / "kubectl"), "kustomize", str(folder))
    return [
        item for item in yaml.safe_load_all(subprocess.run(command, check=True, capture_output=True).stdout) if item
    ]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(GITOPS)))
def test_every_folder_builds(tools, folder):
    assert build(tools, folder)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_changed_values_file_reaches_the_release_at_once(tools, environment):
    objects = {item["kind"]: item for item in build(tools, GITOPS / "operator" / environment)}
    name = objects["ConfigMap"]["metadata"]["name"]
    assert name.startswith("finetune-operator-values-")
    sources = objects["HelmRelease"]["spec"]["valuesFrom"]
    assert [(source["name"], source["valuesKey"]) for source in sources] == [
        *((name, "base.yaml"), (name, "environment.yaml"))
    ]
    assert set(objects["ConfigMap"]["data"]) == {"base.yaml", "environment.yaml"}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_chart_accepts_the_values_of_every_environment(chart, environment):
    values = {}
    for folder in ("base", environment):
        layer = yaml.safe_load((GITOPS / "operator" / folder / "values.yaml").read_text())
        values = {**values, **layer, "config": {**values.get("config", {}), **layer.get("config", {})}}
    limits = {
        **yaml.safe_load((GITOPS / "operator" / "base" / "values.yaml").read_text())["config"]["limits"],
        **values["config"]["limits"],
    }
    values["config"]["limits"] = limits
    assert chart.render(values)


def test_argo_cd_gets_the_health_check_under_its_key(tools):
    (settings,) = build(tools, GITOPS / "argocd")
    assert settings["metadata"]["name"] == "argocd-cm"
    script = settings["data"]["resource.customizations.health.finetune.dev_FineTuneJob"]
    assert script == (GITOPS / "argocd" / "health.lua").read_text()


FAKE_DOCKER = """#!{python}
import json, sys
arguments = sys.argv[1:]
name = arguments[arguments.index("--file") + 1].split("/")[1]
digests = {digests}
with open(arguments[arguments.index("--metadata-file") + 1], "w") as report:
    json.dump({{"containerimage.digest": digests[name]}}, report)
"""

HELM_WITHOUT_PUSH = """#!/bin/sh
if [ "$1" = push ]; then cp "$2" "{folder}/" && echo "$3" > "{folder}/pushed-to"; else exec "{helm}" "$@"; fi
"""


def test_a_release_pushes_a_chart_that_names_its_images_by_digest(tools, tmp_path):
    """No registry is in reach here, so Docker is played by a script; Helm packages for real."""
    programs, pushed = tmp_path / "bin", tmp_path / "pushed"
    programs.mkdir()
    pushed.mkdir()
    digests = {name: reference.partition("@")[2] for name, reference in IMAGES.items()}
    (programs / "docker").write_text(FAKE_DOCKER.format(python=sys.executable, digests=digests))
    (programs / "helm").write_text(HELM_WITHOUT_PUSH.format(folder=pushed, helm=tools / "helm"))
    for program in programs.iterdir():
        program.chmod(0o755)
    arguments = ("--version=v1.2.3", "--registry=registry.example.com/finetune", f"--helm={programs / 'helm'}")
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run((sys.executable, release.__file__, *arguments), check=True, env=environment, capture_output=True)

    assert (pushed / "pushed-to").read_text().strip() == "oci://registry.example.com/finetune/charts"
    package = pushed / "finetune-operator-1.2.3.tgz"
    command = (str(tools / "helm"), "template", "finetune-operator", str(package))
    rendered = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for reference in IMAGES.values():
        assert reference in rendered


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--version=1.2", "--registry=r"), "write it as in v1.2.3"),
        (("--version=v1.2.3", "--registry="), "name a registry"),
    ],
)
def test_a_release_asks_for_what_is_missing(arguments, said):
    result = subprocess.run((sys.executable, release.__file__, *arguments), check=False, capture_output=True, text=True)
    assert result.returncode == 2
    assert said in result.stderr
