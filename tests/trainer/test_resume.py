"""Training that is interrupted ends where uninterrupted training ends, to the bit."""

import json
import os
import signal

import pytest

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.checkpoints.layout import MANIFEST, list_quarantined
from tests.support.training_runs import end_state, kill_group, reap
from tests.support.waiting import eventually

RECIPES = {
    "wizardlm-freeform": ("training.recipe=wizardlm-freeform", "training.packing=false"),
    "efficient": ("training.recipe=efficient", "training.packing=true"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_run_ends_bit_identical_to_one_that_was_not(make_run, recipe):
    # 40 rows, or fewer packs, in steps of 4: the kill comes in the second epoch or later, between two saves.
    settings = (*RECIPES[recipe], "training.max_steps=17", "checkpoint.every_steps=5", "checkpoint.keep_latest=9")
    whole = make_run("llama", "whole", *settings)
    broken = make_run("llama", "broken", *settings)
    whole.train()

    pid = broken.start()
    broken.wait_for_checkpoint(10)
    kill_group(pid)
    results = broken.train()

    assert results["resumed_from_step"] in (10, 15)
    assert results["step"] == results["total_steps"] == 17
    assert end_state(broken.manifests()[17]) == end_state(whole.manifests()[17])
    assert len(end_state(whole.manifests()[17])) == 7


def test_a_run_resumes_from_the_newest_complete_checkpoint_past_damaged_ones(make_run):
    run = make_run("llama", "workspace", "checkpoint.every_steps=2", "checkpoint.keep_latest=9")
    run.train("training.max_steps=6")
    before = end_state(run.manifests()[6])
    checkpoints = run.workspace.checkpoints
    (checkpoints / "checkpoint-6" / MANIFEST).unlink()
    next((checkpoints / "checkpoint-4").rglob("*optim_states.pt")).write_bytes(b"truncated")

    results = run.train("training.max_steps=6")

    assert results["resumed_from_step"] == 2
    assert end_state(run.manifests()[6]) == before
    # Both damaged folders were set aside; the commit of newer checkpoints then made them superfluous.
    assert list_quarantined(checkpoints) == []
    assert results["checkpoints"] == [2, 4, 6]


def test_a_finished_run_that_starts_again_trains_no_step(make_run):
    run = make_run()
    run.train("training.max_steps=3")
    before = run.manifests()[3]

    results = run.train("training.max_steps=3")

    assert (results["step"], results["resumed_from_step"]) == (3, 3)
    assert run.manifests()[3] == before


def test_the_end_of_training_is_a_checkpoint_whatever_the_interval(make_run):
    run = make_run("llama", "workspace", "checkpoint.every_steps=0", "training.epochs=0.7", "training.packing=false")

    results = run.train()

    # 40 rows in steps of 4 are 10 steps an epoch; the Trainer counted as `count_steps` says.
    assert results["checkpoints"] == [7]
    assert results["step"] == results["total_steps"] == 7


def test_sigterm_saves_at_the_next_step_and_the_run_goes_on_from_there(make_run):
    run = make_run("llama", "workspace", "checkpoint.every_steps=0", "training.logging_steps=1")
    pid = run.start("training.max_steps=100000")
    metrics = run.workspace.reports / "metrics.jsonl"
    eventually(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3, within=120, every=0.02)
    os.kill(pid, signal.SIGTERM)

    assert reap(pid) == ExitCode.SUSPENDED
    report = run.report("train")
    stopped_at = report["details"]["step"]
    assert report["reason"] == Reason.SUSPENDED
    assert list(run.manifests()) == [stopped_at]

    results = run.train(f"training.max_steps={stopped_at + 2}")
    assert (results["resumed_from_step"], results["step"]) == (stopped_at, stopped_at + 2)


def test_sigterm_with_no_time_to_save_stops_at_once_and_keeps_the_checkpoint_before(make_run, monkeypatch):
    monkeypatch.setenv("FINETUNE_NOTICE_SECONDS", "1")
    run = make_run("llama", "workspace", "checkpoint.every_steps=4", "training.logging_steps=1")
    pid = run.start("training.max_steps=100000")
    run.wait_for_checkpoint(4)
    metrics = run.workspace.reports / "metrics.jsonl"
    eventually(lambda: _last_step(metrics) % 4 == 1, within=120, every=0.005)
    os.kill(pid, signal.SIGTERM)

    assert reap(pid) == ExitCode.SUSPENDED
    report = run.report("train")
    saved = max(run.manifests())
    assert saved % 4 == 0
    assert report["details"]["latest_complete"] == saved <= report["details"]["step"]
    assert f"step {saved} is kept" in report["message"] or report["details"]["step"] == saved


def _last_step(metrics):
    return json.loads(metrics.read_text().splitlines()[-1])["step"]


def test_a_crashed_rank_restarts_in_the_pod_from_the_last_checkpoint(make_run):
    settings = ("checkpoint.every_steps=2", "training.logging_steps=1", "topology.in_pod_restarts=1")
    run = make_run("llama", "workspace", *settings)
    pid = run.start("training.max_steps=30")
    run.wait_for_checkpoint(4)
    children = eventually(lambda: _children(pid), within=20)
    os.kill(children[-1], signal.SIGKILL)

    assert reap(pid) == ExitCode.OK
    details = run.report("train")["details"]
    assert (details["in_pod_restarts"], details["step"]) == (1, 30)
    assert details["resumed_from_step"] >= 4


def test_a_rank_that_dies_for_good_is_named_with_its_cause(make_run):
    run = make_run("llama", "workspace", "checkpoint.every_steps=2")
    pid = run.start("training.max_steps=100000")
    run.wait_for_checkpoint(2)
    os.kill(_children(pid)[-1], signal.SIGKILL)

    assert reap(pid) == 128 + signal.SIGKILL
    report = run.report("train")
    assert (report["reason"], report["rank"]) == (Reason.KILLED, 1)
    assert "rank 1 was killed by SIGKILL" in report["message"]
    # What a killed rank had done is known although it said nothing.
    assert report["details"]["step"] >= 2
    assert report["details"]["productive_seconds"] > 0


def test_an_older_attempt_stops_without_writing_when_a_newer_one_owns_the_workspace(make_run):
    run = make_run("llama", "workspace", "checkpoint.every_steps=2", "checkpoint.keep_latest=2")
    pid = run.start("training.max_steps=100000")
    run.wait_for_checkpoint(2)
    run.workspace.attempt_file.write_text(json.dumps({"attempt": 99}))
    assert reap(pid) == ExitCode.FENCED
    committed = list(run.manifests())

    assert run.report("train")["reason"] == Reason.FENCED
    assert all(manifest.attempt == 1 for manifest in run.manifests().values())
    assert json.loads(run.workspace.attempt_file.read_text()) == {"attempt": 99}
    assert len(committed) <= 2


def test_the_best_and_the_latest_checkpoints_stay(make_run):
    settings = ("checkpoint.every_steps=2", "checkpoint.keep_latest=1", "checkpoint.keep_best=1")
    # The rate rises to nonsense, so that the best checkpoint is not the newest.
    run = make_run("llama", "workspace", *settings, "training.scheduler=constant_with_warmup")

    results = run.train("training.max_steps=10", "training.warmup_steps=10", "training.learning_rate=0.3")

    metrics = {step: manifest.metrics["eval_loss"] for step, manifest in run.manifests().items()}
    assert results["checkpoints"] == sorted({results["best"], 10})
    assert metrics[results["best"]] == min(metrics.values())
    assert results["best"] < 10


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]
