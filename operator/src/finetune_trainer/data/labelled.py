"""Rows that somebody has labelled "remove" or "keep", as the text that a judge reads: what a judge is trained on.

Called by `judge train`. A row has any of the formats of `formats` and a field `label` beside it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.data.formats import RowError, detect_format, list_keys, parse_row
from finetune_trainer.data.judge import fill_text
from finetune_trainer.data.rows import BadRow, UnreadableFileError, list_rows
from finetune_trainer.data.split import holdout_share
from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Sequence
    from typing import Any

LABELS = ("keep", "remove")
"""The classifier's labels, by their numbers."""


@dataclasses.dataclass(frozen=True)
class LabelledRow:
    """One row to learn from or to be tested by."""

    text: str
    label: int
    """Number in LABELS."""
    share: float
    """Where its prompt stands between 0 and 1, by the seed; those below the held-back fraction are held back."""


def read_labelled(paths: Sequence[pathlib.Path], text: str, seed: int) -> list[LabelledRow]:
    """Return the rows of the files; `text` is what of a row is judged. Raises TrainerError with file and line."""
    found = []
    for path in paths:
        try:
            for item in list_rows(path):
                if isinstance(item, BadRow):
                    raise _refuse(path, item.line, item.why)
                try:
                    found.append(_read_row(item.value, text, seed))
                except RowError as error:
                    raise _refuse(path, item.line, str(error)) from error
        except (UnreadableFileError, OSError) as error:
            raise TrainerError(Reason.INVALID_CONFIG, ExitCode.NO_INPUT, f"--data {path}: {error}") from error
    missing = [name for number, name in enumerate(LABELS) if not any(row.label == number for row in found)]
    if missing:
        names = " ".join(map(str, paths))
        raise TrainerError(
            Reason.INVALID_CONFIG, ExitCode.NO_INPUT, f"--data {names}: no row is labelled {missing[0]}", _HINT
        )
    return found


_HINT = 'A row is {"instruction": ..., "output": ..., "label": "remove" or "keep"}, or a conversation with a label.'


def _read_row(row: Any, text: str, seed: int) -> LabelledRow:
    format_name = detect_format(row, {})
    if format_name is None:
        raise RowError(f"neither instruction and output nor a conversation; found {list_keys(row)}")
    turns = parse_row(row, format_name, {}).turns
    answers = [position for position, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise RowError("no answer to judge")
    label = row.get("label")
    if label not in LABELS:
        raise RowError(f"label: expected {' or '.join(LABELS)}, found {label!r}"[:200])
    share = holdout_share([turn.to_message() for turn in turns], seed)
    return LabelledRow(fill_text(text, turns[: answers[-1] + 1]), LABELS.index(label), share)


def _refuse(path: pathlib.Path, line: int, why: str) -> TrainerError:
    return TrainerError(Reason.INVALID_CONFIG, ExitCode.NO_INPUT, f"--data {path} line {line}: {why}", _HINT)
