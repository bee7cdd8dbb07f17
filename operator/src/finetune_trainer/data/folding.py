"""Text made comparable: one spelling for quotes, spaces, dashes, widths and case, and the places in it that matter.

Used by the rules, never for what is written: the prepared data keeps every character as the source had it.
"""

from __future__ import annotations

import bisect
import functools
import re
import unicodedata

_SPELLINGS = (
    dict.fromkeys("`\u2018\u2019\u201a\u201b\u2032\u02bc\u00b4\uff07", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033\u300c\u300d\u300e\u300f\uff02", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-")
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufeff", "")
    | dict.fromkeys("\u0085\u2028\u2029", "\n")
    | {"\u1680": " "}
)
_UNUSUAL = re.compile(f"[{''.join(_SPELLINGS)}]")
_SPACES = {"\t": " ", "\v": " ", "\f": " ", "\r": "\n", "\x1c": "\n", "\x1d": "\n", "\x1e": "\n", "\x1f": " "}

_SPACES_RUN = re.compile(r"  +")
_INDENT = re.compile(r"\n[ \n]+")
_WORD = re.compile(r"\S+|\s+")
_LONG_SPACE = re.compile(r"\s{2,}")
_SENTENCE_END = re.compile(
    # One set of first characters lets the engine skip from candidate to candidate.
    r"[.!?\u3002\n](?:(?<=\n)|(?<!\n)[.!?\u3002]*[\"')\]*_]*(?=\s|$)|(?<=[\u3002!?])(?=[^\s\"')\].!?\u3002]))"
)
_MARKUP = re.compile(r"[\s*_#>\-\u2022~(]*")
_LABEL = re.compile(r"(?:assistant|ai|ai assistant|bot|chatbot|chatgpt|answer|response|output)\s*: *")
_LETTER = re.compile(
    r"(?:subject|re|from|to|date|asunto|objet|betreff|assunto) ?:|(?:dear|to whom)\b[^\n]{0,60}?[,:]\s"
    r"|(?:hi|hello|hey|querid[oa]s?|estimad[oa]s?|hola|ch(?:er|\u00e8re)s?|bonjour|liebe[rs]?|sehr geehrte\w*|hallo"
    r"|prezad[oa]s?|car[oa]s?|ol\u00e1)\b[^\n.!?]{0,40}[,:!]\n|(?:\u5c0a\u656c\u7684|\u4eb2\u7231\u7684)[^\n\u3002]{0,20}[,:]\n|\u62dd\u5553|[^\n\u3002]{1,12}\u69d8[,\u3001]?\n"
)
_SIGNATURE = re.compile(
    r"\n(?:yours (?:sincerely|faithfully|truly)|sincerely|(?:with )?(?:best|kind|warm) (?:regards|wishes)|regards"
    r"|mit freundlichen gr\u00fc\u00dfen|viele gr\u00fc\u00dfe|atentamente|(?:un )?(?:cordial )?saludos?(?: cordiales)?"
    r"|cordialement|bien \u00e0 vous|atenciosamente|cumprimentos|\u6b64\u81f4|\u656c\u5177)[,.!]?(?: yours)?(?:\n|$)"
)
_SPEAKER = re.compile(r"(?:^|(?<=\n))[*_]*[a-z\u00c0-\u024f][\w .'-]{0,24}[*_]* ?:[*_]* ")
_SPEECH = "said|says|wrote|writes|replied|answered|asked|say|write|example|reads|prompt|print|dijo|dit|sagte|disse"
_INTRODUCED = re.compile(
    rf"(?:\b(\w+)[\"'*_]*: ?\n[\s*_>\-\u2022]*(?:\d{{1,2}}[.)] ?)?|\b(?:{_SPEECH})[\"'*_]*: ?)[*_]*$"
)
_NOTES = (
    "note",
    "disclaimer",
    "important",
    "warning",
    "reminder",
    "caution",
    "ps",
    "nota",
    "aviso",
    "hinweis",
    "answer",
    "response",
)
_INTRODUCTION_CHARACTERS = 80
EDGE_SENTENCES = 3
"""How many sentences from its start count as an answer's opening, and from its end as its close."""
EDGE_CHARACTERS = 320
"""The opening reaches no further than this, however long its sentences are."""
DIALOGUE_LINES = 3
"""As many lines that begin with a name and a colon make a dialogue."""
TAIL_CHARACTERS = 600
"""Where the last sentences are looked for first."""


def fold(text: str) -> str:
    """Return the text in NFKC, lower case, with plain quotes and dashes and single spaces; newlines stay."""
    if text.isascii():
        return _fold_spaces(text.replace("`", "'")).lower()
    # Spellings go first: NFKC turns an acute accent that serves as an apostrophe into a space and an accent.
    text = _fold_spellings(text)
    if not text.isascii():
        text = _fold_spellings(unicodedata.normalize("NFKC", text))
    return _fold_spaces(text).lower()


def _fold_spellings(text: str) -> str:
    return _UNUSUAL.sub(lambda match: _SPELLINGS[match[0]], text)


def _fold_spaces(text: str) -> str:
    """Make every run of white space one newline, if it holds one, or else one space.

    Searching and replacing fixed texts is many times faster than one regular expression.
    """
    for space, plain in _SPACES.items():
        if space in text:
            text = text.replace(space, plain)
    if "\n" in text:
        text = _INDENT.sub("\n", text)
    text = _SPACES_RUN.sub(" ", text)
    return text.replace(" \n", "\n") if " \n" in text else text


