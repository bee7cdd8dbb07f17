"""What is wrong with a list of phrases, line by line, and what each line does to the rows of one's own.

Lists of the old scripts carried faults for years that nobody saw, because no count was ever printed: phrases that ran
together where a comma was missing, escapes that match nothing, words that strike inside others. `lint-phrases` prints
what this module finds. It judges lists for legacy mode: lower-cased substrings.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import unicodedata
from typing import TYPE_CHECKING, Any

from finetune_trainer.data.phrase_search import PhraseSearch
from finetune_trainer.data.rules import read_legacy_phrases, read_rules

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

ERROR, WARNING = "error", "warning"

SHORTEST_SAFE = 4
"""Letters below which a phrase is found inside many words of any language."""
NUM_WORDS = 5
"""Words of one's own data that are shown for a phrase that strikes inside words."""
_MAX_WORDS = 10_000
"""Different words that are counted per phrase."""

_WORD = re.compile(r"[^\W\d_]{2,}")
_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)")
_QUOTED = re.compile(r"""^\s*(?P<mark>["'])(?P<text>.*?)(?P=mark)\s*,?\s*$""")
_TWO_QUOTED = re.compile(r"""(?P<mark>["'])\s*(?P=mark)(?=\w)|(?P<other>["'])\s+(?P=other)""")
_YEAR_JOINT = re.compile(r"(?<=\b\d{4})(?=[a-z]{2})")
_JOINT = re.compile(rf"(?<=[a-z]{{2}})(?=[A-Z][a-z]{{2}})|{_YEAR_JOINT.pattern}")
_UNSEEN = re.compile("[\u00a0\u00ad\u200b-\u200d\u2060\ufeff\t]")
_MOJIBAKE = re.compile("[\u00c3\u00c2\u00e2][\u0080-\u00bf\u20ac\u2122\u0153\u201c\u02dc]")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing wrong with one line."""

    kind: str
    level: str
    """error: the line does not do what it was written for; warning: it does more, or nothing of its own."""
    message: str


@dataclasses.dataclass
class Entry:
    """One line of the list."""

    line: int
    phrase: str
    problems: list[Problem] = dataclasses.field(default_factory=list)
    num_rows: int = 0
    """Rows of the data that it removes."""
    num_rows_alone: int = 0
    """Rows that stay if this line is taken out of the list."""
    words: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Words of the data inside which it was found."""

    def to_facts(self) -> dict[str, Any]:
        """Return the entry for `--json`."""
        return {
            "line": self.line,
            "phrase": self.phrase,
            "problems": [dataclasses.asdict(problem) for problem in self.problems],
            "rows": self.num_rows,
            "rowsAlone": self.num_rows_alone,
            "insideWords": dict(self.words.most_common(NUM_WORDS)),
        }


def parse_entries(text: str) -> list[Entry]:
    """Return the lines that legacy mode takes as phrases, untouched."""
    lines = text.replace("\r\n", "\n").split("\n")
    return [Entry(number, line) for number, line in enumerate(lines, 1) if line]


class Effects:
    """Counts what each line does to rows that stream by."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = entries
        self._lowered = [entry.phrase.lower() for entry in entries]
        self._search = PhraseSearch(self._lowered)
        self._places: dict[str, list[int]] = {}
        for index, phrase in enumerate(self._lowered):
            self._places.setdefault(phrase, []).append(index)
        self.num_rows = 0
        self.num_removed = 0

    def add(self, texts: Iterable[str]) -> None:
        """Count one row, given the texts of it that are searched."""
        self.num_rows += 1
        found: set[int] = set()
        for text in texts:
            lowered = text.lower()
            for index, start, end in self._search.list_hits(lowered):
                found.add(index)
                self._note_word(index, lowered, start, end)
        self.num_removed += bool(found)
        for index in found:
            same = self._places[self._lowered[index]]
            for place in same:
                self._entries[place].num_rows += 1
            # Of two equal lines, neither is missed when it goes.
            self._entries[index].num_rows_alone += len(found) == 1 and len(same) == 1

    def _note_word(self, index: int, text: str, start: int, end: int) -> None:
        cuts_before = text[start].isalnum() and start > 0 and text[start - 1].isalnum()
        cuts_after = text[end - 1].isalnum() and end < len(text) and text[end].isalnum()
        if not (cuts_before or cuts_after):
            return
        while cuts_before and start > 0 and text[start - 1].isalnum():
            start -= 1
        while cuts_after and end < len(text) and text[end].isalnum():
            end += 1
        words = self._entries[index].words
        if len(words) < _MAX_WORDS or text[start:end] in words:
            words[text[start:end]] += 1


def find_problems(entries: Sequence[Entry], known_words: Iterable[str] = ()) -> None:
    """Note on every entry what is wrong with it; `known_words` are real words, besides those of the rules' examples."""
    vocabulary = _list_known_words() | set(known_words)
    earlier: dict[str, int] = {}
    for entry in entries:
        entry.problems += _find_spelling_problems(entry.phrase)
        entry.problems += _find_fusions(entry.phrase, vocabulary)
        lowered = entry.phrase.lower()
        if lowered in earlier:
            entry.problems.append(Problem("duplicate", WARNING, f"the same as line {earlier[lowered]}"))
        earlier.setdefault(lowered, entry.line)
        entry.problems += _find_short(entry)
    _find_missing_commas(entries)
    _find_contained(entries)


