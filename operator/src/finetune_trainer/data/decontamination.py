"""Rows that hold text of the evaluation tasks, found by runs of words that they share. Pure.

The field's test: a run of 13 words that stands in a task and in a row is no accident. Runs that stand in many texts of
the tasks are their own boilerplate and count for nothing; a text shorter than a run has to be there as a whole.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from finetune_trainer.data.duplicates import find_words, hash_words, list_words
from finetune_trainer.data.findings import Action, Finding
from finetune_trainer.data.folding import find_original_span, fold

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from finetune_contract.run_config import QualityConfig
    from finetune_trainer.data.formats import Conversation

CATEGORY = "contamination"
RULE = "task-overlap"
MIN_WORDS = 8
"""Texts of fewer words say too little: they are in many rows by chance."""
MAX_TEXTS = 10
"""Runs that stand in more texts of the tasks than this are boilerplate."""

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
_MULTIPLIER = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class ContaminationIndex:
    """The runs of words of the evaluation tasks, as sorted hashes: 8 bytes for each word of the tasks."""

    def __init__(self, texts: Iterable[str], config: QualityConfig) -> None:
        self._action = cast(Action, config.contamination)
        self._words = config.contamination_words
        per_length: dict[int, list[Hashes]] = {}
        digest = hashlib.sha256()
        self.num_texts = 0
        for text in texts:
            self.num_texts += 1
            hashes = hash_words(list_words(fold(text)))
            digest.update(hashes.tobytes() + b"\n")
            length = min(len(hashes), self._words)
            if length >= min(MIN_WORDS, self._words):
                per_length.setdefault(length, []).append(np.unique(_hash_runs(hashes, length)))
        self._runs = {length: _drop_boilerplate(runs) for length, runs in sorted(per_length.items(), reverse=True)}
        self.digest = digest.hexdigest()[:32]
        """Names the texts: it belongs to what decides the prepared data."""

    def find(self, conversation: Conversation) -> Finding | None:
        """Return where the row shares a run of words with a task, or None."""
        for turn in conversation.turns:
            for text, field in ((turn.content, turn.field), (turn.input, turn.input_field)):
                span = self._find(text) if text else None
                if span is not None:
                    return Finding(RULE, CATEGORY, "", field, span, self._action)
        return None

    def _find(self, text: str) -> tuple[int, int] | None:
        folded = fold(text)
        hashes = hash_words(list_words(folded))
        for length, known in self._runs.items():
            runs = _hash_runs(hashes, length)
            if not len(runs) or not len(known):
                continue
            places = np.minimum(np.searchsorted(known, runs), len(known) - 1)
            hits = np.flatnonzero(known[places] == runs)
            if len(hits):
                words = list(find_words(folded))
                first = int(hits[0])
                return find_original_span(text, words[first].start(), words[first + length - 1].end())
        return None


def make_index(texts: Iterable[str], config: QualityConfig) -> ContaminationIndex:
    """Return an index of the texts of the evaluation tasks."""
    return ContaminationIndex(texts, config)


def _hash_runs(hashes: Hashes, length: int) -> Hashes:
    """Return a hash of every run of so many words."""
    count = len(hashes) - length + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    runs = np.zeros(count, np.uint64)
    for offset, factor in enumerate(_list_factors(length)):
        runs += (hashes[offset : offset + count] ^ hashes[offset : offset + count] >> np.uint64(31)) * factor
    return runs


def _list_factors(length: int) -> Iterator[np.uint64]:
    factor = 1
    for _ in range(length):
        factor = factor * _MULTIPLIER & _MASK
        yield np.uint64(factor)


def _drop_boilerplate(runs: list[Hashes]) -> Hashes:
    """Return the runs of all texts, sorted, without those that many texts hold."""
    values, counts = np.unique(np.concatenate(runs), return_counts=True)
    return values[counts <= MAX_TEXTS]
