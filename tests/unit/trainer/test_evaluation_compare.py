"""A difference is called one only when chance does not explain it."""

import pytest

from finetune_trainer.evaluation.compare import compare, format_table


def differences(tuned, base, tuned_error, base_error):
    errors = [{"arc": {"acc": error}} if error is not None else {} for error in (tuned_error, base_error)]
    return compare({"arc": {"acc": tuned}, "only": {"acc": 1.0}}, {"arc": {"acc": base}}, *errors)


@pytest.mark.parametrize(
    ("tuned", "error", "verdict"),
    [(0.55, 0.03, False), (0.59, 0.03, True), (0.41, 0.03, True), (0.9, None, None), (0.9, float("nan"), None)],
)
def test_a_difference_counts_beyond_its_error_only(tuned, error, verdict):
    (one,) = differences(tuned, 0.5, error, 0.03)
    assert one.is_larger_than_error is verdict


def test_the_errors_of_both_sides_add_up_in_squares():
    (one,) = differences(0.6, 0.5, 0.03, 0.04)
    assert one.error == pytest.approx(0.05)


def test_the_table_says_both_numbers_and_the_verdict():
    table = format_table(differences(0.6, 0.5, 0.03, 0.04))
    assert table.splitlines()[-1] == "| arc | acc | 0.6 | 0.5 | +0.1 ± 0.05 | yes |"
