"""What happened to the rows: counted where they are judged, merged, and written as report.json.

How a preparation uses it:

- A worker fills one `Tally` per chunk: `add_row` for every row that was parsed and judged, `add_bad_row` for every
  other, and, where there is a tokenizer, `add_tokens` for the row as read ("before") and as kept ("after"), from
  `TokenCounter.measure` of the chunk's rows. `add_judgement` counts what the judge said of a row. The tally travels
  by pickle, or as `to_state()`, which is JSON.
- The parent merges the chunks' tallies into one, in any order with the same result: `merge`.
- For a restart, `to_state()` of the merged tally is stored with every finished shard; `Tally.from_state()` loads it.
- In the end `to_facts()` is what manifest and report share, `to_report()` the tally's share of the report, and
  `list_samples()` the lines of samples.jsonl. `output.write_report` writes them, and the page beside them.

Memory is bounded by the rules, not by the rows.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from finetune_trainer.data.findings import FLAG, REMOVE_ROW, REMOVE_SENTENCE
from finetune_trainer.data.histogram import Histogram
from finetune_trainer.data.sample import Samples

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from finetune_trainer.data.findings import Finding, Verdict
    from finetune_trainer.data.formats import Conversation

NUM_REPORTED_BAD_ROWS = 20

When = Literal["before", "after"]
"""A row as it was read, or as it was kept."""
RulesSay = Literal["remove", "keep", "unsure"]

_UNDOUBTED = "undoubted"
"""Where the rows are counted that the judge removed though the rules were sure to keep them."""
_WORDS: dict[str, str] = {REMOVE_ROW: "removed", REMOVE_SENTENCE: "edited", FLAG: "flagged"}
_LENGTHS = ("promptCharacters", "answerCharacters", "promptTokens", "answerTokens")


@dataclasses.dataclass
class Counts:
    """Rows by fate."""

    read: int = 0
    kept: int = 0
    removed: int = 0
    bad: int = 0
    edited: int = 0
    """Kept rows that lost a sentence."""
    flagged: int = 0
    """Kept rows that a rule only flagged."""
    unsure: int = 0
    """Kept rows in which something was found that weighed too little."""

    def add(self, other: Counts) -> None:
        """Add another's rows to these."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def to_facts(self) -> dict[str, int]:
        """Return the counts under the report's names: rowsRead, rowsKept and so on."""
        return {f"rows{name.capitalize()}": number for name, number in dataclasses.asdict(self).items()}


