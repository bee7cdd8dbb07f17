"""Failures of real ranks: the first one's error is reported, hangs are ended with every rank's stack."""

import json
import os
import signal
import socket
import threading

import pytest
from transformers import TrainerCallback

from finetune_contract.reports import MAX_TERMINATION_BYTES, ExitCode, Reason
from finetune_trainer.distributed import read_rank
from finetune_trainer.training import rank as rank_module
from tests.support.training_runs import reap
from tests.support.waiting import eventually

ENDLESS = ("training.max_steps=100000", "checkpoint.every_steps=2")


class Fault(TrainerCallback):
    """Does something in one rank at the end of a step."""

    def __init__(self, rank, step, action):
        self._rank, self._step, self._action = rank, step, action

    def on_step_end(self, args, state, control, **kwargs):
        if read_rank() == self._rank and state.global_step == self._step:
            self._action()


@pytest.fixture
def inject(monkeypatch):
    """Return a function that puts a fault into the ranks, which are forked with it in place."""
    build = rank_module._build_trainer

    def plan(rank, step, action):
        def build_with_fault(*args):
            trainer = build(*args)
            trainer.add_callback(Fault(rank, step, action))
            return trainer

        monkeypatch.setattr(rank_module, "_build_trainer", build_with_fault)

    return plan


@pytest.fixture
def termination(tmp_path, monkeypatch):
    """The termination log of the pod."""
    path = tmp_path / "termination"
    monkeypatch.setenv("FINETUNE_TERMINATION_LOG", str(path))
    return path


def _divide_by_zero():
    raise ZeroDivisionError("the mean of no rows")


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def stand_still_for_ever():
    """Be hung: what the report has to show."""
    threading.Event().wait()


def test_a_rank_that_raises_is_reported_and_not_the_one_that_lost_it(make_run, inject, termination):
    inject(1, 3, _divide_by_zero)
    run = make_run("llama", "workspace", *ENDLESS)

    assert run.call("train") == ExitCode.USER_CODE

    report = json.loads(termination.read_text())
    assert (report["reason"], report["rank"]) == (Reason.USER_CODE_ERROR, 1)
    assert "the mean of no rows" in report["message"]
    assert "in _divide_by_zero" in report["details"]["last_lines"]
    assert report["details"]["failed_at"] > 0
    assert 2 in run.manifests()


def test_a_rank_that_is_killed_is_reported_as_a_shell_does(make_run, inject, termination):
    inject(1, 3, _die)
    run = make_run("llama", "workspace", *ENDLESS)

    assert run.call("train") == 137

    report = json.loads(termination.read_text())
    assert (report["reason"], report["rank"], report["exit_code"]) == (Reason.KILLED, 1, 137)
    assert report["message"].startswith("rank 1 was killed by SIGKILL")


def test_a_hang_before_a_collective_shows_where_every_rank_stands(make_run, inject, termination):
    inject(1, 3, stand_still_for_ever)
    run = make_run("llama", "workspace", *ENDLESS, "progress_deadline_seconds=3")

    assert run.call("train") == ExitCode.NO_PROGRESS

    text = termination.read_text()
    report = json.loads(text)
    assert len(text.encode()) <= MAX_TERMINATION_BYTES
    assert (report["reason"], report["rank"]) == (Reason.NO_PROGRESS, 1)
    assert "rank 1 stands at threading.py" in report["message"]
    assert "rank 0 waits for the others" in report["message"]
    (stacks,) = run.workspace.reports.glob("stacks-*.txt")
    first, _, second = stacks.read_text().partition("rank 1\n")
    assert "stand_still_for_ever" in second
    assert "stand_still_for_ever" not in first
    assert "distributed" in first
    assert str(stacks) in report["hint"]


def test_a_save_that_takes_longer_than_the_deadline_is_no_hang(make_run, monkeypatch):
    from finetune_trainer.training.trainer import ContractTrainer

    save = ContractTrainer._save_checkpoint

    def save_slowly(trainer, *args):
        # Longer than the deadline by half; the other rank waits in the save as well.
        threading.Event().wait(3)
        save(trainer, *args)

    monkeypatch.setattr(ContractTrainer, "_save_checkpoint", save_slowly)
    run = make_run("llama", "workspace", "checkpoint.every_steps=2", "progress_deadline_seconds=2")

    assert run.train("training.max_steps=4")["step"] == 4


