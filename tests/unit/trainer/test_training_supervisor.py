"""Ranks as real processes, doing small things instead of training."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import Topology, TrainingConfig
from finetune_trainer.errors import StopRequested, TrainerError
from finetune_trainer.training.supervisor import run_ranks
from finetune_trainer.training.watch import Watch
from tests.support.waiting import eventually

EPOLL_WAITS = {"232", "281", "22"}
"""Numbers of epoll_wait and epoll_pwait on x86-64, and of epoll_pwait on arm64."""
TWO = Topology(processes_per_node=2)


def _rank():
    return int(os.environ["RANK"])


def _wait_for_signal():
    while True:
        time.sleep(0.05)


def _is_running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_every_rank_learns_its_place_and_rank_0_gives_the_results(tmp_path):
    def work():
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
        (tmp_path / str(_rank())).write_text(" ".join(os.environ[name] for name in names))
        return 0, {"from": _rank()}

    outcome = run_ranks(work, TWO, TrainingConfig())

    assert (outcome.exit_code, outcome.results, outcome.num_restarts) == (0, {"from": 0}, 0)
    assert (tmp_path / "0").read_text() == "0 0 2 127.0.0.1"
    assert (tmp_path / "1").read_text() == "1 1 2 127.0.0.1"
    assert "RANK" not in os.environ


def test_the_first_failure_is_raised_and_the_other_ranks_are_ended(tmp_path):
    def work():
        (tmp_path / f"pid-{_rank()}").write_text(str(os.getpid()))
        if _rank() == 1:
            print("about to divide", file=sys.stderr)
            raise ZeroDivisionError("1 / 0 in rank 1")
        _wait_for_signal()

    with pytest.raises(TrainerError) as caught:
        run_ranks(work, TWO, TrainingConfig())

    assert (caught.value.rank, caught.value.reason) == (1, Reason.USER_CODE_ERROR)
    assert "1 / 0 in rank 1" in caught.value.message
    assert "about to divide" in caught.value.details["last_lines"]
    assert not _is_running(int((tmp_path / "pid-0").read_text()))


def test_a_killed_rank_is_restarted_as_often_as_allowed_and_no_more(tmp_path):
    def work():
        with (tmp_path / "starts").open("a") as file:
            file.write(f"{_rank()}\n")
        if _rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        _wait_for_signal()

    with pytest.raises(TrainerError) as caught:
        run_ranks(work, Topology(processes_per_node=2, in_pod_restarts=1), TrainingConfig())

    assert (caught.value.reason, caught.value.details["in_pod_restarts"]) == (Reason.KILLED, 1)
    assert (tmp_path / "starts").read_text().count("1\n") == 2


def test_ranks_that_crash_while_they_are_asked_to_stop_are_not_restarted(tmp_path):
    supervisor = os.getpid()

    def work():
        with (tmp_path / "starts").open("a") as file:
            file.write("start\n")
        signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        os.kill(supervisor, signal.SIGTERM)
        _wait_for_signal()

    with pytest.raises(TrainerError) as caught:
        run_ranks(work, Topology(processes_per_node=1, in_pod_restarts=3), TrainingConfig())

    assert caught.value.reason == Reason.KILLED
    assert (tmp_path / "starts").read_text() == "start\n"


def test_a_stop_reaches_ranks_that_say_nothing_though_it_does_not_interrupt_the_wait():
    pid, (reader, writer) = os.fork(), os.pipe()
    if pid == 0:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
        while True:
            signal.pause()
    os.close(writer)
    watch = Watch()
    watch.add(0, pid, reader)
    previous = signal.getsignal(signal.SIGTERM)
    watch.take_signals()
    # A signal that comes just before a wait does not end it; nor does one that another thread is given.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    sender = threading.Thread(target=_send_while_main_waits)
    sender.start()
    try:
        watch.run()
    finally:
        sender.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, previous)
    assert (watch.ranks[0].exit_code, watch.is_stopping) == (7, True)


def test_a_stop_that_comes_while_ranks_are_forked_reaches_each_of_them(monkeypatch):
    fork, threads = os.fork, []

    def fork_and_stop():
        pid = fork()
        if pid and not threads:
            threads.append(threading.Thread(target=_send_to_own_process))
            threads[0].start()
            threads[0].join()
        return pid

    monkeypatch.setattr(os, "fork", fork_and_stop)
    outcome = run_ranks(_wait_for_signal, TWO, TrainingConfig())
    assert outcome.exit_code == ExitCode.SUSPENDED


def _send_while_main_waits():
    call = pathlib.Path(f"/proc/self/task/{os.getpid()}/syscall")
    eventually(lambda: call.read_text().split()[0] in EPOLL_WAITS, within=30, every=0.01, otherwise=call.read_text)
    _send_to_own_process()


def _send_to_own_process():
    """Have this thread take the signal, as any thread of a process may that does not block it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)


