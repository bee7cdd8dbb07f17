"""The filter's quality on the labelled set does not sink below what was reached; the counting is right."""

from __future__ import annotations

import collections
import itertools

import pytest

from finetune_contract.run_config import FilterConfig
from finetune_trainer.data.findings import Finding
from finetune_trainer.data.formats import Conversation
from finetune_trainer.data.refusals import make_filter
from tests.bench.filter_quality import LANGUAGES, MENDED_BY, SETS, Judged, Labelled, judge, read_labelled, score

LEAST_F1 = {"mended": 0.99, "held_out": 0.85, "development": 0.8, "unseen": 0.25}
MOST_TRAPS_REMOVED = {"mended": 0.01, "held_out": 0.01, "development": 0.01, "unseen": 0.04}


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


@pytest.mark.parametrize(
    ("name", "english", "other"),
    [
        ("mended", (63, 68), (25, 25)),
        ("held_out", (20, 20), (6, 6)),
        ("development", (45, 45), (18, 18)),
        ("unseen", (45, 45), (18, 18)),
    ],
)
def test_the_sets_are_as_their_readme_says(name, english, other):
    counts = collections.Counter((row.language, row.is_removal) for row in read_labelled(SETS[name]))
    assert {language: (counts[language, True], counts[language, False]) for language in LANGUAGES} == {
        "en": english,
        **dict.fromkeys(LANGUAGES[1:], other),
    }


def test_no_answer_is_in_two_sets():
    answers = [{row.conversation.turns[1].content for row in read_labelled(folder)} for folder in SETS.values()]
    assert not any(one & another for one, another in itertools.combinations(answers, 2))


def test_errors_on_unseen_rows_are_never_printed():
    assert not {"held_out", "unseen"} & set(MENDED_BY)


@pytest.mark.parametrize("name", SETS)
def test_the_rules_judge_as_well_as_they_did(name):
    found = score(judge(make_filter(FilterConfig()), read_labelled(SETS[name])))
    assert found.f1 >= LEAST_F1[name]
    assert found.traps_removed <= MOST_TRAPS_REMOVED[name]
