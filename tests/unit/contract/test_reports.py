"""Exit reports fit into a termination message whatever they hold, and progress speaks the protocol of KEP-2779."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_contract.reports import MAX_TERMINATION_BYTES, ExitCode, ExitReport, ProgressReport


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=9000), st.dictionaries(st.text(max_size=20), st.text(max_size=400), max_size=20))
def test_a_report_of_any_size_fits_and_keeps_its_verdict(message, details):
    report = ExitReport(
        "train", "RankFailed", message, exit_code=ExitCode.USER_CODE, hint="fix it", rank=3, details=details
    )
    text = report.to_termination_message()
    assert len(text.encode()) <= MAX_TERMINATION_BYTES
    parsed = ExitReport.from_termination_message(text)
    assert parsed is not None
    assert (parsed.reason, parsed.exit_code, parsed.rank, parsed.hint) == ("RankFailed", 1, 3, "fix it")


def test_a_long_message_loses_its_middle_and_keeps_its_details():
    report = ExitReport("train", "RankFailed", "start " + "x" * 9000 + " end", details={"step": 7})
    parsed = ExitReport.from_termination_message(report.to_termination_message())
    assert parsed is not None
    assert parsed.message.startswith("start ")
    assert parsed.message.endswith(" end")
    assert parsed.details == {"step": 7}


@pytest.mark.parametrize("text", ["", "Killed", "[]", "{}", '{"phase": "train"}', "null"])
def test_a_message_of_another_program_is_not_taken_for_a_report(text):
    assert ExitReport.from_termination_message(text) is None


def test_fields_of_a_newer_release_are_passed_over():
    text = '{"phase": "train", "reason": "Completed", "message": "done", "colour": "blue"}'
    assert ExitReport.from_termination_message(text) == ExitReport("train", "Completed", "done")


def test_progress_survives_the_journey_through_the_protocol():
    report = ProgressReport(43, 60, {"loss": 1.25, "current_step": 43.0}, "2026-11-23T06:00:00Z")
    assert ProgressReport.from_body(report.to_body()) == report


def test_progress_without_an_estimate_has_no_such_field():
    assert "estimatedRemainingSeconds" not in ProgressReport(0, None, {}, "").to_body()["trainerStatus"]


@pytest.mark.parametrize(
    ("body", "message"),
    [({}, "trainerStatus: missing"), ({"trainerStatus": {"progressPercentage": 140}}, "expected 0 to 100, found 140")],
)
def test_a_body_of_another_shape_is_refused_by_the_name_of_its_field(body, message):
    with pytest.raises(ValueError, match=message):
        ProgressReport.from_body(body)


def test_metrics_that_are_no_numbers_are_passed_over():
    body = {
        "trainerStatus": {
            "progressPercentage": 1,
            "metrics": [{"name": "a", "value": "x"}, {"name": "b", "value": "2"}],
        }
    }
    assert ProgressReport.from_body(body).metrics == {"b": 2.0}


def test_a_report_of_wide_characters_fits():
    report = ExitReport("train", "RankFailed", "\N{GRINNING FACE}" * 5000, hint="fix it", details={"step": 7})
    parsed = ExitReport.from_termination_message(report.to_termination_message())
    assert parsed is not None
    assert parsed.message.startswith("\N{GRINNING FACE}")
    assert parsed.hint == "fix it"


def test_last_lines_are_shortened_from_their_beginning_before_the_message():
    lines = "\n".join(f"line {number}" for number in range(1000))
    report = ExitReport("train", "RankFailed", "x" * 1000, details={"step": 7, "last_lines": lines})
    parsed = ExitReport.from_termination_message(report.to_termination_message())
    assert parsed is not None
    assert (parsed.message, parsed.details["step"]) == ("x" * 1000, 7)
    assert parsed.details["last_lines"].endswith("line 998\nline 999")
