"""The filter's quality on the labelled set does not sink below what was reached; the counting is right."""

from __future__ import annotations

import collections

import pytest

from finetune_contract.run_config import FilterConfig
from finetune_trainer.data.findings import Finding
from finetune_trainer.data.formats import Conversation
from finetune_trainer.data.refusals import make_filter
from tests.bench.filter_quality import HELD_OUT, LANGUAGES, ROWS, Judged, Labelled, judge, read_labelled, score

LEAST_F1 = 0.99
LEAST_F1_HELD_OUT = 0.8
MOST_TRAPS_REMOVED = 0.01


def judged(is_removal: bool, removed: bool) -> Judged:
    row = Labelled("en", 1, Conversation(()), is_removal, "", "")
    return Judged(row, Finding("rule", "refusal", "en", "output", (0, 1)) if removed else None)


def test_precision_recall_and_traps_are_counted():
    found = score(
        [*[judged(True, True)] * 6, *[judged(True, False)] * 2, *[judged(False, True)] * 3, judged(False, False)]
    )
    assert (found.precision, found.recall) == (6 / 9, 6 / 8)
    assert found.f1 == 12 / 17
    assert found.traps_removed == 3 / 4


@pytest.mark.parametrize(("folder", "english", "other"), [(ROWS, (63, 68), (25, 25)), (HELD_OUT, (20, 20), (6, 6))])
def test_the_sets_are_as_their_readmes_say(folder, english, other):
    counts = collections.Counter((row.language, row.is_removal) for row in read_labelled(folder))
    assert {language: (counts[language, True], counts[language, False]) for language in LANGUAGES} == {
        "en": english,
        **dict.fromkeys(LANGUAGES[1:], other),
    }


def test_no_held_out_answer_is_in_the_set_that_rules_are_mended_by():
    answers = [{row.conversation.turns[1].content for row in read_labelled(folder)} for folder in (ROWS, HELD_OUT)]
    assert not answers[0] & answers[1]


@pytest.mark.parametrize(("folder", "least"), [(ROWS, LEAST_F1), (HELD_OUT, LEAST_F1_HELD_OUT)])
def test_the_rules_judge_as_well_as_they_did(folder, least):
    found = score(judge(make_filter(FilterConfig()), read_labelled(folder)))
    assert found.f1 >= least
    assert found.traps_removed <= MOST_TRAPS_REMOVED
