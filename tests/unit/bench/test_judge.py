"""What the judge's benchmark counts is what `prepare` would remove; it needs nothing outside the checkout to do so."""

from __future__ import annotations

from finetune_trainer.data.findings import Finding, Verdict
from finetune_trainer.data.formats import Conversation, Turn
from tests.bench import judge
from tests.bench.filter_quality import MENDED_BY

ROW = Conversation((Turn("user", "Say.", "instruction"), Turn("assistant", "Yes.", "output")))


def make_verdict(weight: float = 0.0) -> Verdict:
    finding = Finding("rule", "refusal", "en", "output", (0, 1), weight=weight)
    return Verdict(ROW, (finding,) if weight else ())


def test_each_way_to_decide_asks_the_judge_about_its_rows_only():
    verdicts = [make_verdict(weight) for weight in (1.0, 0.5, 0.0) for _ in range(2)]
    scores = [0.8, 0.1] * 3
    decisions = dict(judge.list_decisions(verdicts, scores))
    at_half = {way: goes for way, goes in decisions.items() if not way.endswith("0.9")}
    assert at_half == {
        "rules": [True, True, False, False, False, False],
        "judge_at_0.5": [True, False, True, False, True, False],
        "doubted_at_0.5": [True, True, True, False, False, False],
        "all_at_0.5": [True, True, True, False, True, False],
    }


def test_rows_that_rules_were_never_mended_by_are_not_trained_on():
    assert not {"held_out", "unseen"} & set(MENDED_BY)


def test_texts_that_are_not_at_hand_are_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(judge, "ROLES", tmp_path / "none.json")
    monkeypatch.setattr(judge, "DEBIAN", tmp_path / "none")
    assert judge.list_roles() == []
    assert judge.list_paragraphs() == []