def _list_known_words() -> set[str]:
    texts = [one.answer for rule in read_rules() for one in (*rule.match, *rule.doubt, *rule.no_match)]
    return {word for text in (*texts, *read_legacy_phrases()) for word in _WORD.findall(text.lower())}


def list_words(text: str) -> set[str]:
    """Return the words of a text as `find_problems` wants to know them."""
    return set(_WORD.findall(text.lower()))


def _find_spelling_problems(phrase: str) -> Iterator[Problem]:
    if escape := _ESCAPE.search(phrase):
        message = f"{escape[0]} is searched for as these {len(escape[0])} characters; write the character itself"
        yield Problem("dead-escape", ERROR, message)
    if _MOJIBAKE.search(phrase):
        yield Problem("encoding", ERROR, "was saved in one encoding and read in another; write the line anew")
    if quoted := _QUOTED.match(phrase):
        message = f"the quotes and the comma are searched for too; write {quoted['text']}"
        yield Problem("copied-syntax", ERROR, message)
    elif phrase.rstrip() != phrase.rstrip().rstrip(",\"'"):
        yield Problem("copied-syntax", ERROR, "ends with a quote or comma, which is searched for too")
    elif phrase != phrase.strip():
        yield Problem("outer-space", WARNING, "begins or ends with white space, which is searched for too")
    if unseen := _UNSEEN.search(phrase.strip(" ")):
        name = unicodedata.name(unseen[0], "tab").lower()
        yield Problem("unseen-character", ERROR, f"contains a character that nobody sees: {name}")
    if phrase.startswith(("#", "//")):
        yield Problem("comment", WARNING, "is a phrase, not a comment: lists have none")
    if unicodedata.normalize("NFC", phrase) != phrase:
        yield Problem(
            "accents", ERROR, "its accents are characters of their own; texts have them in one with the letter"
        )


def _find_fusions(phrase: str, vocabulary: set[str]) -> Iterator[Problem]:
    if two := _TWO_QUOTED.search(phrase.strip()):
        message = f"two phrases with no comma between, before {phrase.strip()[two.end() :]!r}"
        yield Problem("fused", ERROR, message)
        return
    parts = [part for part in _JOINT.split(phrase) if part]
    # One capital inside a word may be a name, such as JavaScript.
    level = ERROR if len(parts) > 2 or _YEAR_JOINT.search(phrase) else WARNING
    for word in () if len(parts) > 1 else _WORD.findall(phrase):
        if len(phrase.split()) >= 3 and (split := _split_word(word.lower(), vocabulary)):
            position = phrase.index(word) + split
            parts, level = [phrase[:position], phrase[position:]], ERROR
            break
    if len(parts) > 1:
        message = f"looks like phrases run together, which match nothing: {' | '.join(parts)}"
        yield Problem("fused", level, message)


def _split_word(word: str, vocabulary: set[str]) -> int | None:
    """Return where an unknown word falls into two known ones, the first as long as possible."""
    if len(word) < 9 or word in vocabulary:
        return None
    places = range(len(word) - 2, 3, -1)
    return next((place for place in places if {word[:place], word[place:]} <= vocabulary), None)


def _find_short(entry: Entry) -> Iterator[Problem]:
    letters = sum(character.isalnum() for character in entry.phrase)
    is_latin = entry.phrase.isascii()
    if entry.words:
        seen = ", ".join(f"{word} ({count})" for word, count in entry.words.most_common(NUM_WORDS))
        yield Problem("inside-words", WARNING, f"strikes inside words of the data: {seen}")
    elif is_latin and letters < SHORTEST_SAFE:
        yield Problem("too-short", WARNING, f"with {letters} letters it is found inside other words")


def _find_contained(entries: Sequence[Entry]) -> None:
    """Note the entries that hold another one, which therefore strikes wherever they do."""
    phrases = {entry.phrase.lower() for entry in entries}
    search = PhraseSearch([entry.phrase.lower() for entry in entries])
    for entry in entries:
        lowered = entry.phrase.lower()
        inner = [(index, start, end) for index, start, end in search.list_hits(lowered) if end - start < len(lowered)]
        if any(start == 0 and lowered[end:] in phrases for _, start, end in inner):
            entry.problems.append(Problem("fused", ERROR, "is two other lines run together, and matches nothing else"))
        elif inner:
            shortest = min((entries[index] for index, _, _ in inner), key=lambda one: (len(one.phrase), one.line))
            message = f"removes nothing of its own: it contains line {shortest.line}, {shortest.phrase!r}"
            entry.problems.append(Problem("contained", WARNING, message))


def _find_missing_commas(entries: Sequence[Entry]) -> None:
    """Note lines of a copied list literal that lack the comma which most of the others have."""
    quoted = [entry for entry in entries if _QUOTED.match(entry.phrase)]
    bare = [entry for entry in quoted if not entry.phrase.rstrip().endswith(",")]
    if len(bare) * 2 > len(quoted):
        return
    for entry in bare:
        if entry is not quoted[-1]:
            message = "has no comma: where it was copied from it runs together with the next line"
            entry.problems.append(Problem("fused", ERROR, message))
