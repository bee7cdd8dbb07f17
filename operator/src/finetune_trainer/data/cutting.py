"""Takes whole sentences out of a text and mends the spaces around the gap. Pure; used by the filter."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# A newline ends a sentence unless the text was only wrapped there: the next line then goes on in lower case.
_END = re.compile(
    r"[.!?\u2026][.!?\u2026]*[\"')\]*_\u201d\u2019\u00bb]*(?=\s|$)"
    r"|[\u3002\uff01\uff1f]+[\"\u201d\u2019\u300d\u300f]*"
    r"|\n(?![ \t]*[a-z\u00df-\u00ff])"
)
_LIST_MARK = re.compile(r"(?:^|(?<=\n))[ \t]*(?:\d{1,3}[.)]|[-*\u2022>#]+)[ \t]*$")


def cut_sentences(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """Return the text without the sentences in which the spans lie, from the last to the first."""
    edge = len(text) + 1
    for start, end in sorted((_widen(text, *span) for span in spans), reverse=True):
        if start < edge:
            text = _mend(text[:start], text[min(end, edge) :])
            edge = start
    return text


def find_before_cut(original: str, left: str, span: tuple[int, int]) -> tuple[int, int]:
    """Return where a span of the text that is left lay in the original; all of it if it reaches over a gap."""
    start, end = span
    # Cutting moves text to the front only.
    found = original.find(left[start:end], start)
    return (0, len(original)) if found < 0 else (found, found + end - start)


def _widen(text: str, start: int, end: int) -> tuple[int, int]:
    """Return where the sentences begin and end that a span touches; a newline that ends the last one stays."""
    first = 0
    for match in _END.finditer(text):
        if match.end() <= start:
            first = match.end()
        elif match.end() >= end:
            return first, match.start() if match[0] == "\n" else match.end()
    return first, len(text)


def _mend(before: str, after: str) -> str:
    """Join what is left on both sides of a gap with the wider of the spaces that stood there."""
    mark = _LIST_MARK.search(before)
    if mark is not None:
        before = before[: mark.start()]
    left, right = before.rstrip(), after.lstrip()
    spaces = (before[len(left) :], after[: len(after) - len(right)])
    if not left or not right:
        return left + right
    return left + max(spaces, key=lambda space: (space.count("\n"), bool(space))) + right
