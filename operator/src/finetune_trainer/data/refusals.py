"""Which rows are refusals, disclaimers and the like: the rule engine, the legacy scripts' semantics, and own phrases.

Pure: given a conversation, say whether it is removed, and why. `prepare` does the reading, counting and writing.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING, Protocol

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import FILTER_ACTIONS, FilterActions
from finetune_trainer.data.cutting import cut_sentences
from finetune_trainer.data.findings import REMOVAL_WEIGHT, REMOVE_ROW, REMOVE_SENTENCE, Finding, Verdict
from finetune_trainer.data.folding import FoldedText, find_original_span, fold
from finetune_trainer.data.material import is_rewording, orders_refusal
from finetune_trainer.data.phrase_search import PhraseSearch
from finetune_trainer.data.rules import CATEGORIES, Rule, list_languages, read_legacy_phrases, read_requests, read_rules
from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from finetune_contract.run_config import FilterConfig
    from finetune_trainer.data.findings import Action
    from finetune_trainer.data.formats import Conversation

LEGACY_CATEGORY = "legacy"
EXTRA_CATEGORY = "extra"
FIELDS = ("instruction", "input", "output")
HEAD_CHARACTERS = 1024
"""What opens an answer stands within this many characters."""
REACH = 400
"""A rule's anchor stands no further than this from where its pattern begins to match."""
REQUEST_CHARACTERS = 1000
"""What kind a request is of is told by so many characters of it."""
MAX_MATCHES = 200
"""Places of one text at which one rule is considered."""
_ACTIONS = FilterActions()


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
    return RuleFilter(rules, [*(phrases or ()), *config.extra_phrases], config.fields, config.actions)


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
    for category in CATEGORIES:
        action = _choose_action(config.actions, category)
        if action not in FILTER_ACTIONS:
            raise refuse(f"actions.{category}", action, FILTER_ACTIONS)


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
        self._search = PhraseSearch([phrase.lower() for phrase in phrases])
        # An empty phrase is in every text, as it was for the loop.
        self._always = [(phrases.index(""), 0, 0)] if "" in phrases else []

    def judge(self, conversation: Conversation) -> Verdict:
        for text, field in _list_texts(conversation, self._fields):
            lowered = text.lower()
            hits = self._search.list_hits(lowered) + self._always
            if hits:
                # The first in the list's order is where a loop over the phrases would have stopped.
                index, start, end = min(hits)
                span = (start, end) if len(lowered) == len(text) else _span_in(text, start, end)
                return Verdict(conversation, (Finding(self._phrases[index], LEGACY_CATEGORY, "", field, span),))
        return Verdict(conversation)


def _span_in(text: str, start: int, end: int) -> tuple[int, int]:
    """Return where a span of `text.lower()` stood in `text`, when lowering changed its length."""
    positions: list[int] = []
    for index, character in enumerate(text):
        positions += [index] * len(character.lower())
    positions.append(len(text))
    return positions[min(start, len(positions) - 1)], positions[min(end, len(positions) - 1)]


