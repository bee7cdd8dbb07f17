"""What follows from a match: the row goes, the sentence goes, or it is only counted."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_contract.reports import ExitCode
from finetune_contract.run_config import FilterActions, FilterConfig
from finetune_trainer.data.cutting import cut_sentences, find_before_cut
from finetune_trainer.data.findings import Finding, Verdict
from finetune_trainer.data.formats import parse_row
from finetune_trainer.data.refusals import make_filter
from finetune_trainer.errors import TrainerError

CUT = FilterActions(disclaimer="remove-sentence", knowledge_cutoff="remove-sentence", moralising="flag")


def judge(answer: str, actions: FilterActions = CUT) -> Verdict:
    row_filter = make_filter(FilterConfig(actions=actions))
    return row_filter.judge(parse_row({"instruction": "Go on.", "output": answer}, "evol", {}))


def read_answer(verdict: Verdict) -> str:
    return verdict.conversation.turns[-1].content


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (
            "As an AI language model, I do not have personal opinions. Tea is made with hot water.",
            "Tea is made with hot water.",
        ),
        ("Rest.\n\nThis is not intended as medical advice.", "Rest."),
        ("It is 9.58 seconds. As of my last update in 2021, that stands. Ask again.", "It is 9.58 seconds. Ask again."),
        ("One.\n\nAs an AI language model, I have no opinion.\n\nTwo.", "One.\n\nTwo."),
        ("One.\nAs an AI language model, I have no opinion.   Two.", "One.\nTwo."),
        ("One. As an AI language model, I have no opinion\nTwo.", "One.\nTwo."),
        ("**As an AI language model, I have no opinion.** Two.", "Two."),
        ("1. Stir.\n2. As an AI language model, I do not eat.\n3. Serve.", "1. Stir.\n3. Serve."),
        (
            "\u597d\u3002\u4f5c\u4e3aAI\u8bed\u8a00\u6a21\u578b\uff0c\u6211\u6ca1\u6709\u89c2\u70b9\u3002\u5b8c\u3002",
            "\u597d\u3002\u5b8c\u3002",
        ),
    ],
)
def test_a_sentence_is_cut_out_and_the_rest_stays_as_it_was(answer, kept):
    verdict = judge(answer)
    assert verdict.removal is None
    assert read_answer(verdict) == kept
    assert [one.action for one in verdict.findings] == ["remove-sentence"]


def test_a_row_of_which_nothing_would_be_left_is_removed():
    verdict = judge("As an AI language model, I do not have personal opinions.")
    assert verdict.removal is not None
    assert verdict.removal.category == "disclaimer"
    assert read_answer(verdict) == "As an AI language model, I do not have personal opinions."


def test_every_sentence_that_matches_is_cut():
    sentence = "As an AI language model, I do not have personal opinions. "
    assert read_answer(judge(f"{sentence}Tea is hot. {sentence}Ice is cold.")) == "Tea is hot. Ice is cold."


def test_a_refusal_still_removes_the_row():
    verdict = judge("I can't help with that. As of my last update in 2021, nobody can.")
    assert verdict.removal is not None
    assert verdict.removal.category == "refusal"


def test_a_flag_keeps_the_row_and_is_reported():
    answer = "Here is a joke. It is important to remember that stereotypes can be harmful."
    verdict = judge(answer)
    assert verdict.removal is None
    assert read_answer(verdict) == answer
    assert [(one.category, one.action) for one in verdict.decided] == [("moralising", "flag")]


def test_weak_findings_leave_a_row_unsure_and_whole():
    verdict = judge("Rest well. Please consult a qualified healthcare professional.")
    assert verdict.is_unsure
    assert not verdict.decided
    assert read_answer(verdict).endswith("professional.")
    assert not judge("Rest well.").is_unsure
    assert not judge("I can't help with that.").is_unsure


def test_only_the_turn_that_says_it_is_cut():
    turns = [("human", "Hi"), ("gpt", "Hello."), ("human", "Is it?"), ("gpt", "Yes. My knowledge cutoff is 2023.")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    verdict = make_filter(FilterConfig(actions=CUT)).judge(parse_row(row, "sharegpt", {}))
    assert [turn.content for turn in verdict.conversation.turns] == ["Hi", "Hello.", "Is it?", "Yes."]


def test_an_unknown_action_is_refused_by_its_name():
    with pytest.raises(TrainerError, match=r"spec\.dataset\.filter\.actions\.refusal") as caught:
        make_filter(FilterConfig(actions=FilterActions(refusal="delete")))
    assert "remove-row, remove-sentence, flag" in caught.value.hint


def test_findings_decide_per_text_and_action():
    def make_finding(rule: str, field: str, action: str, weight: float) -> Finding:
        return Finding(rule, "refusal", "en", field, (0, 1), action, weight)

    row = parse_row({"instruction": "Go on.", "output": "Yes."}, "evol", {})
    halves = (make_finding("a", "output", "remove-row", 0.5), make_finding("b", "output", "remove-row", 0.6))
    assert Verdict(row, halves).removal == halves[1]
    twice_the_same = (halves[0], halves[0])
    apart = (halves[0], make_finding("b", "input", "remove-row", 0.6))
    mixed = (halves[0], make_finding("b", "output", "flag", 0.6))
    for findings in (twice_the_same, apart, mixed):
        assert Verdict(row, findings).removal is None
        assert Verdict(row, findings).is_unsure


def test_prepare_writes_the_row_without_its_sentence(run_command, tmp_path):
    source, out = tmp_path / "rows.json", tmp_path / "out"
    answer = "Tea is hot. This is not intended as medical advice."
    source.write_text(json.dumps([{"instruction": "Tea?", "output": answer}]))
    outcome = run_command(
        "prepare", "--source", str(source), "--out", str(out), "--action", "disclaimer=remove-sentence"
    )
    assert outcome.code == 0
    (line,) = (json.loads(line) for line in (out / "train.jsonl").read_text().splitlines())
    assert line["messages"][-1]["content"] == "Tea is hot."
    assert (out / "removed.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--action", "lies=flag"], "knowledge-cutoff"),
        (["--action", "refusal=flag", "--rules", "legacy"], "whole rows"),
    ],
)
def test_prepare_refuses_an_action_that_cannot_be_meant(run_command, tmp_path, arguments, named):
    outcome = run_command("prepare", "--source", "rows.json", "--out", str(tmp_path), *arguments)
    assert outcome.code == ExitCode.USAGE
    assert named in json.dumps(outcome.report)


@given(st.text(alphabet="ab .!?\n*1)", max_size=60), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20))))
def test_cutting_only_takes_away(text, places):
    spans = [(start, start + length) for start, length in places if start + length <= len(text)]
    left = cut_sentences(text, spans)
    remaining = iter(text)
    assert all(character in remaining for character in left)
    for start, end in spans:
        assert text[start:end].strip() == "" or len(left) < len(text)


def test_a_span_over_a_gap_stands_for_the_whole_text():
    original = "Tea is hot. I am no doctor. Drink it."
    left = cut_sentences(original, [(12, 16)])

    assert left == "Tea is hot. Drink it."
    assert find_before_cut(original, left, (12, 17)) == (28, 33)
    assert find_before_cut(original, left, (7, 17)) == (0, len(original))
