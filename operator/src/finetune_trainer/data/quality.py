"""Rows that teach nothing or harm, whatever they say: no answer, half an answer, leaked tokens and the like. Pure.

`find_defect` is always applied, but in legacy mode. Everything else is looked for on request only: `make_checks`. A
check says what it found first in a text; what follows is the settings' choice, to remove the row or to flag it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import PII_KINDS, QUALITY_ACTIONS
from finetune_trainer.data.findings import Action, Finding
from finetune_trainer.data.language import LANGUAGES, detect_language
from finetune_trainer.data.pii import find_pii
from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune_contract.run_config import QualityConfig
    from finetune_trainer.data.formats import Conversation

CATEGORY = "quality"
"""Category of the defects; every other check is a category of its own."""

Found = tuple[str, tuple[int, int]]
"""Rule and span."""
TextCheck = Callable[[str], Found | None]


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


class Checks:
    """The checks that the settings ask for."""

    def __init__(self, config: QualityConfig) -> None:
        _validate(config)
        self._config = config
        wanted: tuple[tuple[str, str, TextCheck], ...] = (
            ("truncated", config.truncated, find_truncation),
            ("repetition", config.repetition, find_repetition),
            ("html", config.html, find_html),
        )
        self._on_answers = [(name, cast(Action, action), find) for name, action, find in wanted if action]

    def check(self, conversation: Conversation) -> tuple[Finding, ...]:
        """Return everything that was found, one finding for each check and text."""
        return tuple(self._find(conversation))

    def _find(self, conversation: Conversation) -> Iterator[Finding]:
        config, prompt = self._config, ""
        for turn in conversation.turns:
            yield from self._check_any_text(turn.content, turn.field)
            if turn.input:
                yield from self._check_any_text(turn.input, turn.input_field)
            if turn.role != "assistant":
                prompt = f"{turn.content}\n{turn.input}"
                continue
            for name, action, find in self._on_answers:
                if name == "html" and _ASKS_FOR_HTML.search(prompt):
                    continue
                found = find(turn.content)
                if found is not None:
                    yield Finding(found[0], name, "", turn.field, found[1], action)
            if config.language:
                language = detect_language(turn.content)
                if language and language not in config.languages:
                    span = (0, len(turn.content))
                    action = cast(Action, config.language)
                    yield Finding("wrong-language", "language", language, turn.field, span, action)

    def _check_any_text(self, text: str, field: str) -> Iterator[Finding]:
        config = self._config
        if config.special_tokens:
            found = find_special_token(text)
            if found is not None:
                action = cast(Action, config.special_tokens)
                yield Finding(found[0], "special-tokens", "", field, found[1], action)
        if config.pii:
            for kind, span in find_pii(text, config.pii_kinds):
                yield Finding(f"pii-{kind}", "pii", "", field, span, cast(Action, config.pii))


def make_checks(config: QualityConfig) -> Checks:
    """Return the checks that the settings ask for; none: one that finds nothing. Raises TrainerError."""
    return Checks(config)


def _validate(config: QualityConfig) -> None:
    def refuse(field: str, wrong: str, known: Sequence[str]) -> TrainerError:
        message = f"spec.dataset.quality.{field}: {wrong!r} is not known"
        return TrainerError(Reason.INVALID_CONFIG, ExitCode.CONFIG, message, f"Use one of {', '.join(known)}.")

    names = ("truncated", "repetition", "html", "special_tokens", "language", "pii", "duplicates", "contamination")
    for name in names:
        action = getattr(config, name)
        if action and action not in QUALITY_ACTIONS:
            raise refuse(name, action, QUALITY_ACTIONS)
    for language in config.languages:
        if language not in LANGUAGES:
            raise refuse("language.expected", language, LANGUAGES)
    for kind in config.pii_kinds:
        if kind not in PII_KINDS:
            raise refuse("pii.kinds", kind, PII_KINDS)
    if config.language and not config.languages:
        raise refuse("language.expected", "", LANGUAGES)


# Truncated answers

_FENCE = re.compile(r"^ {0,3}(?:```|~~~)", re.MULTILINE)
_NO_PROSE = re.compile(r"\s*(?:[-*+\u2022|#>\u2013]|\d+[.)]|[a-zA-Z][.)]\s|\w{1,30}:)")
_ENDS_OPEN = re.compile(
    r"(?:[,;(\u3001\uff0c\uff1b\u2014]|(?<=\s)(?:and|or|the|of|to|with|und|oder|et|ou|y|e|que|de))\Z"
)
_FULL_STOP = re.compile("[.!?\u3002\uff01\uff1f]")
MIN_TRUNCATED_LENGTH = 200
"""Shorter answers may be a name or a title, which end without a full stop."""


def find_truncation(text: str) -> Found | None:
    """Return where an answer breaks off: an open code block, or prose without its end."""
    fences = [match.start() for match in _FENCE.finditer(text)]
    if len(fences) % 2:
        return "open-code-block", (fences[-1], len(text))
    body = text.rstrip()
    start = body.rfind("\n") + 1
    last = body[start:]
    if len(body) < MIN_TRUNCATED_LENGTH or _NO_PROSE.match(last):
        return None
    words = last.split()
    if len(words) < 6 and (last.isascii() or len(last) < 15):
        return None
    if _ENDS_OPEN.search(last[-24:]):
        return "open-sentence", (start, len(body))
    is_link = any(character in words[-1] for character in "/@.")
    if last[-1].isalpha() and not is_link and len(_FULL_STOP.findall(body)) >= 2:
        return "open-sentence", (start, len(body))
    return None


# Repetition

_CODE = re.compile(r"^ {0,3}(```|~~~)[^\n]*\n.*?^ {0,3}\1[^\n]*$", re.MULTILINE | re.DOTALL)
_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")
_TABLE_LINE = re.compile(r"^ *\|.*$", re.MULTILINE)
_CHARACTER_RUN = re.compile(r"([^\W_])\1{39}")
MIN_TOKENS = 60
MAX_DISTINCT = 0.4
"""Share of different word triples below which a text repeats itself; ordinary prose has more than 0.9."""
MIN_SAME_LINES = 5
MAX_CHARACTERS = 200_000
"""How much of a text is searched for repeated words, so that memory is bounded."""


def blank_code(text: str) -> str:
    """Return the text with code blocks made blank, at the same length."""
    if "```" not in text and "~~~" not in text:
        return text
    return _CODE.sub(lambda match: " " * len(match[0]), text)


def find_repetition(text: str) -> Found | None:
    """Return where an answer says the same thing over and over."""
    run = _CHARACTER_RUN.search(text)
    if run is not None:
        return "same-character", run.span()
    prose = blank_code(text)
    line = _find_same_lines(prose)
    if line is not None:
        return "same-line", line
    prose = _TABLE_LINE.sub("", prose[:MAX_CHARACTERS]).lower()
    tokens = prose.split() if prose.isascii() else _TOKEN.findall(prose)
    if len(tokens) < MIN_TOKENS:
        return None
    triples = set(zip(tokens, tokens[1:], tokens[2:], strict=False))
    if len(triples) < MAX_DISTINCT * (len(tokens) - 2):
        return "same-words", (0, len(text))
    return None


def _find_same_lines(text: str) -> tuple[int, int] | None:
    """Return where one line of some length stands many times in a row, blank lines between them or not."""
    before, count, start, position = "", 0, 0, 0
    for line in text.split("\n"):
        end, plain = position + len(line), line.strip()
        if plain:
            if plain != before:
                before, count, start = plain, 0, position
            count += 1
            if count >= MIN_SAME_LINES and len(plain) >= 15 and not plain.startswith("|") and _TOKEN.search(plain):
                return start, end
        position = end + 1
    return None


# Remains of HTML

_ASKS_FOR_HTML = re.compile(
    r"html|xml|\bsvg\b|\bcss\b|\bjsx\b|\breact\b|\bvue\b|\bdom\b|\bphp\b|angular|javascript|typescript|markup"
    r"|\btags?\b|template|</?\w+[^<>]*>|scrap|crawl|beautifulsoup|\bweb|page web|p[a\xe1]gina web|\u7f51\u9875"
    r"|\u30a6\u30a7\u30d6",
    re.IGNORECASE,
)
_TAG = re.compile(
    r"</?(?:div|span|p|br|hr|a|table|tbody|thead|tr|td|th|ul|ol|li|h[1-6]|img|font|b|i|u|em|strong|center|script|style"
    r"|iframe|form|input|button|body|head|html|section|article|header|footer|nav|blockquote|pre|code|sup|sub)"
    r"(?:\s[^<>\n]{0,300})?/?>",
    re.IGNORECASE,
)
_ENTITY = re.compile(r"&(?:nbsp|amp|lt|gt|quot|apos|mdash|ndash|rsquo|lsquo|hellip|#\d{2,5}|#x[0-9a-fA-F]{2,4});")
_INLINE_CODE = re.compile(r"`[^`\n]*`")


def find_html(text: str) -> Found | None:
    """Return the first tag or entity outside code and Markdown tables, which need `<br>` for a line break."""
    if "<" not in text and "&" not in text:
        return None
    prose = blank_code(text)
    for pattern in (_INLINE_CODE, _TABLE_LINE):
        prose = pattern.sub(lambda match: " " * len(match[0]), prose)
    found = _TAG.search(prose)
    if found is not None:
        return "html-tag", found.span()
    found = _ENTITY.search(prose)
    return None if found is None else ("html-entity", found.span())


# Leaked special tokens

_SPECIAL = (
    ("chatml-token", re.compile(r"<\|[a-zA-Z_]{2,40}\|>|<\uff5c[^\s\uff5c]{2,40}\uff5c>")),
    ("llama-token", re.compile(r"\[/?INST\]|<</?SYS>>")),
    ("gemma-token", re.compile(r"<(?:start|end)_of_turn>")),
    # Alone, <s> is also the HTML of text that is struck through.
    ("sentence-token", re.compile(r"\A\s*<s>(?!.*</s>\s*\S)|</s>\s*\Z|<(?:unk|pad|bos|eos)>", re.DOTALL)),
    ("template-label", re.compile(r"^### ?(?:Instruction|Response|Human|Assistant):\s*$", re.MULTILINE)),
)


_SPECIAL_HINT = re.compile(r"<[|\uff5c<s/uepb]|INST\]|### ?[IRHA]")


def find_special_token(text: str) -> Found | None:
    """Return the first token of a chat template that leaked into a text."""
    if _SPECIAL_HINT.search(text) is None:
        return None
    for rule, pattern in _SPECIAL:
        found = pattern.search(text)
        if found is not None:
            return rule, found.span()
    return None