class RuleFilter:
    """The rules of `rules/*.toml`, and phrases of one's own as whole words."""

    def __init__(
        self,
        rules: Sequence[Rule],
        phrases: Sequence[str] = (),
        fields: Sequence[str] = (),
        actions: FilterActions = _ACTIONS,
    ) -> None:
        self._fields = tuple(fields) or ("output",)
        self._rules = list(rules)
        self._actions = [_choose_action(actions, rule.category) for rule in rules]
        self._phrases = [phrase for phrase in phrases if phrase.strip()]
        # What opens an answer is searched for in its head only.
        self._head = _AnchorSearch(self._rules, lambda rule: rule.position == "opening")
        self._body = _AnchorSearch(self._rules, lambda rule: rule.position != "opening")
        self._own_phrases = PhraseSearch([fold(phrase.strip()) for phrase in self._phrases])

    def judge(self, conversation: Conversation) -> Verdict:
        findings: list[Finding] = []
        for text, field in _list_texts(conversation, self._fields):
            folded = FoldedText(text)
            request = _Request(conversation, field)
            found = self._find_until_sure(folded, field, request)
            is_own_phrase = any(one.category == EXTRA_CATEGORY for one in found)
            if found and (is_own_phrase or not self._was_asked_for(request, folded, found)):
                findings += found
                if Verdict(conversation, tuple(found)).removal is not None:
                    return Verdict(conversation, tuple(findings))
        return cut(Verdict(conversation, tuple(findings))) if findings else Verdict(conversation)

    def _find_until_sure(self, folded: FoldedText, field: str, request: _Request) -> list[Finding]:
        """Return what is found in one text, until that removes the row."""
        findings: list[Finding] = []
        weight = 0.0
        for finding in self._find(folded, field, request):
            findings.append(finding)
            weight += finding.weight if finding.action == REMOVE_ROW else 0
            if weight >= REMOVAL_WEIGHT:
                break
        return findings

    def _was_asked_for(self, request: _Request, answer: FoldedText, found: Sequence[Finding]) -> bool:
        """Whether the turn before this answer asks to translate, reword or write what the rules found."""
        if is_rewording(request.text, answer.text):
            if answer.is_one_quotation:
                return True
            # Only what holds words of that sort itself, in whatever language, can have been reworded into them.
            categories = {finding.category for finding in found}
            hits = self._head.list_hits(request.text) | self._body.list_hits(request.text)
            return any(self._rules[index].category in categories for index in hits)
        return orders_refusal(request.text)

    def _find(self, folded: FoldedText, field: str, request: _Request) -> Iterator[Finding]:
        yield from self._find_phrase(folded, field)
        hits = self._head.list_hits(folded.text[:HEAD_CHARACTERS]) | self._body.list_hits(folded.text)
        # In the order of the files, so that the verdict does not depend on a set's.
        for index in sorted(hits):
            rule, action = self._rules[index], self._actions[index]
            matches = find_matches(rule, folded, hits[index])
            # Of a row that goes as a whole, one place says enough.
            wanted = matches if action == REMOVE_SENTENCE else itertools.islice(matches, 1)
            for start, end in wanted:
                if request.is_any_of(rule.unless_asked):
                    break
                span = find_original_span(folded.original, start, end)
                yield Finding(rule.id, rule.category, rule.language, field, span, action, rule.weight)

    def _find_phrase(self, folded: FoldedText, field: str) -> Iterator[Finding]:
        text = folded.text
        for index, start, end in self._own_phrases.list_hits(text):
            if _is_boundary(text, start) and _is_boundary(text, end):
                span = find_original_span(folded.original, start, end)
                yield Finding(self._phrases[index], EXTRA_CATEGORY, "", field, span)
                return


class _Request:
    """What an answer answers: the turn before it, folded when first looked at."""

    def __init__(self, conversation: Conversation, field: str) -> None:
        self._conversation = conversation
        self._field = field

    @functools.cached_property
    def text(self) -> str:
        """The folded request; empty for what is no answer."""
        turns = self._conversation.turns
        pairs = itertools.pairwise(turns)
        asked = [question for question, turn in pairs if turn.field == self._field and turn.role == "assistant"]
        return fold(" ".join(f"{question.content} {question.input}" for question in asked))

    def is_any_of(self, kinds: Sequence[str]) -> bool:
        """Whether it is a request of one of the kinds that `rules/requests/` describes."""
        known = read_requests()
        return any(known[kind].search(self.text, 0, REQUEST_CHARACTERS) for kind in kinds)


def _choose_action(actions: FilterActions, category: str) -> Action:
    action: Action = getattr(actions, category.replace("-", "_"))
    return action


class _AnchorSearch:
    """Finds the rules that may match a text by the words without which they cannot."""

    def __init__(self, rules: Sequence[Rule], is_wanted: Callable[[Rule], bool]) -> None:
        owners: dict[str, list[int]] = {}
        for index, rule in enumerate(rules):
            for anchor in rule.anchors if is_wanted(rule) else ():
                for spelling in _list_spellings(fold(anchor)):
                    owners.setdefault(spelling, []).append(index)
        self._owners = list(owners.values())
        self._search = PhraseSearch(list(owners))

    def list_hits(self, text: str) -> dict[int, list[int]]:
        """Return the places of anchors, from first to last, for each rule (by its index) that has one in the text."""
        places: dict[int, list[int]] = {}
        for anchor, start, _ in self._search.list_hits(text):
            for owner in self._owners[anchor]:
                places.setdefault(owner, []).append(start)
        return places


