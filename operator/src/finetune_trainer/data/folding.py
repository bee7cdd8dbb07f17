"""Text made comparable: one spelling for quotes, spaces, dashes, widths and case, and the places in it that matter.

Used by the rules, never for what is written: the prepared data keeps every character as the source had it.
"""

from __future__ import annotations

import bisect
import functools
import re
import unicodedata

_QUOTES = {ord(character): "'" for character in "\u2018\u2019\u201a\u201b\u2032\u02bc\u00b4`\uff07"}
_DOUBLE_QUOTES = {
    ord(character): '"' for character in "\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033\u300c\u300d\u300e\u300f\uff02"
}
_DASHES = {ord(character): "-" for character in "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"}
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))
_TABLE = _QUOTES | _DOUBLE_QUOTES | _DASHES | _INVISIBLE

_ODD_SPACE = re.compile(r"[^\S ]| {2,}")
_SPACE = re.compile(r"\s+")
_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f\u2026]+[\"')\]*_]*(?=\s|$)|[\u3002!?](?=[^\s\"')\]])|\n")
_MARKUP = re.compile(r"[\s*_#>\-\u2022~(]*")
_LABEL = re.compile(r"(?:assistant|ai|ai assistant|bot|chatbot|chatgpt|answer|response|output)\s*: *")
_LETTER = re.compile(r"(?:subject|re|from|to|date) ?:|(?:dear|to whom)\b[^\n]{0,60}?[,:]\s")
EDGE_SENTENCES = 3
"""How many sentences from its start count as an answer's opening, and from its end as its close."""
EDGE_CHARACTERS = 320
"""The opening reaches no further than this, however long its sentences are."""


def fold(text: str) -> str:
    """Return the text in NFKC, lower case, with plain quotes and dashes and single spaces; newlines stay."""
    if not text.isascii():
        # The table goes first: NFKC turns an acute accent that serves as an apostrophe into a space and an accent.
        text = unicodedata.normalize("NFKC", text.translate(_TABLE)).translate(_TABLE)
    else:
        text = text.replace("`", "'")
    if _ODD_SPACE.search(text):
        text = _SPACE.sub(lambda match: "\n" if "\n" in match[0] else " ", text)
    return text.lower()


def find_original_span(text: str, start: int, end: int) -> tuple[int, int]:
    """Return where `fold(text)[start:end]` stood in `text`."""

    def reach(target: int) -> int:
        positions = range(len(text) + 1)
        return bisect.bisect_left(positions, target, key=lambda position: len(fold(text[:position])))

    first = max(reach(start + 1) - 1, 0)
    return first, max(reach(end), first)


class FoldedText:
    """A folded text and its structure, computed when first asked for."""

    def __init__(self, original: str) -> None:
        self.original = original
        self.text = fold(original)

    @functools.cached_property
    def body_start(self) -> int:
        """Where the text begins after markup and a label such as `Assistant:`."""
        start = _skip_markup(self.text, 0)
        label = _LABEL.match(self.text, start)
        return _skip_markup(self.text, label.end()) if label else start

    @functools.cached_property
    def sentence_starts(self) -> list[int]:
        """Positions at which a sentence begins."""
        starts = [self.body_start]
        for match in _SENTENCE_END.finditer(self.text, self.body_start):
            start = _skip_markup(self.text, match.end())
            if starts[-1] < start < len(self.text):
                starts.append(start)
        return starts

    @functools.cached_property
    def is_letter(self) -> bool:
        """Whether it is laid out as a letter or mail, whose refusals are its characters' own."""
        return _LETTER.match(self.text, self.body_start) is not None

    def sentence_index(self, position: int) -> int | None:
        """Return the number of the sentence that begins at `position`, or None when none does."""
        index = bisect.bisect_left(self.sentence_starts, position)
        found = index < len(self.sentence_starts) and self.sentence_starts[index] == position
        return index if found else None

    def is_opening(self, position: int) -> bool:
        """Whether one of the first sentences begins here."""
        index = self.sentence_index(position)
        near = position - self.body_start <= EDGE_CHARACTERS
        return index is not None and index < EDGE_SENTENCES and near and not self.is_letter

    def is_closing(self, position: int) -> bool:
        """Whether one of the last sentences begins here."""
        index = self.sentence_index(position)
        return index is not None and index >= len(self.sentence_starts) - EDGE_SENTENCES

    def passage(self, position: int) -> str:
        """Return the rest of the sentence at `position`, and the sentence after it."""
        index = bisect.bisect_right(self.sentence_starts, position)
        following = self.sentence_starts[index + 1 : index + 2]
        return self.text[position : following[0] if following else len(self.text)]

    def is_quoted(self, position: int) -> bool:
        """Whether the place is inside double quotes of its paragraph: somebody in the text says it."""
        paragraph = self.text.rfind("\n", 0, position) + 1
        if self.text.count('"', paragraph, position) % 2 == 0:
            return False
        stripped = self.text.strip()
        # An answer that is quoted as a whole is still the answer.
        return not (stripped.startswith('"') and stripped.endswith('"') and stripped.count('"') == 2)


def _skip_markup(text: str, position: int) -> int:
    match = _MARKUP.match(text, position)
    return match.end() if match else position
