"""The filter's quality on the labelled set does not sink below what was reached; the counting is right."""

from __future__ import annotations

import collections

from finetune_contract.run_config import FilterConfig
from finetune_trainer.data.findings import Finding
from finetune_trainer.data.formats import Conversation
from finetune_trainer.data.refusals import make_filter
from tests.bench.filter_quality import LANGUAGES, Judged, Labelled, judge, read_labelled, score

LEAST_F1 = 0.76
MOST_TRAPS_REMOVED = 0.03


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


def test_the_set_is_as_its_readme_says():
    counts = collections.Counter((row.language, row.is_removal) for row in read_labelled())
    assert {language: (counts[language, True], counts[language, False]) for language in LANGUAGES} == {
        "en": (63, 68),
        **dict.fromkeys(LANGUAGES[1:], (25, 25)),
    }


def test_the_rules_judge_the_set_as_well_as_they_did():
    found = score(judge(make_filter(FilterConfig()), read_labelled()))
    assert found.f1 >= LEAST_F1
    assert found.traps_removed <= MOST_TRAPS_REMOVED
