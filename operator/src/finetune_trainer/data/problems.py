"""What is wrong with the data of a job, in the words of its spec. Pure: each function returns the error to raise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.data.formats import FORMATS, list_keys
from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Mapping, Sequence

    from finetune_trainer.data.report import Tally
    from finetune_trainer.data.rows import Row, UnreadableFileError


def unreadable_file(field: str, name: str, error: UnreadableFileError) -> TrainerError:
    """Return the error for a file that cannot be read on."""
    return TrainerError(
        Reason.DATASET_INVALID,
        ExitCode.DATA,
        f"{field}: {name}{error.place}: {error.why}",
        "Mend the file at that place; it has to be a JSON array, JSON Lines or Parquet.",
    )


def unknown_format(field: str, name: str, row: Row) -> TrainerError:
    """Return the error for a first row that has the keys of no format."""
    return TrainerError(
        Reason.DATASET_INVALID,
        ExitCode.DATA,
        f"{field}: {name}, line {row.line}: the format cannot be told from its keys ({list_keys(row.value)})",
        f"Set {field}.format to one of {', '.join(FORMATS)}, and map other names in spec.dataset.fields.",
    )


def too_many_bad_rows(field: str, first: Mapping[str, Any], bad: int, read: int) -> TrainerError:
    """Return the error for one bad row too many; `first` is the first of all, `read` counts up to the last."""
    return TrainerError(
        Reason.DATASET_INVALID,
        ExitCode.DATA,
        f"{field}: {first['file']}, line {first['line']}: {first['why']} "
        f"(bad rows: {bad} of the first {read}, {bad - 1} allowed)",
        "Mend the row, or have bad rows left out by raising spec.dataset.maxBadRows.",
    )


def nothing_left(tally: Tally, names: Sequence[str], page: pathlib.Path) -> TrainerError:
    """Return the error for a data set of which nothing is left, by what took it away."""
    counts = tally.counts
    if not counts.read:
        hint = "Point spec.dataset.source at a file with rows."
        return TrainerError(Reason.DATASET_EMPTY, ExitCode.DATA, f"the data set has no rows: {', '.join(names)}", hint)
    if not counts.removed:
        first = tally.bad_rows[0]
        return TrainerError(
            Reason.DATASET_INVALID,
            ExitCode.DATA,
            f"all {counts.read} rows are bad; the first: {first['file']}, line {first['line']}: {first['why']}",
            "Set spec.dataset.format, and map other names in spec.dataset.fields.",
        )
    per_category = dict(tally.per_category)
    removed = ", ".join(f"{name} {number}" for name, number in per_category.items())
    return TrainerError(
        Reason.DATASET_EMPTY_AFTER_FILTER,
        ExitCode.DATA,
        f"the filter removed all usable rows: {counts.removed} of {counts.read} ({removed})",
        "Loosen spec.dataset.filter: fewer extraPhrases, rules: default, or refusals: false; "
        f"{page} shows what was removed.",
        {"rows_read": counts.read, "rows_removed": counts.removed, "removed_per_category": per_category},
    )
