"""`lint-phrases`: what is wrong with a list of phrases, and what each line does to one's own data. Needs no torch."""

from __future__ import annotations

import collections
import json
import pathlib
from typing import TYPE_CHECKING, Any

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.data import phrase_lint
from finetune_trainer.data.formats import FORMATS, RowError, detect_format, parse_row
from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from finetune_trainer.data.phrase_lint import Entry

EXIT_CODES = """\
exit codes:
  0   the list was read, whatever is wrong with it
  65  with --strict: there are errors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    import argparse

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXIT_CODES
    parser.add_argument("phrases", metavar="FILE", type=pathlib.Path, help="phrases, one a line")
    parser.add_argument("--source", metavar="FILE", type=pathlib.Path, help="rows to try the list on")
    parser.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="format of the rows")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--strict", action="store_true", help="fail if there are errors")


def run(args: argparse.Namespace) -> int:
    """Read the list, try it on the rows, print what is wrong."""
    entries = phrase_lint.parse_entries(_read(args.phrases))
    effects = None
    words: collections.Counter[str] = collections.Counter()
    if args.source is not None:
        effects = phrase_lint.Effects(entries)
        for texts in _list_texts(args.source, args.format):
            effects.add(texts)
            words.update(word for text in texts for word in phrase_lint.list_words(text))
    # A word that stands in a single row may be a slip of its own.
    phrase_lint.find_problems(entries, [word for word, count in words.items() if count > 1])
    if args.json:
        print(json.dumps(_build_answer(entries, effects), ensure_ascii=False, indent=1))
    else:
        _print(entries, effects)
    return ExitCode.DATA if args.strict and _count(entries, phrase_lint.ERROR) else ExitCode.OK


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainerError(
            Reason.INVALID_CONFIG,
            ExitCode.NO_INPUT,
            f"{path}: cannot be read: {error}",
            "Name a UTF-8 text file with one phrase a line.",
        ) from error


def _list_texts(path: pathlib.Path, format_name: str) -> Iterator[list[str]]:
    """Yield what legacy mode searches of each row; rows that cannot be used are passed over, as prepare counts them."""
    from finetune_trainer.data.rows import Row, UnreadableFileError, list_rows

    try:
        for item in list_rows(path):
            if not isinstance(item, Row):
                continue
            chosen = detect_format(item.value, {}) if format_name == "auto" else format_name
            try:
                if chosen is not None:
                    yield [turn.content for turn in parse_row(item.value, chosen, {}).turns]
            except RowError:
                continue
    except (OSError, UnreadableFileError) as error:
        message = f"--source {path}: cannot be read: {error}"
        hint = "Name a file of rows: a JSON array, JSON Lines or Parquet."
        raise TrainerError(Reason.DATASET_INVALID, ExitCode.NO_INPUT, message, hint) from error


def _count(entries: Sequence[Entry], level: str) -> int:
    return sum(any(problem.level == level for problem in entry.problems) for entry in entries)


def _build_answer(entries: Sequence[Entry], effects: phrase_lint.Effects | None) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "phrases": len(entries),
        "errors": _count(entries, phrase_lint.ERROR),
        "warnings": _count(entries, phrase_lint.WARNING),
    }
    if effects is not None:
        answer |= {"rowsRead": effects.num_rows, "rowsRemoved": effects.num_removed}
    facts = [entry.to_facts() for entry in entries]
    if effects is None:
        facts = [{key: one[key] for key in ("line", "phrase", "problems")} for one in facts]
    return answer | {"entries": facts}


def _print(entries: Sequence[Entry], effects: phrase_lint.Effects | None) -> None:
    for entry in entries:
        if not entry.problems:
            continue
        effect = f"   removes {entry.num_rows} rows, {entry.num_rows_alone} of them alone" if effects else ""
        print(f"line {entry.line}: {entry.phrase!r}{effect}")
        for problem in entry.problems:
            print(f"  {problem.level}: {problem.kind}: {problem.message}")
    errors, warnings = _count(entries, phrase_lint.ERROR), _count(entries, phrase_lint.WARNING)
    print(f"{len(entries)} phrases: {errors} with errors, {warnings} with warnings")
    if effects is not None:
        _print_effects(entries, effects)


def _print_effects(entries: Sequence[Entry], effects: phrase_lint.Effects) -> None:
    idle = sum(not entry.num_rows for entry in entries)
    print(f"{effects.num_removed} of {effects.num_rows} rows removed; {idle} phrases remove none")
    print("phrases by the rows that only they remove:")
    for entry in sorted(entries, key=lambda one: (-one.num_rows_alone, -one.num_rows, one.line))[:20]:
        if entry.num_rows:
            print(f"  {entry.num_rows_alone:8d} of {entry.num_rows:8d}  line {entry.line}: {entry.phrase}")
