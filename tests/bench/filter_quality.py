"""`make bench-filter-quality`: how well the rules tell refusals from answers that merely sound like them.

The rows of `tests/data/filter` are judged by the default rules, all languages at once as a job without `language` has
them, and by the built-in phrase list of legacy mode. A row counts as removed when the verdict removes it. The rules
were mended by the errors on some of the sets; those by which nobody has say how they do on new rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from finetune_contract.run_config import FilterConfig
from finetune_trainer.data.findings import Finding
from finetune_trainer.data.formats import Conversation, parse_row
from finetune_trainer.data.refusals import RowFilter, make_filter
from tests.bench.results import REPOSITORY, Result, write_results

LANGUAGES = ("en", "es", "fr", "de", "pt", "zh", "ja")
CATEGORIES = ("refusal", "disclaimer", "moralising", "identity", "cutoff")
ROWS = REPOSITORY / "tests" / "data" / "filter"
SETS = {
    "mended": ROWS,
    "development": ROWS / "development",
    "held_out": ROWS / "held-out",
    "unseen": ROWS / "unseen",
}
MENDED_BY = ("mended", "development")
"""The sets whose errors may be read. Who mends rules by the others has no rows left that are unseen."""
LEGACY = "legacy phrase list"


@dataclasses.dataclass(frozen=True)
class Labelled:
    """One row of the set."""

    language: str
    line: int
    conversation: Conversation
    is_removal: bool
    category: str
    note: str


@dataclasses.dataclass(frozen=True)
class Judged:
    """A row and what became of it."""

    row: Labelled
    removal: Finding | None

    @property
    def is_right(self) -> bool:
        """Whether the row was removed if and only if its label says so."""
        return (self.removal is not None) == self.row.is_removal


@dataclasses.dataclass(frozen=True)
class Score:
    """How many rows were judged in which way."""

    removed_rightly: int
    removed_wrongly: int
    missed: int
    traps: int

    @property
    def precision(self) -> float:
        """Share of the removed rows that were to be removed."""
        return _divide(self.removed_rightly, self.removed_rightly + self.removed_wrongly)

    @property
    def recall(self) -> float:
        """Share of the rows to be removed that were."""
        return _divide(self.removed_rightly, self.removed_rightly + self.missed)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return _divide(2 * self.removed_rightly, 2 * self.removed_rightly + self.removed_wrongly + self.missed)

    @property
    def traps_removed(self) -> float:
        """Share of the good answers that were removed."""
        return _divide(self.removed_wrongly, self.traps)


def _divide(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def read_labelled(folder: Path = ROWS) -> list[Labelled]:
    """Return a set, language after language."""
    rows = []
    for language in LANGUAGES:
        lines = (folder / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            row = json.loads(line)
            conversation = parse_row(row, "evol", {})
            rows.append(
                Labelled(language, number, conversation, row["label"] == "remove", row["category"], row["note"])
            )
    return rows


def judge(row_filter: RowFilter, rows: Iterable[Labelled]) -> list[Judged]:
    """Return what a filter makes of the rows."""
    return [Judged(row, row_filter.judge(row.conversation).removal) for row in rows]


def score(judged: Sequence[Judged]) -> Score:
    """Count."""
    removed_rightly = sum(one.is_right for one in judged if one.row.is_removal)
    removed_wrongly = sum(not one.is_right for one in judged if not one.row.is_removal)
    to_remove = sum(one.row.is_removal for one in judged)
    return Score(removed_rightly, removed_wrongly, to_remove - removed_rightly, len(judged) - to_remove)


def list_results(row_sets: Sequence[tuple[str, Sequence[Labelled]]]) -> list[Result]:
    """Return every metric of the rules beside the phrase list's, for each set of rows and the suffix of its metrics."""
    rules = make_filter(FilterConfig())
    # The phrase list looks into the answers only, as the rules do: instructions of a trap hold refusals on purpose.
    phrases = make_filter(FilterConfig(rules="legacy", fields=("output",)))
    results = []
    for suffix, rows in row_sets:
        here, there = score(judge(rules, rows)), score(judge(phrases, rows))
        results += [
            Result(name + suffix, getattr(here, name), "of the rows", LEGACY, getattr(there, name))
            for name in ("f1", "precision", "recall", "traps_removed")
        ]
    return results


def format_error(one: Judged) -> str:
    """Return a line on a row that was judged wrongly."""
    row = one.row
    text = next(turn.content for turn in row.conversation.turns if turn.role == "assistant")
    if one.removal is None:
        return f"missed  {row.language}.jsonl:{row.line} {row.category} ({row.note}): {text!r}"
    start, end = one.removal.span
    found = f"{one.removal.rule} at {text[start:end]!r}"
    return f"removed {row.language}.jsonl:{row.line} {row.category} ({row.note}) by {found}: {text!r}"


def split_rows(suffix: str, rows: Sequence[Labelled]) -> list[tuple[str, Sequence[Labelled]]]:
    """Return a set as a whole and language by language, each with the suffix of its metrics."""
    by_language = [
        (f"{suffix}_{language}", [row for row in rows if row.language == language]) for language in LANGUAGES
    ]
    return [(suffix, rows), *by_language]


def list_recalls(suffix: str, rows: Sequence[Labelled]) -> list[Result]:
    """Return what share of the rows of each category the rules remove."""
    rules = make_filter(FilterConfig())
    wanted = {category: [row for row in rows if row.category == category and row.is_removal] for category in CATEGORIES}
    return [
        Result(f"recall{suffix}_{category}", score(judge(rules, there)).recall, f"of {len(there)} rows")
        for category, there in wanted.items()
    ]


def main() -> int:
    """Judge and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="judge these sets only")
    parser.add_argument(
        "--errors", action="store_true", help="print the rows of the mended sets that are judged wrongly"
    )
    args = parser.parse_args()
    row_sets = {name: read_labelled(SETS[name]) for name in args.sets}
    results = []
    for name, rows in row_sets.items():
        if args.errors and name in MENDED_BY:
            judged = judge(make_filter(FilterConfig()), rows)
            print("\n".join(format_error(one) for one in judged if not one.is_right))
        # The first set came when it was the only one, so its metrics have plain names.
        suffix = "" if name == "mended" else f"_{name}"
        results += [*list_results(split_rows(suffix, rows)), *list_recalls(suffix, rows)]
    write_results("filter-quality", results, rows={name: len(rows) for name, rows in row_sets.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
