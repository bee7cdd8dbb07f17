"""Two pods of one attempt, as two processes with the environment of an Indexed Job."""

import json
import os
import signal
import socket

from finetune_contract.reports import ExitCode, Reason
from tests.support.training_runs import end_state, reap
from tests.support.waiting import eventually


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start_pods(run, tmp_path, monkeypatch, *settings):
    """Start the pods with index 0 and 1, each with its own termination log; return their ids."""
    topology = ("topology.nodes=2", "topology.processes_per_node=1", f"topology.rendezvous_port={_free_port()}")
    pids = []
    for index in (1, 0):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", str(index))
        monkeypatch.setenv("FINETUNE_ATTEMPT", "1")
        monkeypatch.setenv("FINETUNE_TERMINATION_LOG", str(tmp_path / f"termination-{index}"))
        pids.append(run.start(*topology, *settings))
    return pids[1], pids[0]


def test_two_pods_train_as_two_ranks_of_one_pod_do(make_run, tmp_path, monkeypatch):
    settings = ("training.max_steps=4", "checkpoint.every_steps=2")
    together = make_run("llama", "together", *settings)
    apart = make_run("llama", "apart", *settings)
    together.train()

    pods = _start_pods(apart, tmp_path, monkeypatch)

    assert [reap(pid) for pid in pods] == [0, 0]
    assert end_state(apart.manifests()[4]) == end_state(together.manifests()[4])
    assert apart.report("train")["details"]["step"] == 4
    assert json.loads((tmp_path / "termination-1").read_text())["reason"] == Reason.COMPLETED


def test_sigterm_in_one_pod_saves_and_stops_both_at_the_same_step(make_run, tmp_path, monkeypatch):
    run = make_run("llama", "workspace", "training.logging_steps=1", "checkpoint.every_steps=0")
    first, second = _start_pods(run, tmp_path, monkeypatch, "training.max_steps=100000")
    metrics = run.workspace.reports / "metrics.jsonl"
    eventually(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, within=120, every=0.02)
    os.kill(second, signal.SIGTERM)

    assert [reap(first), reap(second)] == [ExitCode.SUSPENDED, ExitCode.SUSPENDED]
    (step,) = run.manifests()
    assert run.report("train")["details"]["step"] == step


def test_a_pod_that_lost_the_other_says_so_and_does_not_blame_itself(make_run, tmp_path, monkeypatch):
    run = make_run("llama", "workspace", "checkpoint.every_steps=2")
    first, second = _start_pods(run, tmp_path, monkeypatch, "training.max_steps=100000")
    run.wait_for_checkpoint(2)
    os.killpg(second, signal.SIGKILL)

    assert reap(second) == -signal.SIGKILL
    assert reap(first) == ExitCode.PEERS_LOST
    report = json.loads((tmp_path / "termination-0").read_text())
    assert report["reason"] == Reason.RANK_FAILED
    assert "lost its peers" in report["message"]
    assert not (tmp_path / "termination-1").exists()
