"""What happened to the rows: counted while they stream, written as report.json."""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune_trainer.data.findings import Finding

NUM_REPORTED_BAD_ROWS = 20


@dataclasses.dataclass
class Counts:
    """Rows by fate."""

    read: int = 0
    kept: int = 0
    removed: int = 0
    bad: int = 0

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            self.read - other.read, self.kept - other.kept, self.removed - other.removed, self.bad - other.bad
        )

    def to_facts(self) -> dict[str, int]:
        """Return the counts under the report's names."""
        return {
            "rowsRead": self.read,
            "rowsKept": self.kept,
            "rowsRemoved": self.removed,
            "rowsBad": self.bad,
        }


class Tally:
    """All counts of one preparation."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.bad_rows: list[dict[str, Any]] = []
        """The first bad rows, with file, line and reason."""
        self.per_category: collections.Counter[str] = collections.Counter()
        self._per_rule: collections.Counter[str] = collections.Counter()
        self._per_language: collections.Counter[str] = collections.Counter()
        self._per_field: collections.Counter[str] = collections.Counter()

    def count_removal(self, removal: Finding) -> None:
        """Count one removed row."""
        self.counts.removed += 1
        self.per_category[removal.category] += 1
        self._per_rule[removal.rule] += 1
        self._per_language[removal.language or "any"] += 1
        # `conversations[3].value` and `conversations[5].value` are one field to whoever reads the report.
        self._per_field[removal.field.partition("[")[0]] += 1

    def count_bad_row(self, facts: dict[str, Any]) -> None:
        """Count one row that could not be used."""
        self.counts.bad += 1
        if len(self.bad_rows) < NUM_REPORTED_BAD_ROWS:
            self.bad_rows.append(facts)

    def to_facts(self) -> dict[str, Any]:
        """Return what manifest and report share."""
        return self.counts.to_facts() | {
            "removedPerRule": _sorted(self._per_rule),
            "removedPerCategory": _sorted(self.per_category),
        }

    def to_report(self) -> dict[str, Any]:
        """Return the whole report's share of the tally."""
        return self.to_facts() | {
            "removedPerLanguage": _sorted(self._per_language),
            "removedPerField": _sorted(self._per_field),
            "badRows": self.bad_rows,
        }


def _sorted(counter: collections.Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))
