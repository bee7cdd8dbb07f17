"""Temporary folders of trainings: gone with the block, and with the next training where a kill ended the last."""

import contextlib
import os
import signal
import tempfile

import pytest

from finetune_contract.run_config import Topology, TrainingConfig
from finetune_trainer.training.scratch import remove_abandoned, scratch_folder
from finetune_trainer.training.supervisor import run_ranks


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def fork_owner():
    """Return a function that starts a process which sits in a scratch folder, and returns its id."""
    started = []

    def fork(is_left_to_a_child=False):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            with scratch_folder() as own:
                (own / "note").write_text("x")
                if is_left_to_a_child and os.fork():
                    os._exit(0)
                os.write(writer, str(os.getpid()).encode())
                signal.pause()
        if is_left_to_a_child:
            os.waitpid(pid, 0)
        started.append(int(os.read(reader, 20)))
        return started[-1]

    yield fork
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_folder_goes_with_its_block(folder):
    with scratch_folder() as own:
        (own / "note").write_text("x")
        assert own.parent == folder
    assert list(folder.iterdir()) == []


def test_a_folder_stays_as_long_as_its_process_and_goes_after_a_kill(folder, fork_owner):
    pid = fork_owner()
    remove_abandoned()
    assert len(list(folder.glob("*/note"))) == 1

    kill(pid)
    remove_abandoned()
    assert list(folder.iterdir()) == []


def test_a_folder_stays_as_long_as_a_child_of_its_process_lives(folder, fork_owner):
    fork_owner(is_left_to_a_child=True)
    remove_abandoned()
    assert len(list(folder.glob("*/note"))) == 1


def test_what_a_killed_training_left_goes_when_the_next_one_starts(folder, fork_owner):
    kill(fork_owner())
    (folder / "another-program").mkdir()

    run_ranks(lambda: (0, {}), Topology(), TrainingConfig())

    assert [path.name for path in folder.iterdir()] == ["another-program"]
