"""Several ranks on CPUs, without a cluster: the stack is imported once, and every run forks its ranks from here.

A run is the real command, called in this process: `train(...)` returns its results. `start(...)` runs it in a child
instead, for tests that kill it.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator

import pytest

from finetune_trainer.training.stack import block_modules
from tests.support import tiny_models
from tests.support.training_runs import SMALL, Run, build_llama, build_texts, import_stack, write_data

# As in every command. Test files import PEFT, which would import it, and with it a compiler.
block_modules(["bitsandbytes"])


def pytest_collection_modifyitems(items):
    for item in items:
        if pathlib.Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.trainer)


@pytest.fixture(scope="session", autouse=True)
def stack():
    """Import the stack once."""
    import_stack()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("FINETUNE_", "KUBEFLOW_", "JOB_COMPLETION")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared data set of 40 rows, and 8 held out."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of the tiny models, by family."""
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": build_llama(root / "llama"),
        "gpt_neox": tiny_models.build_tiny_neox(root / "gpt_neox", build_texts(), vocab_size=400),
        "mpt": tiny_models.build_tiny_mpt(root / "mpt", build_texts(), vocab_size=400),
    }


@pytest.fixture
def make_run(tmp_path, models, data) -> Iterator[Callable[..., Run]]:
    """Yield a function that makes a workspace for a model family."""
    runs: list[Run] = []

    def make(family: str = "llama", name: str = "workspace", *settings: str) -> Run:
        root = tmp_path / name
        root.mkdir()
        runs.append(Run(root, models[family], data, (*SMALL, *settings)))
        return runs[-1]

    yield make
    for run in runs:
        run.end()
