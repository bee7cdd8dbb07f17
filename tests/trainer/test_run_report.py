"""What promotion and evaluation leave for people to read, after a training that was killed once."""

from __future__ import annotations

import json

from finetune_trainer.promotion import promoted
from tests.support.training_runs import kill_group
from tests.support.waiting import eventually


def _log(run):
    path = run.workspace.metrics_log
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_killed_and_resumed_run_has_a_report_with_its_restart_scores_and_answers(make_run):
    run = make_run("llama", "workspace", "training.logging_steps=1", "checkpoint.every_steps=4")
    pid = run.start("training.max_steps=100000")
    run.wait_for_checkpoint(4)
    eventually(lambda: _log(run)[-1]["step"] >= 7, within=60, every=0.01)
    kill_group(pid)
    # A line that was cut off must not swallow the first one of the next attempt.
    with run.workspace.metrics_log.open("a") as log:
        log.write('{"step": 9')
    resumed = max(run.manifests())
    run.train(f"training.max_steps={resumed + 8}")

    assert run.call("promote") == 0
    details = run.report("promote")["details"]
    digest, page = details["digest"], run.workspace.root / details["report"]
    assert "The model has not been scored." in page.read_text()

    gates = [{"task": "holdout", "metric": "loss", "bound": "max", "threshold": 1000}]
    models = [{"name": "again", "source": str(run.model)}]
    further = (f"evaluation.gates={json.dumps(gates)}", f"evaluation.models={json.dumps(models)}")
    assert run.call("evaluate", "evaluation.baseline=true", *further) == 0
    assert run.report("evaluate")["details"]["report"] == details["report"]
    report = json.loads(page.with_suffix(".json").read_text())
    kept = [step for step, _ in report["curves"]["loss"]["kept"]]
    assert kept == list(range(1, resumed + 9))
    assert [step for stretch in report["curves"]["loss"]["lost"] for step, _ in stretch] == list(
        range(resumed + 1, report["attempts"][0]["reachedStep"] + 1)
    )
    assert report["work"]["restarts"] == 1
    assert {one["task"] for one in report["scores"]} == {"holdout"}
    assert report["scores"][0]["isLargerThanError"] is not None
    assert [gate["verdict"] for gate in report["gates"]] == ["Passed"]
    assert report["scores"][0]["models"]["again"]["score"] == report["scores"][0]["base"]
    assert len(report["samples"]) == 4
    assert all(sample["tuned"] and sample["base"] is not None for sample in report["samples"])
    assert any(sample["tuned"] != sample["base"] for sample in report["samples"])

    folder = run.workspace.promoted_model(digest)
    assert promoted.read_manifest(folder)["digest"] == digest
    assert json.loads((folder / "report.json").read_text())["scores"] == report["scores"]
    assert (folder / "report.html").read_text() == page.read_text()
    assert json.loads((folder / "provenance.json").read_text())["restarts"]["total"] == 0