def find_original_span(text: str, start: int, end: int) -> tuple[int, int]:
    """Return where `fold(text)[start:end]` stood in `text`."""
    if text.isascii():
        return _find_among_spaces(text, start), _find_among_spaces(text, max(end - 1, 0)) + (end > 0)
    first, last = _find_by_words(text, start, end)
    if fold(text[first:last]) == fold(text)[start:end]:
        return first, last

    def reach(target: int) -> int:
        positions = range(len(text) + 1)
        return bisect.bisect_left(positions, target, key=lambda position: len(fold(text[:position])))

    first = max(reach(start + 1) - 1, 0)
    return first, max(reach(end), first)


def _find_among_spaces(text: str, position: int) -> int:
    """Return which character of an ASCII text became the folded text's at `position`: only spaces were joined."""
    lag = 0
    for match in _LONG_SPACE.finditer(text):
        if match.start() - lag >= position:
            break
        lag += match.end() - match.start() - 1
    return min(position + lag, len(text))


def _find_by_words(text: str, start: int, end: int) -> tuple[int, int]:
    """Return the place of a span word by word: exact, but for letters whose folding depends on their neighbours."""
    done = 0
    first = last = -1
    for match in _WORD.finditer(text):
        word = match[0]
        length = 1 if word.isspace() else len(word) if word.isascii() else len(fold(word))
        if first < 0 and done + length > start:
            first = match.start() + _find_in_word(word, start - done + 1) - 1
        if done + length >= end:
            last = match.start() + _find_in_word(word, end - done)
            break
        done += length
    return (max(first, 0), last) if last >= 0 else (0, len(text))


def _find_in_word(word: str, length: int) -> int:
    """Return how many characters of a word fold to `length`."""
    return next((size for size in range(1, len(word)) if len(fold(word[:size])) >= length), len(word))


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
        return self.sentence_starts_in(0, len(self.text))

    @functools.cached_property
    def opening_starts(self) -> list[int]:
        """Positions at which the first sentences begin."""
        return self.sentence_starts_in(0, self.body_start + EDGE_CHARACTERS, EDGE_SENTENCES)

    @functools.cached_property
    def closing_starts(self) -> list[int]:
        """Positions at which the last sentences begin."""
        starts = self.sentence_starts_in(len(self.text) - TAIL_CHARACTERS, len(self.text))
        # If enough sentences begin in the tail, they are the last of the whole text too.
        return (starts if len(starts) >= EDGE_SENTENCES else self.sentence_starts)[-EDGE_SENTENCES:]

    def sentence_starts_in(self, first: int, last: int, limit: int | None = None) -> list[int]:
        """Return the positions from `first` to `last` at which a sentence begins, or the first few of them."""
        begin = max(first, self.body_start)
        starts = [self.body_start] if begin == self.body_start else []
        # No further than the place and what follows it, or a text without an end would be read again and again.
        for match in _SENTENCE_END.finditer(self.text, begin, max(last, begin) + 2):
            start = _skip_markup(self.text, match.end())
            if start > last or start == len(self.text) or len(starts) == limit:
                break
            if not starts or starts[-1] < start:
                starts.append(start)
        return starts

    @functools.cached_property
    def is_letter(self) -> bool:
        """Whether it is laid out as a letter or a dialogue, whose refusals are its characters' own."""
        if _LETTER.match(self.text, self.body_start) or _SIGNATURE.search(self.text):
            return True
        # A single label is the answer's own; names of speakers come back.
        begins = _SPEAKER.match(self.text, self.body_start) is not None
        return begins and len(_SPEAKER.findall(self.text)) >= DIALOGUE_LINES

    def passage(self, position: int) -> str:
        """Return the rest of the sentence at `position`, and the sentence after it."""
        index = bisect.bisect_right(self.sentence_starts, position)
        following = self.sentence_starts[index + 1 : index + 2]
        return self.text[position : following[0] if following else len(self.text)]

    @functools.cached_property
    def is_one_quotation(self) -> bool:
        """Whether the whole text stands in one pair of double quotes."""
        stripped = self.text.strip().removesuffix(".")
        return stripped.startswith('"') and stripped.endswith('"') and stripped.count('"') == 2

    def is_quoted(self, position: int) -> bool:
        """Whether somebody in the text says it: in quotes, after a colon, or as text in program code."""
        paragraph = self.text.rfind("\n", 0, position) + 1
        if self.text.count('"', paragraph, position) % 2:
            # An answer that is quoted as a whole is still the answer.
            return not self.is_one_quotation
        return position > self.body_start and self._is_introduced(position)

    def _is_introduced(self, position: int) -> bool:
        before = self.text[max(position - _INTRODUCTION_CHARACTERS, self.body_start) : position]
        if before.endswith("'") and self.text.find("'", position) >= 0:
            return True
        # Backticks were folded to apostrophes, so three of them fence code.
        if self.text.count("'''", 0, position) % 2:
            return True
        introduced = _INTRODUCED.search(before)
        return introduced is not None and introduced[1] not in _NOTES


def _skip_markup(text: str, position: int) -> int:
    match = _MARKUP.match(text, position)
    return match.end() if match else position
