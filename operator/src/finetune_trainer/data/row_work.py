"""What is done with a chunk of rows, in whichever process: parse, convert, judge, count, render the output's lines.

Nothing here depends on other chunks; what does is asked of the parent between `draft` and `finish`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import orjson

from finetune_trainer.data import output
from finetune_trainer.data.cutting import find_before_cut
from finetune_trainer.data.findings import Action, Finding, Verdict
from finetune_trainer.data.formats import Conversation, RowError, parse_row
from finetune_trainer.data.judge import make_finding, select
from finetune_trainer.data.quality import find_defect, make_checks
from finetune_trainer.data.refusals import make_filter
from finetune_trainer.data.report import Tally
from finetune_trainer.data.rows import BadRow, parse_chunk
from finetune_trainer.data.split import holdout_share, select_copies

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from finetune_contract.run_config import DatasetConfig, QualityConfig
    from finetune_trainer.data.chunks import Chunk
    from finetune_trainer.data.decontamination import ContaminationIndex
    from finetune_trainer.data.duplicates import Fingerprint
    from finetune_trainer.data.judge import Question
    from finetune_trainer.data.tokens import TokenCounter


@dataclasses.dataclass(frozen=True)
class Position:
    """How far the reading is."""

    source: int
    """Number of the source, from 0."""
    file: int
    """Number of the file in it."""
    file_rows: int
    """Rows of that file."""
    source_rows: int
    """Rows of that source."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A chunk with all that is needed to know its rows' places."""

    chunk: Chunk
    source: int
    first_index: int
    """Number of its first row in the source, from 0."""
    file_name: str
    format: str
    weight: float
    end: Position
    """Where the chunk ends."""
    share: float
    """Part of all input that has been read with it, from 0 to 1."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the chunk."""
        return len(self.chunk.data)


@dataclasses.dataclass
class Done:
    """What became of a chunk's rows."""

    tally: Tally
    lines: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """Lines to append to each output file."""
    num_lines: dict[str, int] = dataclasses.field(default_factory=dict)
    bad: list[int] = dataclasses.field(default_factory=list)
    """Numbers of the bad rows in their source."""
    lowest_share: float = 2.0
    """The smallest holdout share of a kept row."""
    num_tokens: int = 0
    """Tokens of the rows to train on."""


@dataclasses.dataclass(frozen=True)
class Questions:
    """What only the parent can say of a chunk's rows, by their places among the judged ones."""

    judge: dict[int, Question] = dataclasses.field(default_factory=dict)
    """What the judge is asked."""
    fingerprints: dict[int, tuple[int, Fingerprint]] = dataclasses.field(default_factory=dict)
    """Number and fingerprint of the rows that are kept so far, in order; the numbers grow from row to row."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the parent says, by the same places."""

    judge: dict[int, bool] = dataclasses.field(default_factory=dict)
    """Whether the judge would remove the row."""
    duplicate_of: dict[int, int] = dataclasses.field(default_factory=dict)
    """Number of the earlier row that is like this one."""


@dataclasses.dataclass(slots=True)
class _Judged:
    """A row with its verdict."""

    index: int
    conversation: Conversation
    verdict: Verdict
    duplicate_of: int | None = None
    """Number of the earlier row that is like this one."""


@dataclasses.dataclass
class Draft:
    """A chunk whose rows are parsed and judged."""

    task: Task
    judged: list[_Judged]
    bad: list[dict[str, Any]]
    questions: Questions = dataclasses.field(default_factory=Questions)


_CHECKS = ("truncated", "repetition", "html", "special_tokens", "language", "pii")
"""Settings of the checks that look at one row."""
_SOURCE_BITS = 40
_NO_ANSWERS = Answers()


