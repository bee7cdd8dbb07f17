"""The refusal rules as read from `rules/*.toml`: compiled patterns, their anchors and their examples.

The files are explained in `rules/README.md`. Judging rows with the rules is `refusals`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import pathlib
import re
import tomllib
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

CATEGORIES = ("refusal", "disclaimer", "moralising", "identity", "knowledge-cutoff")
POSITIONS = ("opening", "closing", "edges", "sentence", "anywhere")

_FOLDER = pathlib.Path(__file__).with_name("rules")
_REQUESTS = _FOLDER / "requests" / "requests.toml"
_CHOICE = re.compile(r"[{}]")
_FRAGMENT = re.compile(r"\{([a-z_]+)\}")


class RuleError(ValueError):
    """A rules file says something that cannot be meant; the message names file and rule."""


class Example(NamedTuple):
    """An answer that a rule has to find, or that no rule may remove."""

    answer: str
    question: str = "Go on."


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule of one language."""

    id: str
    language: str
    category: str
    position: str
    anchors: tuple[str, ...]
    pattern: re.Pattern[str]
    unless: re.Pattern[str] | None
    weight: float
    unless_asked: tuple[str, ...]
    """Kinds of requests (`rules/requests/`) whose answers the rule does not judge."""
    match: tuple[Example, ...]
    """What is removed, with this rule among those that find something in it."""
    doubt: tuple[Example, ...]
    """What the rule finds but is kept, flagged for a judge: its weight alone does not decide."""
    no_match: tuple[Example, ...]


def list_languages() -> list[str]:
    """Return the languages that have rules."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


@functools.lru_cache
def read_rules(language: str = "") -> tuple[Rule, ...]:
    """Return the rules of one language, or of all."""
    languages = [language] if language else list_languages()
    return tuple(rule for name in languages for rule in _read_file(_FOLDER / f"{name}.toml"))


@functools.lru_cache
def read_requests() -> dict[str, re.Pattern[str]]:
    """Return what tells each kind of request, in whatever language, for a rule's `unless_asked`."""
    data = tomllib.loads(_REQUESTS.read_text(encoding="utf-8"))
    return {
        kind: _compile("|".join(f"(?:{pattern})" for pattern in patterns), f"{_REQUESTS.name}, {kind}")
        for kind, patterns in data.items()
    }


def read_legacy_phrases() -> tuple[str, ...]:
    """Return the phrases for legacy mode without a list of one's own."""
    return parse_phrases((_FOLDER / "legacy_phrases.txt").read_text(encoding="utf-8"))


def parse_phrases(text: str) -> tuple[str, ...]:
    """Return the phrases of a list, one a line, in order and untouched; empty lines are none."""
    return tuple(line for line in text.replace("\r\n", "\n").split("\n") if line)


@functools.lru_cache
def rules_digest() -> str:
    """Return a digest of everything the rules files say and of how texts are folded for them."""
    digest = hashlib.sha256()
    paths = [*_FOLDER.glob("*.toml"), _REQUESTS, _FOLDER / "legacy_phrases.txt"]
    # Folding and judging change verdicts as much as a rule does.
    paths += [
        _FOLDER.parent / name
        for name in (
            "cutting.py",
            "findings.py",
            "folding.py",
            "material.py",
            "phrase_search.py",
            "refusals.py",
            "rules.py",
        )
    ]
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _read_file(path: pathlib.Path) -> list[Rule]:
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    fragments = data.get("fragments", {})
    boundaries = data.get("boundaries", True)
    lead = _expand(data.get("lead", ""), fragments, path)
    rules = []
    for entry in data["rule"]:
        place = f"{path.name}, rule {entry.get('id', '?')}"
        _validate(entry, place)
        body = f"(?:{_expand(entry['pattern'], fragments, path)})"
        # A match may begin anywhere only if the pattern alone decides; elsewhere words like "however" may precede it.
        start = "" if entry["position"] == "anywhere" else lead
        text = rf"(?<!\w){start}{body}(?!\w)" if boundaries else start + body
        rules.append(
            Rule(
                id=entry["id"],
                language=data["language"],
                category=entry["category"],
                position=entry["position"],
                anchors=_list_anchors(entry["anchors"], data.get("anchors", {}), place),
                pattern=_compile(text, place),
                unless=_compile(_expand(entry["unless"], fragments, path), place) if "unless" in entry else None,
                weight=float(entry.get("weight", 1.0)),
                unless_asked=tuple(entry.get("unless_asked", ())),
                match=_list_examples(entry.get("match", ()), place),
                doubt=_list_examples(entry.get("doubt", ()), place),
                no_match=_list_examples(entry["no_match"], place),
            )
        )
    return rules


