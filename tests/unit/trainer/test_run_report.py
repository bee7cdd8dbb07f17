"""The run report: what it says, what it leaves out, and that it never touches the model it lies beside."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import pathlib
import re

import pytest

from finetune_contract.gates import GateConfig
from finetune_contract.run_config import (
    AttemptFacts,
    DatasetConfig,
    EvaluationConfig,
    JobIdentity,
    RunConfig,
    RunHistory,
    Source,
    Topology,
)
from finetune_contract.workspace import Workspace
from finetune_trainer.evaluation.samples import NUM_SAMPLES, choose_samples
from finetune_trainer.promotion import promoted
from finetune_trainer.report import curves
from finetune_trainer.report.charts import choose_ticks
from finetune_trainer.report.facts import build_report
from finetune_trainer.report.history import read_history, replay
from finetune_trainer.report.page import build_page
from finetune_trainer.report.write import write_run_report
from finetune_trainer.reporting import write_json
from finetune_trainer.storage.publish import ACCOUNTS

HOSTILE = '<script>alert("x")</script><img src="https://evil.example/x.png">'


def start(step, at=0, attempt=1):
    return {"event": "start", "step": step, "at": float(at), "attempt": attempt, "total_steps": 10}


def logged(step, at=0, attempt=1, **values):
    values = values or {"loss": 10.0 - step, "tokens_per_second": 100.0}
    return {"step": step, "at": float(at), "attempt": attempt, "productive_seconds": step * 2.0, **values}


def steps_of(history, *, is_lost):
    return [point.step for point in history.points if point.is_lost == is_lost]


class TestHistory:
    def test_steps_done_twice_are_kept_once_and_the_first_ones_are_marked_as_lost(self):
        first = [start(0), *(logged(step, step) for step in range(1, 7))]
        second = [start(4, 10), *(logged(step, 6 + step) for step in range(5, 9))]
        history = replay([*first, *second])
        assert steps_of(history, is_lost=False) == [1, 2, 3, 4, 5, 6, 7, 8]
        assert history.list_lost("loss") == [[(5, 5.0), (6, 4.0)]]
        assert [life.steps_lost for life in history.lives] == [2, 0]
        assert (history.total_steps, history.productive_seconds, history.elapsed_seconds) == (10, 16.0, 6 + 4)

    def test_stretches_of_two_restarts_are_never_joined(self):
        lines = [start(0), logged(1), logged(2), start(1), logged(2), logged(3), logged(4), start(3), logged(4)]
        assert [[step for step, _ in one] for one in replay(lines).list_lost("loss")] == [[2], [4]]

    def test_what_a_writer_of_an_older_attempt_adds_is_lost(self):
        lines = [start(0), logged(1), start(1, attempt=2), logged(2, attempt=2), logged(2), logged(3, attempt=2)]
        history = replay(lines)
        assert steps_of(history, is_lost=False) == [1, 2, 3]
        assert steps_of(history, is_lost=True) == [2]
        assert [life.attempt for life in history.lives] == [1, 2]

    def test_an_attempt_whose_start_was_not_written_takes_nothing_from_the_one_before(self):
        history = replay([start(0), logged(1), logged(2), logged(3, attempt=2)])
        assert steps_of(history, is_lost=False) == [1, 2, 3]

    def test_half_a_line_and_no_file_are_no_trouble(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        assert read_history(path).points == ()
        whole = json.dumps({"step": 1, "at": "2026-01-01T00:00:00Z", "loss": 2.0})
        path.write_text(f'{whole}\n{{"step": 2, "at"\n["no object"]\n{whole.replace("1,", "3,", 1)}\n')
        assert [point.step for point in read_history(path).points] == [1, 3]

    def test_a_loss_that_is_no_number_is_not_drawn(self):
        assert replay([start(0), logged(1, loss=float("nan")), logged(2)]).list_values("loss") == [(2, 8.0)]

    def test_a_long_run_is_drawn_with_the_means_of_stretches(self):
        history = replay([start(0), *(logged(step, loss=float(step)) for step in range(1, 4001))])
        kept = curves.build_curves(history)["loss"]["kept"]
        assert len(kept) == curves.MAX_POINTS
        assert kept[0] == (4.5, 4.5)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.7, 1.9), (3.0, 3.0), (0, 2e-5), (0, 123456), (-3, 2), (0, 0)])
def test_ticks_are_round_few_and_around_the_values(low, high):
    ticks = choose_ticks(low, high)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))


@pytest.fixture
def run(tmp_path):
    """A workspace after everything: one restart, a promoted model, scores and samples; and its settings."""
    workspace = Workspace(tmp_path / "ws")
    beside = workspace.output / "new"
    beside.mkdir(parents=True)
    (beside / "model.safetensors").write_bytes(b"weights")
    (beside / "config.json").write_text("{}")
    digest = promoted.write_manifest(beside)
    folder = beside.rename(workspace.promoted_model(digest))
    workspace.reports.mkdir()
    lines = [
        {**line, "at": f"2026-01-01T00:{int(line['at']):02}:00Z"}
        for line in [start(0), logged(2, 1), logged(4, 2), start(2, 4, 2), logged(4, 5, 2), logged(6, 6, 2)]
    ]
    workspace.metrics_log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = {"source": "hf://acme/base", "revision": "c0ffee", "digest": "b" * 64}
    workspace.base_model.mkdir(parents=True)
    (workspace.base_model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Base\n")
    report = {
        "rowsRead": 100,
        "rowsKept": 90,
        "rowsRemoved": 10,
        "rowsTrain": 88,
        "removedPerCategory": {"refusal": 10},
    }
    provenance = {
        "job": {"namespace": "research", "name": "support"},
        "base_model": base,
        "dataset": {"digest": "d" * 32, "sources": ["hf://acme/rows"], "report": report, "prompt_template": "alpaca"},
        "checkpoint": {"step": 6, "attempt": 2, "created_at": "2026-01-01T00:06:00Z"},
        "versions": {"torch": "2.15.0"},
    }
    write_json(folder / "provenance.json", provenance)
    scores = {
        "digest": digest,
        "scores": {"holdout": {"loss": 2.0}, "arc_challenge": {"acc_norm,none": 0.5}},
        "baseline": {"holdout": {"loss": 3.0}, "arc_challenge": {"acc_norm,none": 0.49}},
        "errors": {"holdout": {"loss": 0.1}, "arc_challenge": {"acc_norm,none": 0.01}},
        "baselineErrors": {"holdout": {"loss": 0.1}, "arc_challenge": {"acc_norm,none": 0.01}},
    }
    write_json(workspace.reports / "scores.json", scores)
    sample = {"prompt": HOSTILE, "reference": "right", "tuned": "almost", "base": ""}
    write_json(workspace.samples, {"digest": digest, "samples": [sample]})
    attempts = (
        AttemptFacts(1, ("node-a",), "2026-01-01T00:00:00Z", "2026-01-01T00:03:00Z", "NodeLost", 0, 4, 2, 60.0),
        AttemptFacts(2, ("node-b",), "2026-01-01T00:04:00Z", "2026-01-01T00:07:00Z", "Completed", 2, 6),
    )
    history = RunHistory(attempts, 1, {"NodeLost": 1}, 180.0, 360.0, 2, 60.0, {"trainer": "example.org/trainer:1"})
    return RunConfig(
        Source("hf://acme/base"),
        DatasetConfig((Source("hf://acme/rows"),)),
        job=JobIdentity("research", "support", "uid"),
        workspace=str(workspace.root),
        topology=Topology(nodes=1, gpus_per_node=4),
        history=history,
    ), digest


def test_the_report_says_what_the_operator_knows_and_what_the_workspace_has(run):
    settings, digest = run
    workspace = Workspace(_root(settings))
    report = build_report(workspace, settings, digest)
    work = report["work"]
    assert (work["goodput"], work["restarts"], work["stepsLost"]) == (0.5, 1, 2)
    assert work["gpuHours"] == pytest.approx(0.4)
    assert [attempt["reason"] for attempt in report["attempts"]] == ["NodeLost", "Completed"]
    assert [one["isLargerThanError"] for one in report["scores"]] == [False, True]
    assert report["curves"]["loss"] == {"kept": [[2, 8.0], [4, 6.0], [6, 4.0]], "lost": [[[4, 6.0]]]}
    assert report["data"]["rowsRemoved"] == 10
    assert report["checkpoint"]["step"] == 6
    assert report["missing"] == []


def test_the_page_shows_each_part_and_loads_nothing(run):
    settings, digest = run
    write_run_report(settings, digest)
    page = (Workspace(_root(settings)).reports / f"run-{digest}.html").read_text()
    for said in (
        "Held-out loss",
        "50.0%",
        "0.4",
        "NodeLost",
        "almost",
        "refusal",
        "c0ffee",
        digest,
        "lost to a restart",
    ):
        assert said in page, said
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    parser = _Tags()
    parser.feed(page)
    assert not parser.tags & {"script", "img", "link", "iframe", "object", "a"}
    assert not parser.links
    assert "url(" not in page
    assert "default-src 'none'" in page


class _Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.texts = set(), [], []

    def handle_data(self, data):
        self.texts.append(data)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "xlink:href")]


def test_page_json_and_card_say_the_same(run):
    settings, digest = run
    write_run_report(settings, digest)
    reports = Workspace(_root(settings)).reports
    page, card = (reports / f"run-{digest}.html").read_text(), (reports / f"run-{digest}.md").read_text()
    facts = json.loads((reports / f"run-{digest}.json").read_text())
    difference = next(one for one in facts["scores"] if one["task"] == "arc_challenge")["difference"]
    for text in (page, card):
        assert f"{difference:+.4g} ± 0.014" in text
        assert f"{facts['work']['goodput']:.1%}" in text
        assert f"{facts['work']['gpuHours']:.4g}" in text


def test_the_card_has_the_front_matter_that_a_hub_reads(run):
    from huggingface_hub import ModelCard

    settings, digest = run
    write_run_report(settings, digest)
    card = ModelCard.load(Workspace(_root(settings)).promoted_model(digest) / "README.md")
    assert (card.data.base_model, card.data.license, card.data.datasets) == ("acme/base", "apache-2.0", ["acme/rows"])
    assert card.data.model_name == "support"
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("arc_challenge", "acc_norm", 0.5)
    assert HOSTILE not in card.content


def test_the_report_beside_a_model_changes_neither_its_digest_nor_its_content(run):
    settings, digest = run
    folder = Workspace(_root(settings)).promoted_model(digest)
    before = promoted.list_content(folder)
    assert write_run_report(settings, digest) == {"report": f"reports/run-{digest}.html"}
    assert {path.name for path in folder.iterdir()} >= ACCOUNTS
    assert promoted.list_content(folder) == before == ["config.json", "model.safetensors"]
    assert promoted.read_manifest(folder)["digest"] == digest


def test_only_files_at_the_top_are_no_content(tmp_path):
    (tmp_path / "adapter").mkdir()
    for name in ("README.md", "adapter/README.md", "report.html", "model.safetensors"):
        (tmp_path / name).write_text("x")
    assert promoted.list_content(tmp_path) == ["adapter/README.md", "model.safetensors"]


def add_gates(settings, *gates):
    return dataclasses.replace(settings, evaluation=EvaluationConfig(gates=gates))


class TestGates:
    def test_each_gate_has_its_threshold_score_margin_and_verdict(self, run):
        settings, digest = run
        settings = add_gates(
            settings,
            GateConfig("arc_challenge", "acc_norm", "min", 0.4),
            GateConfig("holdout", "loss", "max", 1.5),
            GateConfig("holdout", "loss", "maxRegression", 0.25),
            GateConfig("mmlu", "acc", "min", 0.4),
        )
        gates = build_report(Workspace(_root(settings)), settings, digest)["gates"]
        assert [(one["verdict"], one["score"], one["margin"]) for one in gates] == [
            ("Passed", 0.5, pytest.approx(0.1)),
            ("Failed", 2.0, -0.5),
            ("Passed", 2.0, 1.25),
            ("ScoreMissing", None, None),
        ]
        assert [next(iter({"min", "max", "maxRegression"} & set(one))) for one in gates] == [
            *("min", "max", "maxRegression", "min"),
        ]
        assert gates[2]["baseline"] == 3.0

    def test_page_and_card_say_by_which_thresholds_and_when_they_were_judged(self, run):
        settings, digest = run
        settings = add_gates(
            settings,
            GateConfig("holdout", "loss", "max", 1.5),
            GateConfig("holdout", "loss", "maxRegression", 0.25),
            GateConfig("mmlu", "acc", "min", 0.4),
        )
        write_run_report(settings, digest)
        reports = Workspace(_root(settings)).reports
        made = json.loads((reports / f"run-{digest}.json").read_text())["createdAt"]
        for text in (_text_of(reports / f"run-{digest}.html"), (reports / f"run-{digest}.md").read_text()):
            for said in ("max 1.5", "-0.5", "failed", "maxRegression 0.25", "+1.25", "passed", "not judged"):
                assert said in text, said
            assert f"As of {made}" in text
            assert "status.evaluation.gates" in text

    def test_the_verdict_is_the_operator_s_which_sees_six_digits(self, run):
        settings, digest = run
        path = Workspace(_root(settings)).reports / "scores.json"
        found = json.loads(path.read_text())
        found["scores"]["holdout"]["loss"] = 1.50000001
        write_json(path, found)
        settings = add_gates(settings, GateConfig("holdout", "loss", "max", 1.5))
        (gate,) = build_report(Workspace(_root(settings)), settings, digest)["gates"]
        assert (gate["verdict"], gate["margin"]) == ("Passed", 0.0)

    def test_no_gate_is_judged_by_the_scores_of_another_model(self, run):
        settings, digest = run
        path = Workspace(_root(settings)).reports / "scores.json"
        path.write_text(path.read_text().replace(digest, "another"))
        settings = add_gates(settings, GateConfig("holdout", "loss", "max", 9.0))
        (gate,) = build_report(Workspace(_root(settings)), settings, digest)["gates"]
        assert gate["verdict"] == "ScoreMissing"

    def test_a_job_without_gates_has_no_table_of_them(self, run):
        settings, digest = run
        write_run_report(settings, digest)
        reports = Workspace(_root(settings)).reports
        assert json.loads((reports / f"run-{digest}.json").read_text())["gates"] == []
        assert "Gates" not in _text_of(reports / f"run-{digest}.html")
        assert "Gates" not in (reports / f"run-{digest}.md").read_text()

    def test_another_threshold_makes_another_report(self, run):
        settings, digest = run
        page = Workspace(_root(settings)).reports / f"run-{digest}.html"
        write_run_report(add_gates(settings, GateConfig("holdout", "loss", "max", 1.5)), digest)
        assert "failed" in _text_of(page)
        write_run_report(add_gates(settings, GateConfig("holdout", "loss", "max", 2.5)), digest)
        assert "failed" not in _text_of(page)


class TestFurtherModels:
    @pytest.fixture
    def compared(self, run):
        """The run, scored beside two further models; one has another vocabulary and hence no held-out loss."""
        settings, digest = run
        path = Workspace(_root(settings)).reports / "scores.json"
        near = {"holdout": {"loss": 2.1}, "arc_challenge": {"acc_norm,none": 0.3}}
        errors = {"holdout": {"loss": 0.1}, "arc_challenge": {"acc_norm,none": 0.02}}
        models = {
            "previous": {"scores": near, "errors": errors},
            "rival": {"scores": {"arc_challenge": {"acc_norm,none": 0.45}}, "errors": {}},
        }
        write_json(path, json.loads(path.read_text()) | {"models": models})
        return settings, digest

    def test_every_score_stands_beside_those_of_the_further_models(self, compared):
        settings, digest = compared
        scores = build_report(Workspace(_root(settings)), settings, digest)["scores"]
        arc, loss = (one["models"] for one in sorted(scores, key=lambda one: one["task"]))
        assert arc["previous"] == {
            "score": 0.3,
            "error": 0.02,
            "difference": pytest.approx(0.2),
            "differenceError": pytest.approx(0.0224, abs=1e-4),
            "isLargerThanError": True,
        }
        assert (arc["rival"]["score"], arc["rival"]["isLargerThanError"]) == (0.45, None)
        assert loss["previous"]["isLargerThanError"] is False
        assert "rival" not in loss

    def test_page_and_card_have_a_column_for_each_and_mark_what_chance_does_not_make(self, compared):
        settings, digest = compared
        write_run_report(settings, digest)
        reports = Workspace(_root(settings)).reports
        page = _text_of(reports / f"run-{digest}.html")
        card = (reports / f"run-{digest}.md").read_text().replace("\\", "")
        for text in (page, card):
            for said in ("previous", "rival", "0.3 ± 0.02 *", "2.1 ± 0.1", "0.45"):
                assert said in text, said
            assert "2.1 ± 0.1 *" not in text
            assert "0.45 *" not in text

    def test_names_that_are_hostile_stay_text(self, compared):
        settings, digest = compared
        path = Workspace(_root(settings)).reports / "scores.json"
        found = json.loads(path.read_text().replace("previous", HOSTILE.replace('"', "'")))
        found["scores"][HOSTILE] = {"a|b": 1.0}
        write_json(path, found)
        settings = add_gates(settings, GateConfig(HOSTILE, "a|b", "min", 0.5))
        write_run_report(settings, digest)
        reports = Workspace(_root(settings)).reports
        page = (reports / f"run-{digest}.html").read_text()
        # The front matter is data, which nobody renders.
        card = (reports / f"run-{digest}.md").read_text().partition("\n---\n")[2]
        for text in (page, card):
            assert "&lt;script" in text
            assert "<script" not in text
            assert "<img" not in text
        (row,) = (line for line in card.splitlines() if "min 0.5" in line)
        assert len(re.findall(r"(?<!\\)\|", row)) == 1 + 7


def test_writing_the_same_report_again_touches_no_file(run):
    settings, digest = run
    folder = Workspace(_root(settings)).promoted_model(digest)
    write_run_report(settings, digest)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write_run_report(settings, digest)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_scores_and_answers_of_another_model_are_left_out_and_said(run):
    settings, digest = run
    workspace = Workspace(_root(settings))
    for path in (workspace.reports / "scores.json", workspace.samples):
        path.write_text(path.read_text().replace(digest, "another"))
    report = build_report(workspace, settings, digest)
    assert (report["scores"], report["samples"]) == ([], [])
    assert any("not been scored" in text for text in report["missing"])
    assert any("No sample answers" in text for text in report["missing"])


def test_a_folder_without_a_cluster_has_a_report_from_its_log(run, run_command, capsys):
    settings, digest = run
    assert run_command("report", "--workspace", settings.workspace, "--json").code == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["digest"] == digest
    assert (report["work"]["source"], report["work"]["restarts"], report["work"]["stepsLost"]) == ("log", 1, 2)
    assert report["work"]["allocatedSeconds"] == 240.0
    assert any("log of metrics" in text for text in report["missing"])


def test_an_empty_folder_has_a_report_that_says_what_is_missing(run_command, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run_command("report", "--workspace", str(tmp_path / "empty")).code == 0
    page = (tmp_path / "empty" / "reports" / "run.html").read_text()
    assert str(tmp_path / "empty" / "reports" / "run.html") in capsys.readouterr().out
    assert len(re.findall(r"<li>", page)) >= 3
    assert "No model has been promoted yet" in page


def test_a_digest_or_a_folder_that_is_not_there_is_said(run, run_command, capsys):
    settings, digest = run
    assert run_command("report", "--workspace", settings.workspace, "--digest", digest[:8]).code == 0
    assert run_command("report", "--workspace", settings.workspace, "--digest", "zz").code == 66
    assert digest[:12] in capsys.readouterr().err
    assert run_command("report", "--workspace", f"{settings.workspace}-gone").code == 66


def test_secrets_never_reach_the_report(run, monkeypatch):
    settings, digest = run
    monkeypatch.setenv("FINETUNE_MODEL_HF_TOKEN", "hf_verysecrettoken")
    workspace = Workspace(_root(settings))
    workspace.samples.write_text(workspace.samples.read_text().replace("almost", "hf_verysecrettoken"))
    assert "hf_verysecrettoken" not in json.dumps(build_report(workspace, settings, digest))


def test_a_report_that_cannot_be_written_fails_no_phase(run):
    settings, digest = run
    (Workspace(_root(settings)).reports / f"run-{digest}.html").mkdir()
    assert write_run_report(settings, digest) == {}


def test_a_page_needs_no_part_but_the_frame():
    empty = {
        name: {} for name in ("job", "model", "base", "checkpoint", "data", "training", "work", "curves", "summary")
    }
    empty |= {"versions": {}, "images": {}, "attempts": [], "scores": [], "gates": [], "samples": [], "missing": []}
    assert "<h1>Run report" in build_page(empty)


@pytest.mark.parametrize(
    "card", ["", "no front matter", "---\nlicense: [a\n---\n", "---\n- a\n---\n", "---\nlicense: 3\n---"]
)
def test_a_base_whose_card_says_nothing_of_a_licence_has_none(run, card):
    settings, digest = run
    workspace = Workspace(_root(settings))
    (workspace.base_model / "README.md").write_text(card)
    assert "license" not in build_report(workspace, settings, digest)["base"]


class TestSamples:
    def conversations(self, count):
        return [
            [{"role": "user", "content": f"question {index}"}, {"role": "assistant", "content": f"answer {index}"}]
            for index in range(count)
        ]

    def test_the_choice_is_seeded_and_independent_of_the_order(self):
        rows = self.conversations(50)
        chosen = choose_samples(rows, seed=1)
        assert len(chosen) == NUM_SAMPLES
        assert choose_samples(list(reversed(rows)), seed=1) == chosen
        assert choose_samples(rows, seed=2) != chosen

    def test_the_first_exchange_is_asked_with_its_system_message_and_long_prompts_are_not(self):
        turns = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Add.", "input": "1 + 1"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "3"},
        ]
        long = [{"role": "user", "content": "x" * 5000}, {"role": "assistant", "content": "y"}]
        unanswered = [{"role": "user", "content": "hello?"}]
        (sample,) = choose_samples([turns, long, unanswered], seed=1)
        assert (sample.prompt, sample.reference) == ("Be brief.\n\nAdd.\n1 + 1", "2")


def _text_of(page):
    """Return what a page shows."""
    parser = _Tags()
    parser.feed(page.read_text())
    return " ".join(parser.texts)


def _root(settings):
    return pathlib.Path(settings.workspace)
