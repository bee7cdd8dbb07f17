"""Which rows are refusals, disclaimers and the like: the rule engine, the legacy scripts' semantics, and own phrases.

Pure: given a conversation, say whether it is removed, and why. `prepare` does the reading, counting and writing.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Protocol

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.data.findings import REMOVAL_WEIGHT, Finding, Verdict
from finetune_trainer.data.folding import FoldedText, find_original_span, fold
from finetune_trainer.data.rules import Rule, list_languages, read_legacy_phrases, read_rules
from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from finetune_contract.run_config import FilterConfig
    from finetune_trainer.data.formats import Conversation

LEGACY_CATEGORY = "legacy"
EXTRA_CATEGORY = "extra"
FIELDS = ("instruction", "input", "output")


class RowFilter(Protocol):
    """Judges one row."""

    def judge(self, conversation: Conversation) -> Verdict:
        """Return what is to become of the row."""


def make_filter(config: FilterConfig, phrases: Sequence[str] | None = None) -> RowFilter:
    """Return the filter that the settings ask for; `phrases` replaces the built-in list of legacy mode."""
    _validate(config)
    if config.rules == "legacy":
        listed = read_legacy_phrases() if phrases is None else phrases
        wanted = [*(listed if config.refusals else ()), *config.extra_phrases]
        return LegacyFilter(wanted, config.fields)
    rules = read_rules(config.language) if config.refusals else ()
    return RuleFilter(rules, [*(phrases or ()), *config.extra_phrases], config.fields)


def _validate(config: FilterConfig) -> None:
    def refuse(field: str, wrong: str, known: Sequence[str]) -> TrainerError:
        message = f"spec.dataset.filter.{field}: {wrong!r} is not known"
        return TrainerError(Reason.INVALID_CONFIG, ExitCode.CONFIG, message, f"Use one of {', '.join(known)}.")

    if config.rules not in ("default", "legacy"):
        raise refuse("rules", config.rules, ("default", "legacy"))
    if config.language and config.language not in list_languages():
        raise refuse("language", config.language, list_languages())
    for name in config.fields:
        if name not in FIELDS:
            raise refuse("fields", name, FIELDS)


def _list_texts(conversation: Conversation, fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the texts to search with their place; `fields` names them in alpaca's words for every format."""
    for turn in conversation.turns:
        name = "output" if turn.role == "assistant" else "instruction"
        if name in fields:
            yield turn.content, turn.field
        if "input" in fields and turn.input:
            yield turn.input, turn.input_field


class LegacyFilter:
    """The old scripts exactly: `phrase.lower() in text.lower()`, in every turn unless fields are chosen."""

    def __init__(self, phrases: Sequence[str], fields: Sequence[str] = ()) -> None:
        self._fields = tuple(fields) or ("instruction", "output")
        self._phrases = list(phrases)
        self._search = _PhraseSearch([phrase.lower() for phrase in phrases])

    def judge(self, conversation: Conversation) -> Verdict:
        for text, field in _list_texts(conversation, self._fields):
            lowered = text.lower()
            found = self._search.find_first_listed(lowered)
            if found is not None:
                index, start, end = found
                span = (start, end) if len(lowered) == len(text) else _span_in(text, start, end)
                finding = Finding(self._phrases[index], LEGACY_CATEGORY, "", field, span)
                return Verdict(conversation, (finding,))
        return Verdict(conversation)


def _span_in(text: str, start: int, end: int) -> tuple[int, int]:
    """Return where a span of `text.lower()` stood in `text`, when lowering changed its length."""
    positions: list[int] = []
    for index, character in enumerate(text):
        positions += [index] * len(character.lower())
    positions.append(len(text))
    return positions[min(start, len(positions) - 1)], positions[min(end, len(positions) - 1)]


