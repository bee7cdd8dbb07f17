"""A gate says the same to the operator that decides by it and to the report that shows it."""

import pytest

from finetune_contract.gates import GateConfig, judge

SCORES = {"arc": {"acc_norm,none": 0.5}, "holdout": {"loss": 2.0}}
BASE = {"arc": {"acc_norm,none": 0.6}, "holdout": {"loss": 1.5}}


@pytest.mark.parametrize(
    ("gate", "margin", "verdict"),
    [
        (GateConfig("arc", "acc_norm", "min", 0.5), 0.0, "Passed"),
        (GateConfig("arc", "acc_norm", "min", 0.75), -0.25, "Failed"),
        (GateConfig("holdout", "loss", "max", 2.5), 0.5, "Passed"),
        (GateConfig("holdout", "loss", "max", 1.5), -0.5, "Failed"),
        # For a loss more is worse, for an accuracy less.
        (GateConfig("holdout", "loss", "maxRegression", 1.0), 0.5, "Passed"),
        (GateConfig("arc", "acc_norm", "maxRegression", 0.05), pytest.approx(-0.05), "Failed"),
        (GateConfig("mmlu", "acc", "min", 0.1), None, "ScoreMissing"),
    ],
)
def test_the_margin_is_how_much_worse_a_score_may_still_get(gate, margin, verdict):
    found = judge(gate, SCORES, BASE)
    assert (found.margin, found.verdict) == (margin, verdict)


def test_a_regression_without_the_base_s_score_is_not_judged():
    found = judge(GateConfig("holdout", "loss", "maxRegression", 1.0), SCORES, {})
    assert (found.score, found.baseline, found.margin, found.verdict) == (2.0, None, None, "ScoreMissing")


@pytest.mark.parametrize("bound", ["min", "max", "maxRegression"])
def test_a_score_that_is_no_number_passes_no_gate(bound):
    found = judge(GateConfig("holdout", "loss", bound, 0.0), {"holdout": {"loss": float("nan")}}, BASE)
    assert found.verdict == "Failed"