class RowWork:
    """Does chunks of rows by one preparation's settings."""

    def __init__(
        self,
        config: DatasetConfig,
        tokens: TokenCounter,
        phrases: Sequence[str] | None = None,
        contamination: ContaminationIndex | None = None,
    ) -> None:
        self._config = config
        self._tokens = tokens
        self._filter = make_filter(config.filter, phrases)
        self._checks = make_checks(config.quality)
        self._makes_checks = any(getattr(config.quality, name) for name in _CHECKS)
        self._contamination = contamination
        self._fingerprint = _import_fingerprint() if config.quality.duplicates else None
        # The old scripts knew nothing of quality, and legacy mode is to give what they gave.
        self._finds_defects = config.filter.rules != "legacy"

    def draft(self, task: Task) -> tuple[Draft, Questions | None]:
        """Parse and judge the rows of a chunk."""
        draft = Draft(task, [], [])
        for index, item in enumerate(parse_chunk(task.chunk), start=task.first_index):
            why = item.why if isinstance(item, BadRow) else ""
            if not isinstance(item, BadRow):
                try:
                    conversation = parse_row(item.value, task.format, self._config.fields)
                except RowError as error:
                    why = str(error)
                else:
                    draft.judged.append(_Judged(index, conversation, self._judge(conversation)))
                    continue
            facts = {"index": index, "source": task.source, "file": task.file_name, "line": item.line, "why": why}
            draft.bad.append(facts)
        self._ask(draft)
        return draft, draft.questions if draft.questions.judge or draft.questions.fingerprints else None

    def _judge(self, conversation: Conversation) -> Verdict:
        if self._finds_defects:
            defect = find_defect(conversation)
            if defect is not None:
                return Verdict(conversation, (defect,))
        verdict = self._filter.judge(conversation)
        if verdict.removal is not None:
            return verdict
        if not self._makes_checks and self._contamination is None:
            return verdict
        found = [*self._checks.check(verdict.conversation)]
        overlap = None if self._contamination is None else self._contamination.find(verdict.conversation)
        if overlap is not None:
            found.append(overlap)
        return _add_findings(verdict, *_place(found, conversation, verdict.conversation))

    def _ask(self, draft: Draft) -> None:
        """Note what the parent has to be asked, if anything."""
        config, source = self._config, draft.task.source
        for place, row in enumerate(draft.judged):
            if config.judge.source:
                question = select(row.verdict, config.judge, config.seed, source, row.index)
                if question is not None:
                    draft.questions.judge[place] = question
            # A row that its source's weight leaves out is not there, so no other is its duplicate.
            is_there = row.verdict.removal is None and self._select_copies(draft.task, row.index) > 0
            if self._fingerprint is not None and is_there:
                mark = self._fingerprint(row.verdict.conversation, config.quality)
                draft.questions.fingerprints[place] = source << _SOURCE_BITS | row.index, mark

    def _select_copies(self, task: Task, index: int) -> int:
        return select_copies(task.weight, self._config.seed, task.source, index)

    def finish(self, draft: Draft, answers: Answers | None) -> Done:
        """Count the rows of a chunk and render the lines of all that become of them."""
        done = Done(Tally(self._config.seed))
        lines: dict[str, list[bytes]] = {}
        for facts in draft.bad:
            done.tally.add_bad_row(facts)
            done.bad.append(facts["index"])
            lines.setdefault(output.BAD, []).append(render_line(facts))
        self._apply_answers(draft, answers or _NO_ANSWERS, done.tally)
        tokens = self._count_tokens(draft.judged, done.tally)
        for row, num_tokens in zip(draft.judged, tokens, strict=True):
            done.tally.add_row(draft.task.source, row.index, row.conversation, row.verdict)
            name, line, copies = self._render_row(row, draft.task, done)
            if copies:
                lines.setdefault(name, []).extend([line] * copies)
            if name == output.TRAIN:
                done.num_tokens += num_tokens * copies
        done.lines = {name: b"".join(some) for name, some in lines.items()}
        done.num_lines = {name: len(some) for name, some in lines.items()}
        return done

    def _apply_answers(self, draft: Draft, answers: Answers, tally: Tally) -> None:
        """Count what the judge says, and add to the verdicts what the parent has found."""
        for place, removes in answers.judge.items():
            question, row = draft.questions.judge[place], draft.judged[place]
            tally.add_judgement(question.rules_say, removes, question.decides)
            if removes and question.decides:
                found = _place([make_finding(question)], row.conversation, row.verdict.conversation)
                row.verdict = _add_findings(row.verdict, *found)
        for place, earlier in answers.duplicate_of.items():
            row = draft.judged[place]
            turn, action = row.conversation.turns[0], cast(Action, self._config.quality.duplicates)
            copy = Finding("duplicate", "duplicates", "", turn.field, (0, len(turn.content)), action)
            row.verdict, row.duplicate_of = _add_findings(row.verdict, copy), earlier

    def _render_row(self, row: _Judged, task: Task, done: Done) -> tuple[str, bytes, int]:
        """Return the file that a row belongs to, its line, and how often it is written."""
        place = {"index": row.index, "source": task.source}
        removal = row.verdict.removal
        if removal is not None:
            facts = place | removal.to_facts()
            if row.duplicate_of is not None:
                source, index = divmod(row.duplicate_of, 1 << _SOURCE_BITS)
                facts["duplicateOf"] = {"index": index, "source": source}
            return output.REMOVED, render_line(facts), 1
        copies = self._select_copies(task, row.index)
        if not copies:
            return output.TRAIN, b"", 0
        messages = row.verdict.conversation.to_messages()
        line = render_line({"messages": messages, **place})
        share = holdout_share(messages, self._config.seed)
        done.lowest_share = min(done.lowest_share, share)
        if share < self._config.holdout_fraction:
            return output.HOLDOUT, line, 1
        return output.TRAIN, line, copies

    def _count_tokens(self, rows: Sequence[_Judged], tally: Tally) -> list[int]:
        """Return the tokens of each row as it is kept; 0 where there is no tokenizer or the row is removed."""
        if not self._tokens.is_usable:
            return [0] * len(rows)
        before = self._tokens.measure([row.conversation.to_messages() for row in rows])
        edited = [row.verdict.conversation for row in rows if row.verdict.conversation is not row.conversation]
        after = iter(self._tokens.measure([conversation.to_messages() for conversation in edited]))
        totals = []
        for row, counts in zip(rows, before, strict=True):
            tally.add_tokens("before", *counts)
            kept = counts if row.verdict.conversation is row.conversation else next(after)
            if row.verdict.removal is None:
                tally.add_tokens("after", *kept)
            totals.append(sum(kept))
        return totals


def _import_fingerprint() -> Callable[[Conversation, QualityConfig], Fingerprint]:
    # Only when it is needed: NumPy takes half the time in which the program starts.
    from finetune_trainer.data.duplicates import fingerprint

    return fingerprint


def _add_findings(verdict: Verdict, *found: Finding) -> Verdict:
    return dataclasses.replace(verdict, findings=(*verdict.findings, *found)) if found else verdict


def _place(found: Sequence[Finding], original: Conversation, edited: Conversation) -> Sequence[Finding]:
    """Return findings in a row without its cut sentences with their spans in the row as it was read."""
    if edited is original or not found:
        return found
    before, after = _list_texts(original), _list_texts(edited)
    return [
        dataclasses.replace(one, span=find_before_cut(before[one.field], after[one.field], one.span)) for one in found
    ]


def _list_texts(conversation: Conversation) -> dict[str, str]:
    texts = {turn.input_field: turn.input for turn in conversation.turns if turn.input_field}
    return texts | {turn.field: turn.content for turn in conversation.turns}


def render_line(value: dict[str, Any]) -> bytes:
    """Return one line of JSON."""
    return orjson.dumps(value) + b"\n"