class Tally:
    """All counts of one preparation, or of a part of its rows."""

    def __init__(self, seed: int = 0) -> None:
        self.per_source: dict[int, Counts] = {}
        """Rows by fate, by the number of their source."""
        self.bad_rows: list[dict[str, Any]] = []
        """The first bad rows, with file, line and reason."""
        self._seed = seed
        # Rows by action, rule, category, language and field.
        self._findings: collections.Counter[tuple[str, ...]] = collections.Counter()
        self._samples = Samples(seed)
        self._histograms = {(name, when): Histogram() for name in _LENGTHS for when in ("before", "after")}
        self._judgements: collections.Counter[tuple[str, bool]] = collections.Counter()

    @property
    def counts(self) -> Counts:
        """Rows by fate, of all sources."""
        total = Counts()
        for counts in self.per_source.values():
            total.add(counts)
        return total

    @property
    def per_category(self) -> dict[str, int]:
        """Removed rows by the category that removed them, most first."""
        return self._count_by("category", REMOVE_ROW)

    def add_row(self, source: int, index: int, conversation: Conversation, verdict: Verdict) -> None:
        """Count a row that was judged; `conversation` is the row as it was read, `index` its number in the source."""
        counts = self._of_source(source)
        counts.read += 1
        lengths = _measure(conversation)
        self._add_characters("before", lengths)
        # Most rows have no findings, and are done with at once.
        if verdict.findings:
            removal = verdict.removal
            if removal is not None:
                counts.removed += 1
                self._add_finding(source, index, removal, conversation.to_messages())
                return
            lengths = self._add_kept_findings(source, index, conversation, verdict)
        counts.kept += 1
        self._add_characters("after", lengths)

    def add_bad_row(self, facts: Mapping[str, Any]) -> None:
        """Count a row that could not be used: `source`, `index`, `file`, `line` and `why`."""
        counts = self._of_source(facts["source"])
        counts.read += 1
        counts.bad += 1
        self._keep_first_bad_rows([dict(facts)])

    def add_tokens(self, when: When, prompt: int, answer: int) -> None:
        """Count the tokens of a row's prompts and answers."""
        self._histograms["promptTokens", when].add(prompt)
        self._histograms["answerTokens", when].add(answer)

    def add_judgement(self, rules_say: RulesSay, judge_removes: bool, decides: bool = False) -> None:
        """Count what the judge said of a row, beside what the rules said; `decides`: the last word is the judge's."""
        self._judgements[rules_say, judge_removes] += 1
        if decides and judge_removes and rules_say == "keep":
            self._judgements[_UNDOUBTED, True] += 1

    def merge(self, other: Tally) -> None:
        """Add the other's rows to these."""
        for source, counts in other.per_source.items():
            self._of_source(source).add(counts)
        self._keep_first_bad_rows(other.bad_rows)
        self._findings.update(other._findings)
        self._samples.merge(other._samples)
        for key, histogram in other._histograms.items():
            self._histograms[key].merge(histogram)
        self._judgements.update(other._judgements)

    def to_state(self) -> dict[str, Any]:
        """Return everything as JSON values, in one order for equal tallies."""
        return {
            "seed": self._seed,
            "perSource": [[source, dataclasses.asdict(self.per_source[source])] for source in sorted(self.per_source)],
            "badRows": self.bad_rows,
            "findings": [[*key, number] for key, number in sorted(self._findings.items())],
            "samples": self._samples.to_state(),
            "histograms": [[*key, histogram.to_state()] for key, histogram in self._histograms.items()],
            "judgements": [[*key, number] for key, number in sorted(self._judgements.items())],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Tally:
        """Return the tally that `to_state` described."""
        tally = cls(state["seed"])
        tally.per_source = {source: Counts(**counts) for source, counts in state["perSource"]}
        tally.bad_rows = list(state["badRows"])
        tally._findings.update({tuple(key): number for *key, number in state["findings"]})
        tally._samples.load(state["samples"])
        tally._histograms |= {(name, when): Histogram.from_state(one) for name, when, one in state["histograms"]}
        tally._judgements.update({(says, removes): number for says, removes, number in state["judgements"]})
        return tally

    def to_facts(self) -> dict[str, Any]:
        """Return what manifest and report share."""
        return self.counts.to_facts() | {
            "removedPerRule": self._count_by("rule", REMOVE_ROW),
            "removedPerCategory": self.per_category,
        }

    def to_report(self) -> dict[str, Any]:
        """Return the whole report's share of the tally."""
        per = {
            f"{word}Per{by.capitalize()}": self._count_by(by, action)
            for action, word in _WORDS.items()
            for by in ("rule", "category", "language", "field")
        }
        report = self.to_facts() | per
        report["rules"] = self._list_rules()
        report["badRows"] = self.bad_rows
        report["lengths"] = self._report_lengths()
        if self._judgements:
            report["judge"] = self._report_judgements()
        return report

    def list_samples(self) -> list[dict[str, Any]]:
        """Return a few things found by each rule with the text around them; not in the report, which has no texts."""
        return [one | {"action": _WORDS[one["action"]]} for one in self._samples.to_report()]

    def _of_source(self, source: int) -> Counts:
        return self.per_source.setdefault(source, Counts())

    def _add_kept_findings(
        self, source: int, index: int, conversation: Conversation, verdict: Verdict
    ) -> tuple[int, int]:
        """Count what was found in a kept row, each rule once, and return the lengths of what is kept."""
        counts = self._of_source(source)
        counts.unsure += verdict.is_unsure
        messages = conversation.to_messages()
        decided = {(one.action, one.rule): one for one in reversed(verdict.decided)}
        for finding in decided.values():
            self._add_finding(source, index, finding, messages)
        actions = {action for action, _ in decided}
        counts.edited += REMOVE_SENTENCE in actions
        counts.flagged += FLAG in actions
        return _measure(verdict.conversation)

    def _add_finding(self, source: int, index: int, finding: Finding, messages: Sequence[Mapping[str, str]]) -> None:
        # `conversations[3].value` and `conversations[5].value` are one field to whoever reads the report.
        field = finding.field.partition("[")[0]
        key = (finding.action, finding.rule, finding.category, finding.language or "any", field)
        self._findings[key] += 1
        self._samples.offer(source, index, finding, messages)

    def _add_characters(self, when: When, lengths: tuple[int, int]) -> None:
        self._histograms["promptCharacters", when].add(lengths[0])
        self._histograms["answerCharacters", when].add(lengths[1])

    def _keep_first_bad_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        if rows:
            self.bad_rows = sorted([*self.bad_rows, *rows], key=lambda row: (row["source"], row["index"]))
            del self.bad_rows[NUM_REPORTED_BAD_ROWS:]

    def _count_by(self, by: str, action: str) -> dict[str, int]:
        position = ("action", "rule", "category", "language", "field").index(by)
        numbers: collections.Counter[str] = collections.Counter()
        for key, number in self._findings.items():
            if key[0] == action:
                numbers[key[position]] += number
        return _sorted(numbers)

    def _list_rules(self) -> list[dict[str, Any]]:
        """Return one entry per action and rule, most rows first."""
        numbers: collections.Counter[tuple[str, ...]] = collections.Counter()
        for key, number in self._findings.items():
            numbers[key[:4]] += number
        return [
            {"action": _WORDS[action], "rule": rule, "category": category, "language": language, "rows": number}
            for (action, rule, category, language), number in sorted(numbers.items(), key=lambda one: (-one[1], one[0]))
        ]

    def _report_lengths(self) -> dict[str, Any]:
        both = {name: {when: self._histograms[name, when] for when in ("before", "after")} for name in _LENGTHS}
        return {
            name: {when: histogram.to_report() for when, histogram in pair.items()}
            for name, pair in both.items()
            if any(pair["before"].counts)
        }

    def _report_judgements(self) -> dict[str, Any]:
        """Return what the judge said, by what the rules said, and on which share of the sure rows they agree."""
        table: dict[str, Any] = {
            f"rules{says.capitalize()}": {
                "judgeRemoves": self._judgements[says, True],
                "judgeKeeps": self._judgements[says, False],
            }
            for says in ("remove", "keep", "unsure")
        }
        num_sure = sum(number for (says, _), number in self._judgements.items() if says in ("remove", "keep"))
        num_agreed = self._judgements["remove", True] + self._judgements["keep", False]
        return table | {
            "agreement": round(num_agreed / num_sure, 4) if num_sure else None,
            "removedUndoubted": self._judgements[_UNDOUBTED, True],
        }


def _measure(conversation: Conversation) -> tuple[int, int]:
    """Return the characters of a row's prompts, system prompts and inputs among them, and of its answers."""
    prompt = answer = 0
    for turn in conversation.turns:
        if turn.role == "assistant":
            answer += len(turn.content)
        else:
            prompt += len(turn.content) + len(turn.input)
    return prompt, answer


def _sorted(counter: collections.Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))