def test_the_pod_that_failed_and_the_pod_that_lost_it_report_different_causes(make_run, inject, tmp_path, monkeypatch):
    inject(1, 3, _divide_by_zero)
    run = make_run("llama", "workspace", *ENDLESS)
    pods = _start_pods(run, tmp_path, monkeypatch)

    assert [reap(pid) for pid in pods] == [ExitCode.PEERS_LOST, ExitCode.USER_CODE]
    first, second = (json.loads((tmp_path / f"termination-{index}").read_text()) for index in (0, 1))
    assert (first["reason"], second["reason"]) == (Reason.RANK_FAILED, Reason.USER_CODE_ERROR)
    assert (first["rank"], second["rank"]) == (0, 1)


def test_a_hang_in_another_pod_is_shown_by_both(make_run, inject, tmp_path, monkeypatch):
    inject(1, 3, stand_still_for_ever)
    run = make_run("llama", "workspace", *ENDLESS, "progress_deadline_seconds=3")
    pods = _start_pods(run, tmp_path, monkeypatch)

    codes = [reap(pid) for pid in pods]
    second = json.loads((tmp_path / "termination-1").read_text())
    assert codes[1] == ExitCode.NO_PROGRESS
    # The pod that waits gives up at the same time, or loses the other just before.
    assert codes[0] in (ExitCode.NO_PROGRESS, ExitCode.PEERS_LOST)
    assert second["details"]["stacks"]["1"]["waits"] is False
    assert "stand_still_for_ever" in (run.workspace.reports / "stacks-attempt-1-pod-1.txt").read_text()


def _start_pods(run, tmp_path, monkeypatch):
    """Start the pods with index 0 and 1, each with its own termination log; return their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for index in (1, 0):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", str(index))
        monkeypatch.setenv("FINETUNE_ATTEMPT", "1")
        monkeypatch.setenv("FINETUNE_TERMINATION_LOG", str(tmp_path / f"termination-{index}"))
        settings = ("topology.nodes=2", "topology.processes_per_node=1", f"topology.rendezvous_port={port}")
        pids.append(run.start(*settings))
    return pids[1], pids[0]


@pytest.fixture
def small_memory():
    """A control group of 1 GiB below this process's own, made for one test and removed after it."""
    from finetune_trainer.training.host_memory import HostMemory

    for parent in HostMemory()._folders:
        folder = parent / f"finetune-test-{os.getpid()}"
        limit = next((name for name in ("memory.max", "memory.limit_in_bytes") if _try_limit(folder, name)), None)
        if limit is not None:
            break
        _remove(folder)
    else:
        pytest.skip("the memory of this machine's control groups is not this user's to limit")
    try:
        yield folder
    finally:
        _remove(folder)


def _try_limit(folder, name):
    try:
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(str(1 << 30))
    except OSError:
        return False
    return True


def _remove(folder):
    if folder.is_dir():
        # The kernel lets go of a group shortly after its last process.
        eventually(lambda: _try_rmdir(folder), within=10, every=0.05)


def _try_rmdir(folder):
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


def _take_all_memory():
    held = []
    while True:
        held.append(os.urandom(1 << 24))


def test_a_rank_that_the_kernel_killed_for_memory_says_how_much_to_ask_for(make_run, inject, termination, small_memory):
    inject(1, 3, _take_all_memory)
    run = make_run("llama", "workspace", *ENDLESS)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            (small_memory / "cgroup.procs").write_text(str(os.getpid()))
            code = run.call("train")
        finally:
            os._exit(code)

    assert reap(pid) == ExitCode.HOST_OUT_OF_MEMORY
    report = json.loads(termination.read_text())
    assert (report["reason"], report["rank"]) == (Reason.HOST_OUT_OF_MEMORY, 1)
    assert report["message"] == "rank 1: the kernel killed it for memory; the limit is 1.0 GiB"
    assert report["hint"] == "Set spec.resources.memory to 2Gi."
