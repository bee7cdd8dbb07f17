"""Which rows a judge is asked about, and what follows from its answers."""

from __future__ import annotations

import pathlib

import pytest

from finetune_contract.run_config import JudgeConfig
from finetune_trainer.classifier import choose_labels
from finetune_trainer.data.findings import FLAG, Finding, Verdict
from finetune_trainer.data.formats import Conversation, Turn
from finetune_trainer.data.judge import Judge, make_finding, select
from finetune_trainer.errors import TrainerError
from finetune_trainer.fetch import fetch_judge
from tests.support.model_bytes import build_model

TURNS = (
    Turn("user", "Who {output} are you?", "messages[0].content", "Be brief.", "input"),
    Turn("assistant", "Nobody.", "messages[1].content"),
    Turn("user", "Help me.", "messages[2].content"),
    Turn("assistant", "Unfortunately not.", "messages[3].content"),
)
ROW = Conversation(TURNS)
EVERYTHING = JudgeConfig("judge", audit_fraction=1.0)
NOTHING = JudgeConfig("judge", audit_fraction=0.0)


def make_verdict(field: str = "messages[1].content", weight: float = 0.4, **changes) -> Verdict:
    finding = Finding(
        **{"rule": "r", "category": "refusal", "language": "en", "field": field, "span": (0, 3), "weight": weight}
        | changes
    )
    return Verdict(ROW, (finding,))


def test_the_judge_is_asked_about_the_answer_that_left_the_rules_unsure():
    question = select(make_verdict(), NOTHING, 1, 0, 0)
    assert question == ("unsure", True, "messages[1].content", 7, "Nobody.")


@pytest.mark.parametrize("verdict", [Verdict(ROW), make_verdict(weight=1.0), make_verdict(weight=1.0, action=FLAG)])
def test_the_judge_is_not_asked_about_rows_that_the_rules_are_sure_of(verdict):
    assert select(verdict, NOTHING, 1, 0, 0) is None


def test_a_seeded_share_of_the_sure_rows_is_asked_about_too():
    config = JudgeConfig("judge", audit_fraction=0.1)

    def choose(seed: int) -> set[int]:
        return {index for index in range(5000) if select(Verdict(ROW), config, seed, 0, index) is not None}

    assert 400 < len(choose(1)) < 600
    assert choose(1) == choose(1)
    assert len(choose(1) & choose(2)) < 100


def test_what_the_rules_said_goes_with_the_question():
    assert select(Verdict(ROW), EVERYTHING, 1, 0, 0).rules_say == "keep"
    assert select(make_verdict(weight=1.0, action=FLAG), EVERYTHING, 1, 0, 0).rules_say == "keep"
    assert select(make_verdict(weight=1.0), EVERYTHING, 1, 0, 0).rules_say == "remove"
    assert select(make_verdict(weight=1.0, category="duplicates"), EVERYTHING, 1, 0, 0) is None


@pytest.mark.parametrize("verdict", [Verdict(ROW), make_verdict(), make_verdict(weight=1.0)])
def test_a_judge_of_all_rows_is_asked_about_each_whatever_share_is_audited(verdict):
    config = JudgeConfig("judge", audit_fraction=0.0, rows="all")
    assert all(select(verdict, config, 1, 0, index) is not None for index in range(50))
    assert select(make_verdict(weight=1.0, category="duplicates"), config, 1, 0, 0) is None


@pytest.mark.parametrize(
    ("rows", "decided"), [("doubted", {"unsure"}), ("all", {"unsure", "keep"})], ids=["doubted", "all"]
)
def test_a_judge_decides_doubted_rows_or_all_that_the_rules_keep(rows, decided):
    config = JudgeConfig("judge", audit_fraction=1.0, rows=rows)
    verdicts = [make_verdict(), Verdict(ROW), make_verdict(weight=1.0)]
    questions = [select(verdict, config, 1, 0, 0) for verdict in verdicts]
    assert {question.rules_say for question in questions} == {"unsure", "keep", "remove"}
    assert {question.rules_say for question in questions if question.decides} == decided


def test_the_text_can_hold_the_question_and_is_filled_once():
    config = JudgeConfig("judge", audit_fraction=1.0, text="<q>{instruction}</q>{output}{else}")
    question = select(make_verdict(), config, 1, 0, 0)
    assert question.text == "<q>Who {output} are you?\nBe brief.</q>Nobody.{else}"
    assert select(Verdict(ROW), config, 1, 0, 0).text == "<q>Help me.</q>Unfortunately not.{else}"


