"""Rows that teach nothing whatever they say: no answer, or turns in an order that no chat has. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_trainer.data.findings import Finding

if TYPE_CHECKING:
    from finetune_trainer.data.formats import Conversation

CATEGORY = "quality"


def find_defect(conversation: Conversation) -> Finding | None:
    """Return why the row cannot be trained on, or None."""
    expected = "user"
    num_answers = 0
    for index, turn in enumerate(conversation.turns):
        if turn.role == "system" and index == 0:
            continue
        if turn.role != expected:
            return Finding("role-order", CATEGORY, "", turn.field, (0, len(turn.content)))
        if not turn.content.strip():
            rule = "empty-answer" if turn.role == "assistant" else "empty-question"
            return Finding(rule, CATEGORY, "", turn.field, (0, len(turn.content)))
        num_answers += turn.role == "assistant"
        expected = "assistant" if expected == "user" else "user"
    if not num_answers:
        last = conversation.turns[-1]
        return Finding("no-answer", CATEGORY, "", last.field, (0, len(last.content)))
    return None
