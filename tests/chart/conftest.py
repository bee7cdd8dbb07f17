"""Helm and the chart, rendered without a cluster."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
import yaml

from tests.support.manifests import REPOSITORY

CHART = REPOSITORY / "charts" / "finetune-operator"
REQUIRED = {
    "image": {"repository": "registry.example.com/finetune-operator"},
    "config": {
        "images": {
            "trainer": "registry.example.com/finetune-trainer:0.1.0",
            "inference": "registry.example.com/finetune-inference:0.1.0",
        }
    },
}


def pytest_collection_modifyitems(items):
    for item in items:
        if pathlib.Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.chart)


@pytest.fixture(scope="session")
def tools():
    """The folder with kubectl and Helm."""
    command = (sys.executable, str(REPOSITORY / "tests" / "cluster" / "cluster.py"), "tools")
    return pathlib.Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


class Chart:
    """The chart as Helm sees it."""

    def __init__(self, helm):
        self.helm = helm

    def run(self, *arguments, values=None):
        """Run Helm on the chart with these values merged over those that an install needs."""
        merged = merge(REQUIRED, values or {})
        return subprocess.run(
            (self.helm, *arguments, "--values", "-"),
            input=json.dumps(merged),
            check=False,
            capture_output=True,
            text=True,
        )

    def render(self, values=None, *, release="finetune-operator", namespace="finetune-system"):
        """Return the rendered objects as a map from (kind, namespace, name)."""
        result = self.run("template", release, str(CHART), "--namespace", namespace, values=values)
        assert result.returncode == 0, result.stderr
        objects = [item for item in yaml.safe_load_all(result.stdout) if item]
        found = {
            (item["kind"], item["metadata"].get("namespace", ""), item["metadata"]["name"]): item for item in objects
        }
        assert len(found) == len(objects), "two objects share a name"
        return found

    def refuse(self, values):
        """Return what Helm says against these values."""
        result = self.run("template", "x", str(CHART), values=values)
        assert result.returncode != 0, "Helm accepted the values"
        return result.stderr


def merge(base, changes):
    """Return `base` with `changes` merged over it."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


@pytest.fixture(scope="session")
def chart(tools):
    """The chart."""
    return Chart(str(tools / "helm"))
