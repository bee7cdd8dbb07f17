"""The tally of a preparation: what it counts, and that parts of it add up whoever filled them."""

from __future__ import annotations

import json
import pickle
import random

import pytest

from finetune_trainer.data.findings import FLAG, REMOVE_ROW, REMOVE_SENTENCE, Finding, Verdict
from finetune_trainer.data.formats import Conversation, Turn
from finetune_trainer.data.histogram import Histogram
from finetune_trainer.data.report import NUM_REPORTED_BAD_ROWS, Tally
from finetune_trainer.data.sample import SAMPLES_PER_RULE

RULES = (
    ("en-cannot-help", "refusal", "en", REMOVE_ROW),
    ("de-leider", "refusal", "de", REMOVE_ROW),
    ("en-as-an-ai", "disclaimer", "en", REMOVE_SENTENCE),
    ("email", "pii", "", FLAG),
)


def make_conversation(prompt: str, answer: str) -> Conversation:
    return Conversation((Turn("user", prompt, "instruction"), Turn("assistant", answer, "output")))


def make_finding(rule: str = "email", action: str = FLAG, span: tuple[int, int] = (0, 4), **changes) -> Finding:
    known = {name: (category, language) for name, category, language, _ in RULES}
    category, language = known.get(rule, ("refusal", "en"))
    return Finding(**{"rule": rule, "category": category, "language": language, "field": "output", "span": span,
                      "action": action, **changes})  # fmt: skip


def add_random_row(tally: Tally, index: int) -> None:
    """Add a row that depends on its index alone."""
    chance = random.Random(index)
    source = index % 3
    if chance.random() < 0.1:
        tally.add_bad_row({"source": source, "index": index, "file": "a.jsonl", "line": index, "why": "not JSON"})
        return
    conversation = make_conversation("x" * chance.randrange(50), "y" * chance.randrange(1, 3000))
    chosen = [make_finding(rule, action) for rule, _, _, action in RULES if chance.random() < 0.2]
    tally.add_row(source, index, conversation, Verdict(conversation, tuple(chosen)))
    tally.add_tokens("before", chance.randrange(20), chance.randrange(500))
    tally.add_judgement(chance.choice(["remove", "keep", "unsure"]), chance.random() < 0.5)


def fill(indexes) -> Tally:
    tally = Tally(seed=7)
    for index in indexes:
        add_random_row(tally, index)
    return tally


@pytest.mark.parametrize("size", [1, 7, 100, 400])
def test_chunks_of_any_size_merged_in_any_order_give_the_tally_of_all_rows(size):
    whole = fill(range(400))
    chunks = [fill(range(start, min(start + size, 400))) for start in range(0, 400, size)]
    random.Random(size).shuffle(chunks)
    merged = Tally(seed=7)
    for chunk in chunks:
        merged.merge(pickle.loads(pickle.dumps(chunk)))
    assert merged.to_state() == whole.to_state()
    assert merged.to_report() == whole.to_report()
    assert merged.list_samples() == whole.list_samples()


def test_a_tally_stored_as_json_goes_on_where_it_was():
    stored = json.loads(json.dumps(fill(range(200)).to_state()))
    tally = Tally.from_state(stored)
    for index in range(200, 400):
        add_random_row(tally, index)
    assert tally.to_state() == fill(range(400)).to_state()


def test_every_row_has_one_fate_and_every_removal_one_rule():
    report = fill(range(400)).to_report()
    assert report["rowsRead"] == 400
    assert report["rowsRead"] == report["rowsKept"] + report["rowsRemoved"] + report["rowsBad"]
    for by in ("Rule", "Category", "Language", "Field"):
        assert sum(report[f"removedPer{by}"].values()) == report["rowsRemoved"] > 0
    assert report["lengths"]["answerCharacters"]["before"]["rows"] == 400 - report["rowsBad"]
    assert report["lengths"]["answerCharacters"]["after"]["rows"] == report["rowsKept"]


def test_a_kept_row_counts_each_rule_once_and_is_measured_as_it_is_kept():
    tally = Tally()
    row, kept = make_conversation("ab", "As an AI, no. As an AI, yes. Me: a@b.c"), make_conversation("ab", "Me: a@b.c")
    edit = make_finding("en-as-an-ai", REMOVE_SENTENCE, (0, 14))
    flag = make_finding("email", FLAG, (33, 38))
    tally.add_row(0, 0, row, Verdict(kept, (edit, edit, flag)))
    report = tally.to_report()
    assert (report["rowsKept"], report["rowsEdited"], report["rowsFlagged"], report["rowsRemoved"]) == (1, 1, 1, 0)
    assert report["editedPerRule"] == {"en-as-an-ai": 1}
    assert report["flaggedPerCategory"] == {"pii": 1}
    lengths = report["lengths"]["answerCharacters"]
    assert (lengths["before"]["total"], lengths["after"]["total"]) == (38, 9)
    assert [(one["action"], one["found"]) for one in tally.list_samples()] == [
        ("flagged", "a@b.c"),
        ("edited", "As an AI, no. "),
    ]