def test_rows_from_the_threshold_on_are_removed():
    questions = [select(make_verdict(), NOTHING, 1, 0, index) for index in range(3)]
    judge = Judge(JudgeConfig("judge", threshold=0.7), lambda: lambda texts: [0.1, 0.7, 0.9][: len(texts)])
    assert judge.find_removed(questions) == [False, True, True]
    finding = make_finding(questions[0])
    assert Verdict(ROW, (*make_verdict().findings, finding)).removal == finding
    assert finding.to_facts()["field"] == "messages[1].content"


@pytest.mark.parametrize(
    ("names", "wanted", "chosen"),
    [
        (["NORMAL", "REJECTION"], [], [1]),
        (["Non-refusal", "Refusal"], [], [1]),
        (["not_refused", "refused"], [], [1]),
        (["ok", "refusal", "moralization", "disclaimer"], [], [1, 2, 3]),
        (["SCORE"], [], [0]),
        (["LABEL_0", "LABEL_1"], ["label_1"], [1]),
        (["LABEL_0", "LABEL_1"], ["0"], [0]),
        (["a", "b", "c"], ["c", "a", "2"], [0, 2]),
    ],
)
def test_labels_are_found_by_name_or_by_number(names, wanted, chosen):
    assert choose_labels(pathlib.Path("judge"), dict(enumerate(names)), wanted) == chosen


@pytest.mark.parametrize(
    ("names", "wanted", "said"),
    [
        (["LABEL_0", "LABEL_1"], [], "none or all seem to mean refusal (0 LABEL_0, 1 LABEL_1)"),
        (["refusal", "rejection"], [], "none or all"),
        (["NORMAL", "REJECTION"], ["refusal"], "has no label refusal (its labels: 0 NORMAL, 1 REJECTION)"),
        (["NORMAL", "REJECTION"], ["2"], "has no label 2"),
    ],
)
def test_labels_that_cannot_be_meant_are_refused_with_those_there_are(names, wanted, said):
    with pytest.raises(TrainerError) as refused:
        choose_labels(pathlib.Path("judge"), dict(enumerate(names)), wanted)
    assert said in refused.value.message
    assert "--judge-label" in refused.value.hint


def test_a_judge_is_read_where_it_is_or_downloaded_and_named_by_its_files_alone(hub, tmp_path):
    files = build_model()
    hub.add("models", "acme/judge", files | {"training_args.bin": b"x"})
    for name, content in files.items():
        (tmp_path / "judges" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "judges" / name).write_bytes(content)
    downloads = tmp_path / ".downloads"
    here = fetch_judge(JudgeConfig("pvc://judges"), tmp_path, downloads, lambda _: None)
    assert here[0] == tmp_path / "judges"
    assert not downloads.exists()
    there = fetch_judge(JudgeConfig("hf://acme/judge"), tmp_path, downloads, lambda _: None)
    assert there[0].parent == downloads
    assert {path.name for path in there[0].iterdir()} >= {"config.json", "model.safetensors"}
    assert here[1] == there[1]
    (tmp_path / "judges" / "config.json").write_text('{"model_type": "bert"}')
    assert fetch_judge(JudgeConfig("pvc://judges"), tmp_path, downloads, lambda _: None)[1] != here[1]


def test_a_folder_that_cannot_be_a_judge_is_refused_by_the_name_of_its_field(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(TrainerError, match=r"spec\.dataset\.judge\.source: it holds no config\.json"):
        fetch_judge(JudgeConfig("pvc://empty"), tmp_path, tmp_path, lambda _: None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--judge-label", "1"), "Add --judge DIR"),
        (("--judge", "d", "--judge-text", "{answer}"), "Write {output}"),
        (("--judge", "d", "--judge-threshold", "80"), "Write 0 to 1"),
        (("--judge", "d", "--judge-audit", "-1"), "Write 0 to 1"),
    ],
)
def test_arguments_of_a_judge_that_cannot_be_meant_are_refused(run_command, instructions, tmp_path, options, said):
    source = ("--source", str(instructions / "alpaca.json"))
    outcome = run_command("prepare", *source, "--out", str(tmp_path / "out"), *options)
    assert outcome.code == 64
    assert said in outcome.report["hint"]


def test_a_judge_that_is_not_there_is_named_before_any_row_is_read(run_command, instructions, tmp_path):
    source = ("--source", str(instructions / "alpaca.json"))
    outcome = run_command("prepare", *source, "--out", str(tmp_path / "out"), "--judge", str(tmp_path / "none"))
    assert outcome.code == 66
    assert str(tmp_path / "none") in outcome.report["message"]
    assert "spec.dataset.judge" in outcome.text
    assert not (tmp_path / "out" / "report.json").exists()
