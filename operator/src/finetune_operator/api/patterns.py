"""Regular expressions that users write and the operator runs: matched in time that grows with the text only.

Python's own engine may take exponential time over a pattern such as `(a+)+b`, and one operator serves everybody. The
syntax is what Python's `re` and RE2, which the API server uses, have in common; digits, words and space are ASCII's.
"""

from __future__ import annotations

import functools
import re
import re._constants as codes  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

MAX_STATES = 600
"""Size of a pattern once its counted repetitions are written out."""
_IGNORED_FLAGS = re.MULTILINE | re.DOTALL | re.UNICODE | re.ASCII
"""A pattern sees one line at a time, so that these change nothing."""
_RE2_ONLY = re.compile(r"\\[pPzZQECK]|\[\[:|\[:\^?\w+:\]")
_REFUSED = "write a regular expression of RE2, without look-around and back-references, as in NCCL (error|timeout)"

Test = Callable[[str], bool]


class PatternError(ValueError):
    """A pattern that is refused; the message says why."""


class LinePattern:
    """One pattern, made by `compile_pattern`."""

    def __init__(self, text: str) -> None:
        self._tests: list[Test | None] = []
        """Per state: what a character must be to go on; None where none is read."""
        self._next: list[tuple[int, ...]] = []
        self._asserted: list[Any] = []
        self._end = self._add(None, ())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                tree = parser.parse(text)
        except (re.error, Warning, RecursionError, OverflowError) as error:
            raise PatternError(f"{error}: {_REFUSED}") from error
        if _RE2_ONLY.search(text) or tree.state.flags & ~(_IGNORED_FLAGS | re.IGNORECASE):
            raise PatternError(_REFUSED)
        self._start = self._sequence(tree, self._end, bool(tree.state.flags & re.IGNORECASE))

    def matches(self, line: str) -> bool:
        """Does the pattern match anywhere in the line?"""
        states: frozenset[int] = frozenset()
        for place in range(len(line) + 1):
            reached = self._close({*states, self._start}, line, place)
            if self._end in reached:
                return True
            if place < len(line):
                states = frozenset(
                    follow
                    for state in reached
                    if (test := self._tests[state]) is not None and test(line[place])
                    for follow in self._next[state]
                )
        return False

    def _close(self, states: Iterable[int], line: str, place: int) -> set[int]:
        reached: set[int] = set()
        waiting = list(states)
        while waiting:
            state = waiting.pop()
            if state in reached:
                continue
            reached.add(state)
            if self._tests[state] is None and _holds(self._asserted[state], line, place):
                waiting.extend(self._next[state])
        return reached

    def _add(self, test: Test | None, follow: tuple[int, ...], asserted: Any = None) -> int:
        if len(self._tests) >= MAX_STATES:
            raise PatternError(f"the pattern is too large: {_REFUSED}")
        self._tests.append(test)
        self._next.append(follow)
        self._asserted.append(asserted)
        return len(self._tests) - 1

    def _sequence(self, items: Sequence[Any], follow: int, folds: bool) -> int:
        for item in reversed(items):
            follow = self._item(item, follow, folds)
        return follow

    def _item(self, item: Any, follow: int, folds: bool) -> int:
        kind, value = item
        if kind in (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN):
            return self._add(_make_test(kind, value, folds), (follow,))
        if kind is codes.BRANCH:
            return self._add(None, tuple(self._sequence(each, follow, folds) for each in value[1]))
        if kind is codes.SUBPATTERN:
            _, added, removed, inner = value
            return self._sequence(inner, follow, (folds or bool(added & re.IGNORECASE)) and not removed & re.IGNORECASE)
        if kind in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            return self._repeat(value, follow, folds)
        if kind is codes.AT:
            return self._add(None, (follow,), value)
        raise PatternError(_REFUSED)

    def _repeat(self, value: Any, follow: int, folds: bool) -> int:
        least, most, inner = value
        start = follow
        if most is codes.MAXREPEAT:
            start = self._add(None, ())
            self._next[start] = (self._sequence(inner, start, folds), follow)
        else:
            for _ in range(most - least):
                start = self._add(None, (self._sequence(inner, start, folds), follow))
        for _ in range(least):
            start = self._sequence(inner, start, folds)
        return start


def _make_test(kind: Any, value: Any, folds: bool) -> Test:
    if kind is codes.ANY:
        return lambda character: True
    test = _make_set_test(value) if kind is codes.IN else _make_set_test([(codes.LITERAL, value)])
    folded: Test = test
    if folds:
        folded = lambda character: test(character) or test(character.lower()) or test(character.upper())  # noqa: E731
    is_negated = kind is codes.NOT_LITERAL or (kind is codes.IN and (codes.NEGATE, None) in value)
    return (lambda character: not folded(character)) if is_negated else folded


def _make_set_test(members: Sequence[Any]) -> Test:
    singles, ranges, categories = set(), [], []
    for kind, value in members:
        if kind is codes.LITERAL:
            singles.add(chr(value))
        elif kind is codes.RANGE:
            ranges.append((chr(value[0]), chr(value[1])))
        elif kind is codes.CATEGORY:
            categories.append(_CATEGORIES[value])

    def test(character: str) -> bool:
        return (
            character in singles
            or any(low <= character <= high for low, high in ranges)
            or any(category(character) for category in categories)
        )

    return test


def _is_word(character: str) -> bool:
    return character.isascii() and (character.isalnum() or character == "_")


def _is_digit(character: str) -> bool:
    return character.isascii() and character.isdigit()


def _is_space(character: str) -> bool:
    return character in "\t\n\f\r "


_CATEGORIES: dict[Any, Test] = {
    codes.CATEGORY_DIGIT: _is_digit,
    codes.CATEGORY_NOT_DIGIT: lambda character: not _is_digit(character),
    codes.CATEGORY_SPACE: _is_space,
    codes.CATEGORY_NOT_SPACE: lambda character: not _is_space(character),
    codes.CATEGORY_WORD: _is_word,
    codes.CATEGORY_NOT_WORD: lambda character: not _is_word(character),
}


def _holds(asserted: Any, line: str, place: int) -> bool:
    if asserted is None:
        return True
    if asserted in (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING):
        return place == 0
    if asserted in (codes.AT_END, codes.AT_END_STRING):
        return place == len(line)
    before = place > 0 and _is_word(line[place - 1])
    after = place < len(line) and _is_word(line[place])
    return (before != after) == (asserted is codes.AT_BOUNDARY)


@functools.lru_cache(maxsize=256)
def compile_pattern(text: str) -> LinePattern:
    """Return the pattern. Raises PatternError that says what to write instead."""
    return LinePattern(text)


def is_pattern(text: str) -> bool:
    """Is the text a pattern that is taken?"""
    try:
        compile_pattern(text)
    except PatternError:
        return False
    return True