def test_after_a_crash_the_ranks_go_on_in_the_same_process(tmp_path):
    def work():
        mark = tmp_path / "crashed"
        if _rank() == 0 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 0, {"done": True}

    outcome = run_ranks(work, Topology(processes_per_node=2, in_pod_restarts=3), TrainingConfig())

    assert (outcome.num_restarts, outcome.results) == (1, {"done": True})


def test_what_cannot_work_again_is_not_restarted(tmp_path):
    def work():
        with (tmp_path / "starts").open("a") as file:
            file.write("x")
        raise TrainerError(Reason.INVALID_CONFIG, ExitCode.CONFIG, "never works")

    with pytest.raises(TrainerError, match="never works"):
        run_ranks(work, Topology(in_pod_restarts=5), TrainingConfig())

    assert (tmp_path / "starts").read_text() == "x"


def test_several_nodes_are_never_restarted_in_the_pod(tmp_path, monkeypatch):
    def work():
        with (tmp_path / "starts").open("a") as file:
            file.write(os.environ["RANK"])
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    topology = Topology(nodes=2, rendezvous_host="localhost", rendezvous_port=1, in_pod_restarts=5)
    with pytest.raises(TrainerError):
        run_ranks(work, topology, TrainingConfig())

    assert (tmp_path / "starts").read_text() == "1"


def test_sigterm_reaches_every_rank_and_the_run_ends_suspended(tmp_path):
    def work():
        try:
            (tmp_path / f"ready-{_rank()}").touch()
            _wait_for_signal()
        except StopRequested:
            (tmp_path / f"stopped-{_rank()}").touch()
            raise

    before = signal.getsignal(signal.SIGTERM)
    supervisor = os.getpid()
    # Another process sends the signal: a thread in this one would make forking unsafe.
    pid = os.fork()
    if pid == 0:
        try:
            eventually(lambda: len(list(tmp_path.glob("ready-*"))) == 2, within=20, every=0.02)
            os.kill(supervisor, signal.SIGTERM)
        finally:
            os._exit(0)
    outcome = run_ranks(work, TWO, TrainingConfig())
    os.waitpid(pid, 0)

    assert outcome.exit_code == ExitCode.SUSPENDED
    assert sorted(path.name for path in tmp_path.glob("stopped-*")) == ["stopped-0", "stopped-1"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_process_that_a_rank_left_behind_does_not_hold_up_the_end(tmp_path):
    def work():
        left = subprocess.Popen(["sleep", "600"], start_new_session=True)
        (tmp_path / "left").write_text(str(left.pid))
        return 0, {}

    try:
        assert run_ranks(work, Topology(), TrainingConfig()).exit_code == 0
    finally:
        os.kill(int((tmp_path / "left").read_text()), signal.SIGKILL)


def test_ranks_do_not_outlive_a_killed_supervisor(tmp_path):
    def work():
        (tmp_path / f"pid-{_rank()}").write_text(str(os.getpid()))
        _wait_for_signal()

    pid = os.fork()
    if pid == 0:
        run_ranks(work, TWO, TrainingConfig())
        os._exit(0)
    files = [tmp_path / "pid-0", tmp_path / "pid-1"]
    pids = eventually(
        lambda: [int(file.read_text() or 0) for file in files] if all(file.exists() for file in files) else None,
        within=20,
        every=0.02,
    )
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

    eventually(lambda: not any(_is_running(rank) for rank in pids), within=20, every=0.02)