def _list_spellings(anchor: str) -> Iterator[str]:
    """Yield the anchor with a space or a newline in each of its gaps: a text may be wrapped anywhere."""
    for spaces in itertools.product(" \n", repeat=anchor.count(" ")):
        gaps = iter((*spaces, ""))
        yield "".join(part + next(gaps) for part in anchor.split(" "))


def find_matches(rule: Rule, folded: FoldedText, hits: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield where a rule matches in the right place; `hits` are the places of its anchors."""
    if rule.position == "anywhere":
        matches = _search_around(rule.pattern, folded.text, hits)
    else:
        # Tried at the beginnings of sentences only, a pattern is never searched for through a whole text.
        starts = _list_starts(rule.position, folded, hits)
        matches = (match for start in starts if (match := rule.pattern.match(folded.text, start)))
    # Each is held against the whole text before it, so an endless text must not have endless many.
    considered = itertools.islice(matches, MAX_MATCHES)
    return (match.span() for match in considered if _counts(rule, folded, match.start()))


def _search_around(pattern: re.Pattern[str], text: str, hits: Sequence[int]) -> Iterator[re.Match[str]]:
    """Search where an anchor is near; places whose surroundings overlap are searched as one."""
    index = 0
    while index < len(hits):
        first = last = hits[index]
        while index < len(hits) and hits[index] - last <= REACH:
            last = hits[index]
            index += 1
        # From the beginning of a word, or the pattern could match the rest of one.
        start = text.rfind(" ", 0, max(first - REACH, 0)) + 1
        stop = text.find(" ", last + REACH)
        yield from pattern.finditer(text, start, stop if stop >= 0 else len(text))


def _list_starts(position: str, folded: FoldedText, hits: Sequence[int]) -> Iterable[int]:
    """Return where sentences begin that a rule of this position may match, with an anchor in reach of each."""
    if position == "sentence":
        return sorted({start for hit in hits for start in folded.sentence_starts_in(hit - REACH, hit)})
    starts = folded.opening_starts if position in ("opening", "edges") else []
    if position in ("closing", "edges"):
        starts = sorted({*starts, *folded.closing_starts})
    return [start for start in starts if _is_near(start, hits)]


def _is_near(start: int, hits: Sequence[int]) -> bool:
    index = bisect.bisect_left(hits, start)
    return index < len(hits) and hits[index] - start <= REACH


def _counts(rule: Rule, folded: FoldedText, start: int) -> bool:
    if folded.is_quoted(start) or _is_of_a_letter(rule, folded, start):
        return False
    return rule.unless is None or rule.unless.search(folded.passage(start)) is None


def _is_of_a_letter(rule: Rule, folded: FoldedText, start: int) -> bool:
    """Whether a letter or dialogue says it: its refusals are its characters' own, but a disclaimer may close it."""
    if rule.position == "opening" or (rule.position == "anywhere" and rule.category == "refusal"):
        return folded.is_letter
    return rule.position == "edges" and start not in folded.closing_starts[1:] and folded.is_letter


def cut(verdict: Verdict) -> Verdict:
    """Carry out the findings that remove sentences; a text of which nothing is left removes the row."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for finding in verdict.decided:
        if finding.action == REMOVE_SENTENCE:
            spans.setdefault(finding.field, []).append(finding.span)
    if not spans:
        return verdict
    turns, emptied = [], set()
    for turn in verdict.conversation.turns:
        content = cut_sentences(turn.content, spans.get(turn.field, ()))
        given = cut_sentences(turn.input, spans.get(turn.input_field, ()))
        if turn.content and not _has_words(content):
            emptied.add(turn.field)
        if turn.input and not _has_words(given):
            emptied.add(turn.input_field)
        turns.append(dataclasses.replace(turn, content=content, input=given))
    if emptied & spans.keys():
        findings = [_remove_row(one) if one.field in emptied else one for one in verdict.findings]
        return Verdict(verdict.conversation, tuple(findings))
    return Verdict(dataclasses.replace(verdict.conversation, turns=tuple(turns)), verdict.findings)


def _remove_row(finding: Finding) -> Finding:
    return dataclasses.replace(finding, action=REMOVE_ROW) if finding.action == REMOVE_SENTENCE else finding


def _has_words(text: str) -> bool:
    return any(character.isalnum() for character in text)


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
