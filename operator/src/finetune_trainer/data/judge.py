"""A classifier's word on the rows that the rules do not remove: which it is asked about, and what follows.

Pure; the classifier itself, which needs torch, is `finetune_trainer.classifier`. A worker selects the rows with
`select`, the parent asks about many at once with `Judge.find_removed`. A judge decides the rows that the rules are
unsure of, or all that they keep. Of the others a seeded share is asked about too, only to report how far the two agree;
a judge of all rows is asked about each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from finetune_trainer.data.findings import Finding
from finetune_trainer.data.prompts import join_input
from finetune_trainer.data.split import hash_to_share

if TYPE_CHECKING:
    from finetune_contract.run_config import JudgeConfig
    from finetune_trainer.data.findings import Verdict
    from finetune_trainer.data.formats import Turn
    from finetune_trainer.data.report import RulesSay

CATEGORY = "judge"
_FILTER_CATEGORIES = ("refusal", "disclaimer", "moralising", "identity", "knowledge-cutoff", "extra", "legacy")
"""What the judge has an opinion of; a duplicate or a leaked token is none of its business."""
_PLACEHOLDER = re.compile(r"\{(instruction|output)\}")

Score = Callable[[Sequence[str]], list[float]]
"""Returns for each text the probability, from 0 to 1, that its row is to be removed."""


class Question(NamedTuple):
    """What the judge is asked about one row."""

    rules_say: RulesSay
    decides: bool
    """Whether the row is removed if the judge says so; else the answer is only counted."""
    field: str
    """Of the answer, in the source row."""
    length: int
    """Of the answer, in characters."""
    text: str


def select(verdict: Verdict, config: JudgeConfig, seed: int, source: int, index: int) -> Question | None:
    """Return what to ask about a row, or None; which sure rows are audited depends on seed and place alone."""
    removal = verdict.removal
    rules_say: RulesSay = "unsure" if verdict.is_unsure else "keep" if removal is None else "remove"
    if removal is not None and removal.category not in _FILTER_CATEGORIES:
        return None
    is_asked = config.rows == "all" or rules_say == "unsure"
    if not is_asked and hash_to_share(f"judge:{seed}:{source}:{index}") >= config.audit_fraction:
        return None
    turns = verdict.conversation.turns
    fields = {finding.field for finding in verdict.findings}
    answers = [position for position, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        return None
    chosen = next((position for position in answers if turns[position].field in fields), answers[-1])
    decides = is_asked and rules_say != "remove"
    text = fill_text(config.text, turns[: chosen + 1])
    return Question(rules_say, decides, turns[chosen].field, len(turns[chosen].content), text)


def fill_text(text: str, turns: Sequence[Turn]) -> str:
    """Return the text for an answer, the last of the turns, and the question before it."""
    question = next((turn for turn in reversed(turns) if turn.role == "user"), None)
    values = {
        "output": turns[-1].content,
        "instruction": "" if question is None else join_input(question.to_message()),
    }
    return _PLACEHOLDER.sub(lambda match: values[match[1]], text)


class Judge:
    """Asks the classifier about many rows."""

    def __init__(self, config: JudgeConfig, load: Callable[[], Score]) -> None:
        self._threshold = config.threshold
        self._load = load
        self._score: Score | None = None

    def load(self) -> None:
        """Load the classifier, once no more processes are forked from this one. Raises TrainerError."""
        if self._score is None:
            self._score = self._load()

    def find_removed(self, questions: Sequence[Question]) -> list[bool]:
        """Return for each question whether the judge would remove the row."""
        self.load()
        assert self._score is not None
        return [score >= self._threshold for score in self._score([question.text for question in questions])]


def make_finding(question: Question) -> Finding:
    """Return why a row that the judge refuses is removed."""
    return Finding("judge", CATEGORY, "", question.field, (0, question.length))
