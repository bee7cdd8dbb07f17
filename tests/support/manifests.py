"""Job manifests that tests judge: the good and bad ones under tests/data/jobs, and those users start from."""

from __future__ import annotations

import pathlib
from typing import Any

import yaml

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
_DATA = REPOSITORY / "tests" / "data" / "jobs"
_EXPECT = "# expect: "

EXAMPLES = sorted((REPOSITORY / "crds" / "examples").glob("*.yaml"))
GITOPS_JOBS = sorted((REPOSITORY / "pipelines" / "gitops" / "jobs").glob("*/*-job.yaml"))
GOOD = [*sorted((_DATA / "good").glob("*.yaml")), *EXAMPLES, *GITOPS_JOBS]
BAD = sorted((_DATA / "bad").glob("*.yaml"))


def read_job(path: pathlib.Path) -> dict[str, Any]:
    """Return the one object of the file."""
    job: dict[str, Any] = yaml.safe_load(path.read_text())
    return job


def read_expected(path: pathlib.Path) -> list[str]:
    """Return what the verdict on a bad job must say: every `# expect:` comment of its file."""
    lines = path.read_text().splitlines()
    return [line.removeprefix(_EXPECT) for line in lines if line.startswith(_EXPECT)]


def name_case(path: pathlib.Path) -> str:
    """Return the file's name for the test's id."""
    return f"{path.parent.name}/{path.stem}"