def _validate(entry: Mapping[str, Any], place: str) -> None:
    known = {field.name for field in dataclasses.fields(Rule)}
    if unknown := sorted(set(entry) - known):
        raise RuleError(f"{place}: unknown key {unknown[0]}")
    if missing := sorted({"id", "category", "position", "anchors", "pattern", "no_match"} - set(entry)):
        raise RuleError(f"{place}: {missing[0]} is missing")
    if entry["category"] not in CATEGORIES:
        raise RuleError(f"{place}: category is one of {', '.join(CATEGORIES)}, not {entry['category']}")
    if entry["position"] not in POSITIONS:
        raise RuleError(f"{place}: position is one of {', '.join(POSITIONS)}, not {entry['position']}")
    if unknown := sorted(set(entry.get("unless_asked", ())) - set(read_requests())):
        raise RuleError(f"{place}: no kind of request is called {unknown[0]}")
    if not (entry["anchors"] and entry["no_match"] and (entry.get("match") or entry.get("doubt"))):
        raise RuleError(f"{place}: anchors, no_match, and match or doubt need an entry each")


def _list_examples(entries: Sequence[str | list[str]], place: str) -> tuple[Example, ...]:
    """Return the examples: an answer alone, or `[question, answer]`."""
    examples = []
    for entry in entries:
        if not isinstance(entry, str) and len(entry) != 2:
            raise RuleError(f"{place}: an example is an answer or [question, answer]")
        examples.append(Example(entry) if isinstance(entry, str) else Example(entry[1], entry[0]))
    return tuple(examples)


def _list_anchors(entries: Sequence[str], lists: Mapping[str, Sequence[str]], place: str) -> tuple[str, ...]:
    """Return the anchors, with `@name` replaced by the file's list of that name and `{a|b}` by each of the two."""
    names = {entry[1:] for entry in entries if entry.startswith("@")}
    if unknown := sorted(names - set(lists)):
        raise RuleError(f"{place}: no list of anchors is called {unknown[0]}")
    written = [anchor for entry in entries for anchor in (lists[entry[1:]] if entry[0] == "@" else (entry,))]
    return tuple(anchor for entry in written for anchor in _spell_out(entry))


def _spell_out(anchor: str) -> Iterator[str]:
    choices = [part.split("|") for part in _CHOICE.split(anchor)]
    return map("".join, itertools.product(*choices))


def _expand(text: str, fragments: Mapping[str, str], path: pathlib.Path) -> str:
    for _ in range(8):
        if not (names := set(_FRAGMENT.findall(text))):
            return text
        if unknown := sorted(names - set(fragments)):
            raise RuleError(f"{path.name}: no fragment is called {unknown[0]}")
        text = _FRAGMENT.sub(lambda match: f"(?:{fragments[match[1]]})", text)
    raise RuleError(f"{path.name}: fragments insert one another without end")


def _compile(text: str, place: str) -> re.Pattern[str]:
    # Text is folded to single spaces and newlines, and a line may be wrapped anywhere.
    try:
        return re.compile(re.sub(r"(?<!\[) (?![^\[]*\])", r"[ \\n]", text))
    except re.error as error:
        raise RuleError(f"{place}: {error}") from error
