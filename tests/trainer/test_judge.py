"""A judge of the data with a real, tiny classifier: random weights, read from a folder as any other."""

from __future__ import annotations

import errno
import itertools
import json
import pathlib
import shutil

import pytest

from finetune_contract.run_config import DatasetConfig, JudgeConfig, Source
from finetune_trainer.classifier import load_classifier
from finetune_trainer.data.judge import Judge
from finetune_trainer.data.prepare import Preparation, SourceFile, SourceRows
from finetune_trainer.data.tokens import TokenCounter
from finetune_trainer.errors import TrainerError
from tests.support import tiny_models
from tests.support.training_runs import build_texts

UNSURE = "Rest well. Please consult a qualified healthcare professional."
TEXTS = [f"{'word ' * length}{length}" for length in (1, 700, 3, 40, 41, 5, 2, 0, 90)]


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Folders of tiny classifiers, by family."""
    return tiny_models.build_tiny_classifiers(tmp_path_factory.mktemp("judges"), build_texts())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_score_is_a_probability_and_does_not_depend_on_what_is_scored_with_it(judges, family):
    classifier = load_classifier(judges[family])
    scores = classifier.score(TEXTS)
    alone = [classifier.score([text])[0] for text in TEXTS]
    assert scores == pytest.approx(alone, abs=1e-5)
    assert all(0 <= score <= 1 for score in scores)
    assert len(set(scores)) > 3
    assert classifier.score([]) == []


def test_labels_share_the_probability(judges):
    both = [load_classifier(judges["bert"], [label]).score(TEXTS) for label in ("0", "REFUSAL")]
    assert [sum(pair) for pair in zip(*both, strict=True)] == pytest.approx([1.0] * len(TEXTS))


def test_a_model_without_a_classifiers_head_is_refused(models):
    with pytest.raises(TrainerError, match=r"is no sequence classifier: it has no score.weight"):
        load_classifier(models["llama"])


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(TrainerError) as refused:
        load_classifier(tmp_path)
    assert str(tmp_path) in refused.value.message
    assert "--judge" in refused.value.hint


def test_code_that_comes_with_a_classifier_is_not_run(judges, tmp_path):
    folder = tmp_path / "judge"
    shutil.copytree(judges["bert"], folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names, "model_type": "evil"}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(TrainerError):
        load_classifier(folder)
    assert not (tmp_path / "ran").exists()


def prepare(source: pathlib.Path, out: pathlib.Path, *options: str) -> dict:
    """Prepare rows and return the report."""
    from finetune_trainer.__main__ import main

    assert main(["prepare", "--source", str(source), "--out", str(out), *options]) == 0
    return json.loads((out / "report.json").read_text())


def test_the_judge_decides_what_the_rules_leave_open_and_nothing_else(judges, tmp_path):
    """A threshold of 0 refuses every row that the judge is asked about, one of 1 none."""
    outputs = ["Bread is baked from flour and water.", UNSURE, "I'm sorry, but I can't help with that."]
    source = tmp_path / "rows.json"
    source.write_text(json.dumps([{"instruction": f"Question {i}", "output": outputs[i % 3]} for i in range(30)]))
    options = ("--judge", str(judges["bert"]), "--judge-audit", "1")
    strict = prepare(source, tmp_path / "strict", *options, "--judge-threshold", "0")
    assert (strict["removedPerRule"]["judge"], strict["rowsRemoved"], strict["rowsUnsure"]) == (10, 20, 0)
    assert strict["judge"] == {
        "rulesKeep": {"judgeKeeps": 0, "judgeRemoves": 10},
        "rulesRemove": {"judgeKeeps": 0, "judgeRemoves": 10},
        "rulesUnsure": {"judgeKeeps": 0, "judgeRemoves": 10},
        "agreement": 0.5,
        "removedUndoubted": 0,
    }
    removed = [json.loads(line) for line in (tmp_path / "strict" / "removed.jsonl").read_text().splitlines()]
    assert [line["index"] for line in removed if line["rule"] == "judge"] == list(range(1, 30, 3))
    lenient = prepare(source, tmp_path / "lenient", *options, "--judge-threshold", "1")
    assert (lenient["rowsRemoved"], lenient["rowsUnsure"]) == (10, 10)
    assert lenient["digest"] != strict["digest"]
    without = prepare(source, tmp_path / "without")
    assert (without["rowsRemoved"], without["rowsUnsure"]) == (10, 10)
    assert "judge" not in without


def test_a_judge_of_all_rows_removes_rows_that_no_rule_doubted_and_says_how_many(judges, tmp_path):
    outputs = ["Bread is baked from flour and water.", UNSURE, "I'm sorry, but I can't help with that."]
    rows = [{"instruction": f"Question {i}", "output": f"{outputs[i % 3]} {'Yes. ' * (i % 7)}"} for i in range(60)]
    source = tmp_path / "rows.json"
    source.write_text(json.dumps(rows))
    scores = load_classifier(judges["bert"]).score([row["output"] for row in rows])
    # In the widest gap between the scores of rows that no rule doubts: rounding moves none across.
    ordered = sorted(scores[::3])
    low, high = max(itertools.pairwise(ordered), key=lambda pair: pair[1] - pair[0])
    threshold = (low + high) / 2
    options = ("--judge", str(judges["bert"]), "--judge-rows", "all", "--judge-threshold", repr(threshold))
    report = prepare(source, tmp_path / "out", *options)
    removed = [json.loads(line) for line in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()]
    undoubted = {index for index in range(0, 60, 3) if scores[index] >= threshold}
    assert {line["index"] for line in removed if line["rule"] == "judge" and line["index"] % 3 == 0} == undoubted
    assert report["judge"]["removedUndoubted"] == len(undoubted) > 0
    assert all(line["rule"] != "judge" for line in removed if line["index"] % 3 == 2)
    table = {says: report["judge"][says] for says in ("rulesKeep", "rulesUnsure", "rulesRemove")}
    assert [sum(table[says].values()) for says in table] == [20, 20, 20]
    assert report["settings"]["judge"]["rows"] == "all"
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"It removed {len(undoubted)} rows in which the rules doubted nothing." in page


@pytest.mark.parametrize("which", ["doubted", "all"])
def test_a_judged_data_set_is_the_same_for_any_number_of_processes(judges, tmp_path, which):
    source = tmp_path / "rows.jsonl"
    texts = [f"Number {index}. {'Bread and wine. ' * 50}" + (UNSURE if index % 2 else "") for index in range(1500)]
    source.write_text("".join(json.dumps({"instruction": "Say.", "output": text}) + "\n" for text in texts))
    scores = sorted(load_classifier(judges["bert"]).score(texts[1::50]))
    config = JudgeConfig("judge", threshold=scores[len(scores) // 2], audit_fraction=0.02, rows=which)
    rows = [SourceRows("spec.dataset", (SourceFile(source, "rows.jsonl", "0" * 64),))]
    for number in (0, 2):
        judge = Judge(config, lambda: load_classifier(judges["bert"]).score)
        dataset = DatasetConfig((Source(str(source)),), judge=config)
        folder = tmp_path / str(number)
        Preparation(dataset, folder, TokenCounter(None, "alpaca"), judge=judge).run(rows, num_workers=number)
    reports = [json.loads((tmp_path / number / "report.json").read_text()) for number in ("0", "2")]
    assert reports[0] == reports[1]
    judged = reports[0]["judge"]["rulesUnsure"]
    assert sum(judged.values()) == 750
    assert min(judged.values()) > 100
    for name in ("train.jsonl", "removed.jsonl", "report.html"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def write_labelled(path: pathlib.Path, num_rows: int = 60) -> pathlib.Path:
    """Write rows that a word in the answer tells apart, in two formats."""
    words = {"keep": "bread", "remove": "sorry"}
    rows = []
    for index in range(num_rows):
        label = "remove" if index % 3 == 0 else "keep"
        rows.append({"instruction": f"Question {index}", "output": f"{words[label]} {index}", "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_judge(*words: object) -> int:
    from finetune_trainer.__main__ import main

    return main(["judge", "train", *map(str, words)])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_judge_is_trained_on_labelled_rows_and_taken_by_prepare(models, judges, tmp_path, family):
    data, out = write_labelled(tmp_path / "labelled.jsonl"), tmp_path / "judge"
    how = ("--epochs", 20, "--learning-rate", 0.005, "--text", "{output}", "--seed", 3)
    base = judges["bert"] if family == "bert" else models["llama"]
    assert run_judge("--data", data, "--base", base, "--out", out, *how) == 0
    scores = load_classifier(out).score(["sorry 100", "bread 100"])
    assert scores[0] > 0.8
    assert scores[1] < 0.2
    card = (out / "README.md").read_text()
    assert "accuracy 1.000" in card
    assert f"prepare --source FILE --out DIR --judge {out} --judge-rows all --judge-text '{{output}}'" in card
    source = tmp_path / "rows.json"
    source.write_text(json.dumps([{"instruction": "Say.", "output": f"{word} 7"} for word in ("bread", "sorry")]))
    report = prepare(source, tmp_path / "out", "--judge", str(out), "--judge-rows", "all")
    assert (report["rowsKept"], report["judge"]["removedUndoubted"]) == (1, 1)


def test_equal_seeds_train_equal_judges_and_frozen_layers_stay(judges, tmp_path):
    from safetensors.torch import load_file

    data = write_labelled(tmp_path / "labelled.jsonl")
    weights = {}
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        how = ("--epochs", 1, "--seed", seed, "--frozen-layers", 1)
        assert run_judge("--data", data, "--base", judges["bert"], "--out", tmp_path / name, *how) == 0
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    base = load_file(judges["bert"] / "model.safetensors")
    differ = {name for name in base if not base[name].equal(weights["one"][name])}
    assert differ >= {"classifier.weight", "bert.encoder.layer.1.output.dense.weight"}
    assert not any(name.startswith("bert.encoder.layer.0.") or "word_embeddings" in name for name in differ)
    assert all(weights["one"][name].equal(weights["same"][name]) for name in base)
    assert not weights["one"]["classifier.weight"].equal(weights["other"]["classifier.weight"])


def test_a_training_that_dies_while_it_writes_leaves_no_half_a_judge(judges, tmp_path, monkeypatch):
    data, out = write_labelled(tmp_path / "labelled.jsonl"), tmp_path / "judge"
    how = ("--data", data, "--base", judges["bert"], "--out", out, "--epochs", 1)

    def die(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("finetune_trainer.classifier.Classifier.save", die)
        assert run_judge(*how) != 0
    assert not out.exists()
    assert run_judge(*how) == 0
    assert load_classifier(out).score(["bread"])


def test_a_base_that_is_no_model_is_refused(judges, tmp_path, caplog):
    data = write_labelled(tmp_path / "labelled.jsonl")
    (tmp_path / "empty").mkdir()
    assert run_judge("--data", data, "--base", tmp_path / "empty", "--out", tmp_path / "out") == 66
    how = ("--frozen-layers", 3)
    assert run_judge("--data", data, "--base", judges["bert"], "--out", tmp_path / "out", *how) == 64
    assert not (tmp_path / "out").exists()
