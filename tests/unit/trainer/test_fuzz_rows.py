"""A short, seeded stretch of the campaign in `tests/fuzz`."""

from __future__ import annotations

from tests.fuzz.rows import run_cases


def test_damaged_files_end_in_counted_rows_or_a_clear_error():
    ends = run_cases(range(5_000, 5_040))
    assert ends["prepared"] > 5
    assert ends["DatasetInvalid"] > 5