def test_what_weighs_too_little_is_unsure_and_removes_nothing():
    tally = Tally()
    row = make_conversation("a", "Unfortunately not.")
    light = make_finding("en-unfortunately", REMOVE_ROW, (0, 13), weight=0.4)
    tally.add_row(0, 0, row, Verdict(row, (light,)))
    report = tally.to_report()
    assert (report["rowsKept"], report["rowsUnsure"], report["removedPerRule"]) == (1, 1, {})


def test_the_sample_is_bounded_even_and_depends_on_the_seed():
    def sample_places(seed: int) -> list[int]:
        tally = Tally(seed)
        row = make_conversation("a", "I can't help with that.")
        for index in range(2000):
            tally.add_row(0, index, row, Verdict(row, (make_finding("en-cannot-help", REMOVE_ROW),)))
        return [sample["index"] for sample in tally.list_samples()]

    places = [index for seed in range(20) for index in sample_places(seed)]
    assert len(places) == 20 * SAMPLES_PER_RULE
    assert len(set(places)) > 90
    assert 700 < sum(places) / len(places) < 1300


def test_a_sample_shows_what_was_found_and_bounded_text_around_it():
    tally = Tally()
    turns = (Turn("user", "q", "conversations[0].value"), Turn("assistant", "b" * 999 + "HIT" + "a" * 999, ""))
    row = Conversation((turns[0], Turn("assistant", turns[1].content, "conversations[1].value")))
    finding = make_finding("en-x", REMOVE_ROW, (999, 1002), field="conversations[1].value")
    tally.add_row(2, 3, row, Verdict(row, (finding,)))
    (sample,) = tally.list_samples()
    assert (sample["found"], sample["source"], sample["index"]) == ("HIT", 2, 3)
    assert sample["before"].startswith("…b")
    assert sample["after"].endswith("a…")
    assert len(sample["before"]) < 200
    assert len(sample["after"]) < 200


def test_the_first_bad_rows_are_listed():
    tally = Tally()
    for index in reversed(range(1000)):
        tally.add_bad_row({"source": 0, "index": index, "file": "a", "line": index + 1, "why": "not JSON"})
    assert [row["index"] for row in tally.bad_rows] == list(range(NUM_REPORTED_BAD_ROWS))


def test_judge_and_rules_agree_on_the_share_of_the_rows_that_the_rules_are_sure_of():
    tally = Tally()
    assert "judge" not in tally.to_report()
    tally.add_judgement("unsure", judge_removes=True)
    assert tally.to_report()["judge"]["agreement"] is None
    for says, removes in (("remove", True), ("remove", False), ("keep", False), ("keep", False)):
        tally.add_judgement(says, judge_removes=removes)
    judge = tally.to_report()["judge"]
    assert judge["agreement"] == 0.75
    assert judge["rulesRemove"] == {"judgeRemoves": 1, "judgeKeeps": 1}
    assert judge["rulesUnsure"] == {"judgeRemoves": 1, "judgeKeeps": 0}
    assert judge["removedUndoubted"] == 0


def test_rows_that_the_judge_alone_removed_are_counted_beside_the_table():
    tally, other = Tally(), Tally()
    for says, removes in (("keep", True), ("keep", False), ("unsure", True), ("remove", True)):
        other.add_judgement(says, judge_removes=removes, decides=says != "remove")
    tally.merge(Tally.from_state(json.loads(json.dumps(other.to_state()))))
    judge = tally.to_report()["judge"]
    assert judge["removedUndoubted"] == 1
    assert judge["rulesKeep"] == {"judgeRemoves": 1, "judgeKeeps": 1}
    assert judge["agreement"] == 0.6667


def test_the_size_of_a_tally_does_not_grow_with_the_rows():
    sizes = [len(json.dumps(fill(range(number)).to_state())) for number in (500, 5000)]
    assert sizes[1] < 1.5 * sizes[0]


@pytest.mark.parametrize("length", [0, 1, 2, 3, 10, 11, 1000, 4096, 4097, 2**33])
def test_a_length_lies_within_its_bin(length):
    histogram = Histogram()
    histogram.add(length)
    (found,) = histogram.to_report()["bins"]
    assert found["from"] <= length <= found["to"]
    assert found["to"] <= max(1.25 * found["from"], found["from"])


def test_percentiles_bound_the_lengths_they_speak_of():
    histogram = Histogram()
    lengths = range(1, 1001)
    for length in lengths:
        histogram.add(length)
    report = histogram.to_report()
    for percent in (50, 95, 99):
        within = sum(length <= report[f"p{percent}"] for length in lengths) / len(lengths)
        assert percent / 100 <= within < percent / 100 + 0.2
