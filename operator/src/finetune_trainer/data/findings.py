"""What a check found in a row and what follows from it: the one shape in which filter, quality checks and judge speak.

Pure data. `refusals` and `quality` make findings, `prepare` carries them out, `report` counts them.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from finetune_trainer.data.formats import Conversation

Action = Literal["remove-row", "remove-sentence", "flag"]

REMOVE_ROW: Action = "remove-row"
REMOVE_SENTENCE: Action = "remove-sentence"
FLAG: Action = "flag"

REMOVAL_WEIGHT = 1.0
"""Findings of one text and one action take effect when the weights of their distinct rules add up to this."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing found in one text of a row."""

    rule: str
    category: str
    language: str
    field: str
    """Where in the source row, as in `output` or `conversations[3].value`."""
    span: tuple[int, int]
    """First character, and the one after the last, in that field."""
    action: Action = REMOVE_ROW
    weight: float = 1.0

    def to_facts(self) -> dict[str, Any]:
        """Return what a line of removed.jsonl says of it."""
        return {
            "rule": self.rule,
            "category": self.category,
            "language": self.language,
            "field": self.field,
            "span": list(self.span),
        }


# Not frozen, though nobody changes it: each row makes one, and a frozen one takes ten times as long to make.
@dataclasses.dataclass(slots=True)
class Verdict:
    """What is to become of one row."""

    conversation: Conversation
    """The row as it is to be kept: without the sentences that were removed."""
    findings: tuple[Finding, ...] = ()
    """Everything that was found until the row's fate was sure; spans lie in the row as it was read."""

    @property
    def decided(self) -> tuple[Finding, ...]:
        """The findings that take effect, in order; the others weigh too little."""
        weights = _add_weights(self.findings)
        return tuple(one for one in self.findings if weights[one.field, one.action] >= REMOVAL_WEIGHT)

    @property
    def removal(self) -> Finding | None:
        """Why the whole row is removed: the heaviest finding of the first text that decides it, or None."""
        if not self.findings:
            return None
        removing = [one for one in self.decided if one.action == REMOVE_ROW]
        if not removing:
            return None
        return max((one for one in removing if one.field == removing[0].field), key=lambda one: one.weight)

    @property
    def is_unsure(self) -> bool:
        """Whether the row is kept although something was found in it that weighs too little to decide."""
        return len(self.decided) < len(self.findings) and self.removal is None


def _add_weights(findings: tuple[Finding, ...]) -> dict[tuple[str, str], float]:
    """Return the weights per text and action; a rule found twice in a text counts once."""
    rules = {(one.field, one.action, one.rule): one.weight for one in findings}
    weights: dict[tuple[str, str], float] = {}
    for (field, action, _), weight in rules.items():
        weights[field, action] = weights.get((field, action), 0.0) + weight
    return weights
