"""All occurrences of many phrases in a text, in one pass over it.

Used by the filter and the linter. Plain substrings: word boundaries, case and spelling are the callers' affair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_TABLE_CHARACTERS = 100_000
"""Phrases that are longer than this together are searched by the slower automaton, which needs far less memory."""


class PhraseSearch:
    """Finds any of many phrases; the empty phrase and repeated ones are left to the caller."""

    def __init__(self, phrases: Sequence[str]) -> None:
        unique: dict[str, int] = {}
        for index, phrase in enumerate(phrases):
            # A text of whole characters cannot contain a phrase with half a surrogate pair.
            if phrase and _is_whole(phrase):
                unique.setdefault(phrase, index)
        self._indexes = list(unique.values())
        self._automaton: Any = _build_automaton(list(unique)) if unique else None

    def list_hits(self, text: str) -> list[tuple[int, int, int]]:
        """Return (index of the phrase, start, end) of every occurrence, overlapping ones too."""
        if self._automaton is None:
            return []
        found = self._automaton.find_matches_as_indexes(text, overlapping=True)
        return [(self._indexes[index], start, end) for index, start, end in found]


def _build_automaton(phrases: list[str]) -> Any:
    from ahocorasick_rs import AhoCorasick, Implementation

    fits = sum(map(len, phrases)) <= _MAX_TABLE_CHARACTERS
    kind = Implementation.DFA if fits else Implementation.ContiguousNFA
    return AhoCorasick(phrases, implementation=kind, store_patterns=False)


def _is_whole(phrase: str) -> bool:
    try:
        phrase.encode()
    except UnicodeEncodeError:
        return False
    return True
