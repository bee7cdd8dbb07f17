"""What the trainer's tests share: a clean environment, patience counted in fractions of a second, and servers."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest

from finetune_contract.run_config import RunConfig
from finetune_trainer.__main__ import main
from finetune_trainer.storage import retry
from tests.support.fake_hub import FakeHub, running_hub
from tests.support.s3_server import S3Server, running_s3

# Two busy cores make single examples slow now and then; how long they take is not what is tested.
hypothesis.settings.register_profile("trainer", deadline=None, max_examples=60)
hypothesis.settings.load_profile("trainer")

INSTRUCTIONS = pathlib.Path(__file__).resolve().parents[2] / "data" / "instructions"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("AWS_", "HF_", "FINETUNE_", "KUBEFLOW_", "SSL_CERT")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry.DEFAULT, "patience_seconds", 1.0)
    monkeypatch.setattr(retry.DEFAULT, "first_wait_seconds", 0.01)
    monkeypatch.setattr(retry.DEFAULT, "longest_wait_seconds", 0.1)


@pytest.fixture
def instructions() -> pathlib.Path:
    return INSTRUCTIONS


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running_hub() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        yield found


@pytest.fixture(scope="session")
def s3_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_s3(tmp_path_factory.mktemp("buckets")) as server:
        yield server


@pytest.fixture
def s3(s3_session: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, with its credentials in the unprefixed variables."""
    for name, value in s3_session.variables.items():
        monkeypatch.setenv(name, value)
    return s3_session


@pytest.fixture
def bucket(s3_session: S3Server) -> str:
    """A fresh bucket."""
    name = f"b-{uuid.uuid4().hex[:12]}"
    (s3_session.folder / name).mkdir()
    return name


@dataclasses.dataclass
class Outcome:
    """How a command ended."""

    code: int
    report: dict[str, Any]

    @property
    def details(self) -> dict[str, Any]:
        details: dict[str, Any] = self.report["details"]
        return details

    @property
    def text(self) -> str:
        """Everything that a person reads of it."""
        return f"{self.report['message']} | {self.report['hint']}"


@pytest.fixture
def run_command(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run a subcommand as its pod does; return its exit code and report."""
    termination_log = tmp_path / "termination-log"

    def run(*arguments: str, settings: RunConfig | None = None) -> Outcome:
        monkeypatch.setenv("FINETUNE_TERMINATION_LOG", str(termination_log))
        termination_log.unlink(missing_ok=True)
        words = list(arguments)
        if settings is not None:
            path = tmp_path / "run.json"
            path.write_text(settings.to_json())
            words += ["--run-config", str(path)]
        code = main(words)
        report = json.loads(termination_log.read_text()) if termination_log.exists() else {}
        return Outcome(code, report)

    return run