class _PhraseSearch:
    """Finds any of many phrases in one pass over a text."""

    def __init__(self, phrases: Sequence[str]) -> None:
        import ahocorasick

        self._automaton: Any = ahocorasick.Automaton()
        self.has_empty = "" in phrases
        self._empty_index = phrases.index("") if self.has_empty else -1
        for index, phrase in enumerate(phrases):
            # A phrase that is listed twice keeps its first place.
            if phrase and phrase not in self._automaton:
                self._automaton.add_word(phrase, (index, len(phrase)))
        self._is_usable = len(self._automaton) > 0
        if self._is_usable:
            self._automaton.make_automaton()

    def list_hits(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yield (index of the phrase, start, end) of every occurrence."""
        if self._is_usable:
            for last, (index, length) in self._automaton.iter(text):
                yield index, last + 1 - length, last + 1

    def find_first_listed(self, text: str) -> tuple[int, int, int] | None:
        """Return the occurrence that a loop over the phrases would have stopped at."""
        found = min(self.list_hits(text), default=None)
        # An empty phrase is in every text, as it was for the loop.
        if self.has_empty and (found is None or self._empty_index < found[0]):
            return self._empty_index, 0, 0
        return found


class RuleFilter:
    """The rules of `rules/*.toml`, and phrases of one's own as whole words."""

    def __init__(self, rules: Sequence[Rule], phrases: Sequence[str] = (), fields: Sequence[str] = ()) -> None:
        self._fields = tuple(fields) or ("output",)
        self._rules = list(rules)
        self._phrases = [phrase for phrase in phrases if phrase.strip()]
        owners: dict[str, list[int]] = {}
        for index, rule in enumerate(self._rules):
            for anchor in rule.anchors:
                owners.setdefault(fold(anchor), []).append(index)
        self._anchor_owners = list(owners.values())
        self._anchors = _PhraseSearch(list(owners))
        self._own_phrases = _PhraseSearch([fold(phrase.strip()) for phrase in self._phrases])

    def judge(self, conversation: Conversation) -> Verdict:
        findings: list[Finding] = []
        for text, field in _list_texts(conversation, self._fields):
            folded = FoldedText(text)
            weight = 0.0
            for rule, category, language, start, end, rule_weight in self._find(folded):
                span = find_original_span(text, start, end)
                findings.append(Finding(rule, category, language, field, span, weight=rule_weight))
                weight += rule_weight
                if weight >= REMOVAL_WEIGHT:
                    return Verdict(conversation, tuple(findings))
        return Verdict(conversation, tuple(findings))

    def _find(self, folded: FoldedText) -> Iterator[tuple[str, str, str, int, int, float]]:
        found = self._find_phrase(folded)
        if found is not None:
            yield found[0], EXTRA_CATEGORY, "", found[1], found[2], REMOVAL_WEIGHT
        candidates = {
            owner for index, _, _ in self._anchors.list_hits(folded.text) for owner in self._anchor_owners[index]
        }
        # In the order of the files, so that the verdict does not depend on a set's.
        for index in sorted(candidates):
            rule = self._rules[index]
            span = find_match(rule, folded)
            if span is not None:
                yield rule.id, rule.category, rule.language, *span, rule.weight

    def _find_phrase(self, folded: FoldedText) -> tuple[str, int, int] | None:
        text = folded.text
        for index, start, end in self._own_phrases.list_hits(text):
            if _is_boundary(text, start) and _is_boundary(text, end):
                return self._phrases[index], start, end
        return None


def find_match(rule: Rule, folded: FoldedText) -> tuple[int, int] | None:
    """Return where a rule matches in the right place, or None."""
    if rule.position == "anywhere":
        matches = rule.pattern.finditer(folded.text)
    else:
        # Tried at the beginnings of sentences only, a pattern is never searched for through a whole text.
        starts = [start for start in folded.sentence_starts if _is_place(rule.position, folded, start)]
        matches = (match for start in starts if (match := rule.pattern.match(folded.text, start)))
    return next((match.span() for match in matches if _counts(rule, folded, match.start())), None)


def _is_place(position: str, folded: FoldedText, start: int) -> bool:
    if position == "sentence":
        return True
    is_opening = position in ("opening", "edges") and folded.is_opening(start)
    return is_opening or (position in ("closing", "edges") and folded.is_closing(start))


def _counts(rule: Rule, folded: FoldedText, start: int) -> bool:
    if folded.is_quoted(start):
        return False
    return rule.unless is None or rule.unless.search(folded.passage(start)) is None


@functools.lru_cache(maxsize=1 << 12)
def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _is_boundary(text: str, position: int) -> bool:
    """Whether a word may begin or end here; scripts without spaces have no such places, so they are everywhere."""
    if position in (0, len(text)):
        return True
    before, after = text[position - 1], text[position]
    if not (_is_word(before) and _is_word(after)):
        return True
    return ord(before) >= 0x2E80 or ord(after) >= 0x2E80
