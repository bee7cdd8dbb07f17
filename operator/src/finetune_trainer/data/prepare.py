"""From local files of rows to a prepared data set: read, judge, split, write, count.

Rows stream through; memory does not grow with their number. The result depends on the rows, the rules and the settings
alone: the same input gives the same bytes and the same digest on any machine. Fetching the files is the command's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.data import output
from finetune_trainer.data.findings import Verdict
from finetune_trainer.data.formats import FORMATS, Conversation, RowError, detect_format, list_keys, parse_row
from finetune_trainer.data.quality import find_defect
from finetune_trainer.data.refusals import RowFilter, make_filter
from finetune_trainer.data.report import Counts, Tally
from finetune_trainer.data.rows import BadRow, Row, RowFile, UnreadableFileError
from finetune_trainer.data.rules import rules_digest
from finetune_trainer.data.split import holdout_share, select_copies
from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    import pathlib

    from finetune_contract.run_config import DatasetConfig
    from finetune_trainer.data.tokens import TokenCounter

VERSION = 1
"""Version of the prepared data's format; part of its digest."""


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of rows on this machine."""

    path: pathlib.Path
    name: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class SourceRows:
    """The files of one source of the data set."""

    field: str
    """Path of the source in the job's spec, for messages."""
    files: tuple[SourceFile, ...]
    format: str = "auto"
    weight: float = 1.0


Advance = Callable[[float, Counts], None]
"""Told of the share of the input that has been read, from 0 to 1, and the counts so far."""


def make_digest(sources: Sequence[SourceRows], config: DatasetConfig, phrases: Sequence[str] | None = None) -> str:
    """Return the name of the data set that these rows and settings give."""
    facts = {
        "version": VERSION,
        "sources": [
            {"files": [file.sha256 for file in source.files], "format": source.format, "weight": source.weight}
            for source in sources
        ],
        "settings": build_settings(config, phrases),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def build_settings(config: DatasetConfig, phrases: Sequence[str] | None) -> dict[str, Any]:
    """Return the settings that decide what the prepared data holds."""
    return {
        "fields": dict(config.fields),
        "filter": dataclasses.asdict(config.filter),
        "phrases": None if phrases is None else list(phrases),
        "rules": rules_digest(),
        "holdoutFraction": config.holdout_fraction,
        "seed": config.seed,
    }


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a row comes from."""

    source: SourceRows
    source_index: int
    file: SourceFile
    format: str
    row_index: int

    def to_facts(self) -> dict[str, int]:
        return {"index": self.row_index, "source": self.source_index}


class Preparation:
    """One run over all rows."""

    def __init__(
        self,
        config: DatasetConfig,
        folder: pathlib.Path,
        tokens: TokenCounter,
        phrases: Sequence[str] | None = None,
        advance: Advance = lambda _share, _counts: None,
    ) -> None:
        self._config = config
        self._folder = folder
        self._tokens = tokens
        self._phrases = phrases
        self._advance = advance
        self._filter: RowFilter = make_filter(config.filter, phrases)
        # The old scripts knew nothing of quality, and legacy mode is to give what they gave.
        self._checks_quality = config.filter.rules != "legacy"
        self._tally = Tally(config.seed)
        self._files: dict[str, output.LinesFile] = {}
        self._source_facts: list[dict[str, Any]] = []
        self._lowest_share = 2.0
        """The smallest holdout share of a kept row; its prompt is held out when chance holds out nothing."""

    def run(self, sources: Sequence[SourceRows], *, dry: bool = False) -> dict[str, Any]:
        """Write the data set into the folder and return its manifest. Raises TrainerError.

        A dry run writes the report and the lists of removed and bad rows, and leaves a folder with data alone.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        if dry:
            self._refuse_data()
        (self._folder / output.MANIFEST).unlink(missing_ok=True)
        for name in (output.TRAIN, output.HOLDOUT):
            self._files[name] = output.LinesFile(self._folder / name, kept=not dry)
        for name in (output.REMOVED, output.BAD):
            self._files[name] = output.LinesFile(self._folder / name)
        try:
            for index, source in enumerate(sources):
                self._prepare_source(index, source, len(sources))
        finally:
            for file in self._files.values():
                file.close()
        if not dry:
            self._hold_out_one_prompt_if_needed()
        manifest = self._write_report(sources)
        # After the report, which says what took everything away.
        self._refuse_nothing(sources)
        if not dry:
            output.write_manifest(self._folder, manifest)
        return manifest

    def _refuse_data(self) -> None:
        for name in (output.TRAIN, output.MANIFEST):
            if (self._folder / name).exists():
                raise TrainerError(
                    Reason.INVALID_CONFIG,
                    ExitCode.USAGE,
                    f"--dry-run would replace the report of the data in {self._folder}, which has a {name}",
                    "Name another folder with --out.",
                )

    def _prepare_source(self, index: int, source: SourceRows, num_sources: int) -> None:
        row_index = 0
        format_name = source.format
        for file_index, file in enumerate(source.files):
            reader = RowFile(file.path)
            for item in _list_items(reader, file, source):
                if format_name == "auto" and isinstance(item, Row):
                    format_name = self._detect(item, file, source)
                self._prepare_row(item, _Place(source, index, file, format_name, row_index))
                row_index += 1
                if row_index % 512 == 0:
                    done = index + (file_index + reader.share) / len(source.files)
                    self._advance(done / num_sources, self._tally.counts)
        self._advance((index + 1) / num_sources, self._tally.counts)
        facts = {"format": format_name, "weight": source.weight}
        files = [{"name": file.name, "sha256": file.sha256} for file in source.files]
        counts = self._tally.per_source.get(index, Counts())
        self._source_facts.append(facts | counts.to_facts() | {"files": files})

    def _detect(self, row: Row, file: SourceFile, source: SourceRows) -> str:
        found = detect_format(row.value, self._config.fields)
        if found is not None:
            return found
        keys = list_keys(row.value)
        raise TrainerError(
            Reason.DATASET_INVALID,
            ExitCode.DATA,
            f"{source.field}: {file.name}, line {row.line}: the format cannot be told from its keys ({keys})",
            f"Set {source.field}.format to one of {', '.join(FORMATS)}, and map other names in spec.dataset.fields.",
        )

    def _prepare_row(self, item: Row | BadRow, place: _Place) -> None:
        if isinstance(item, BadRow):
            self._note_bad_row(item.line, item.why, place)
            return
        try:
            conversation = parse_row(item.value, place.format, self._config.fields)
        except RowError as error:
            self._note_bad_row(item.line, str(error), place)
            return
        defect = find_defect(conversation) if self._checks_quality else None
        verdict = self._filter.judge(conversation) if defect is None else Verdict(conversation, (defect,))
        self._tally.add_row(place.source_index, place.row_index, conversation, verdict)
        if verdict.removal is None:
            self._write_row(verdict.conversation, place)
        else:
            self._files[output.REMOVED].write(place.to_facts() | verdict.removal.to_facts())

    def _write_row(self, conversation: Conversation, place: _Place) -> None:
        seed = self._config.seed
        copies = select_copies(place.source.weight, seed, place.source_index, place.row_index)
        if not copies:
            return
        messages = conversation.to_messages()
        line = {"messages": messages, **place.to_facts()}
        share = holdout_share(messages, seed)
        self._lowest_share = min(self._lowest_share, share)
        if share < self._config.holdout_fraction:
            self._files[output.HOLDOUT].write(line)
            return
        for _ in range(copies):
            self._files[output.TRAIN].write(line)
            self._tokens.add(messages)

    def _note_bad_row(self, line: int, why: str, place: _Place) -> None:
        facts = place.to_facts() | {"file": place.file.name, "line": line, "why": why}
        self._files[output.BAD].write(facts)
        self._tally.add_bad_row(facts)
        allowed, bad = self._config.max_bad_rows, self._tally.counts.bad
        if bad > allowed:
            first = self._tally.bad_rows[0]
            raise TrainerError(
                Reason.DATASET_INVALID,
                ExitCode.DATA,
                f"{place.source.field}: {first['file']}, line {first['line']}: {first['why']} "
                f"(bad rows: {bad} of the first {self._tally.counts.read}, {allowed} allowed)",
                "Mend the row, or have bad rows left out by raising spec.dataset.maxBadRows.",
            )

    def _refuse_nothing(self, sources: Sequence[SourceRows]) -> None:
        """Refuse a data set of which nothing is left, by what took it away."""
        counts = self._tally.counts
        if counts.kept:
            return
        if not counts.read:
            names = ", ".join(file.name for source in sources for file in source.files)
            hint = "Point spec.dataset.source at a file with rows."
            raise TrainerError(Reason.DATASET_EMPTY, ExitCode.DATA, f"the data set has no rows: {names}", hint)
        if not counts.removed:
            first = self._tally.bad_rows[0]
            raise TrainerError(
                Reason.DATASET_INVALID,
                ExitCode.DATA,
                f"all {counts.read} rows are bad; the first: {first['file']}, line {first['line']}: {first['why']}",
                "Set spec.dataset.format, and map other names in spec.dataset.fields.",
            )
        per_category = dict(self._tally.per_category)
        removed = ", ".join(f"{name} {number}" for name, number in per_category.items())
        raise TrainerError(
            Reason.DATASET_EMPTY_AFTER_FILTER,
            ExitCode.DATA,
            f"the filter removed all usable rows: {counts.removed} of {counts.read} ({removed})",
            "Loosen spec.dataset.filter: fewer extraPhrases, rules: default, or refusals: false; "
            f"{self._folder / output.PAGE} shows what was removed.",
            {"rows_read": counts.read, "rows_removed": counts.removed, "removed_per_category": per_category},
        )

    def _hold_out_one_prompt_if_needed(self) -> None:
        """Hold out one prompt of a small data set when chance chose none, and always leave one to train on."""
        train, holdout = self._files[output.TRAIN], self._files[output.HOLDOUT]
        if self._config.holdout_fraction > 0 and train.num_lines > 1 and not holdout.num_lines:
            lowest, seed = self._lowest_share, self._config.seed
            self._split_again(train, lambda line: holdout_share(line["messages"], seed) == lowest)
            train, holdout = self._files[output.TRAIN], self._files[output.HOLDOUT]
        if not train.num_lines:
            self._split_again(holdout, lambda _: False)

    def _split_again(self, file: output.LinesFile, is_held_out: Callable[[dict[str, Any]], bool]) -> None:
        """Share the lines of one file out anew between training and holdout, and count the tokens anew."""
        old = file.path.rename(file.path.with_suffix(".old"))
        self._tokens.reset()
        with (
            output.LinesFile(self._folder / output.TRAIN) as train,
            output.LinesFile(self._folder / output.HOLDOUT) as holdout,
            open(old, encoding="utf-8") as lines,
        ):
            for text in lines:
                line = json.loads(text)
                if is_held_out(line):
                    holdout.write(line)
                else:
                    train.write(line)
                    self._tokens.add(line["messages"])
        old.unlink()
        self._files |= {output.TRAIN: train, output.HOLDOUT: holdout}

    def _write_report(self, sources: Sequence[SourceRows]) -> dict[str, Any]:
        facts = {
            "version": VERSION,
            "digest": make_digest(sources, self._config, self._phrases),
            "rowsTrain": self._files[output.TRAIN].num_lines,
            "rowsHoldout": self._files[output.HOLDOUT].num_lines,
            "tokens": self._tokens.total,
        }
        settings = build_settings(self._config, self._phrases)
        report = facts | self._tally.to_report() | {"sources": self._source_facts, "settings": settings}
        output.write_report(self._folder, report, self._tally.list_samples())
        entries = {name: file.to_entry() for name, file in self._files.items()}
        return facts | self._tally.to_facts() | {"files": entries}


def _list_items(reader: RowFile, file: SourceFile, source: SourceRows) -> Iterator[Row | BadRow]:
    try:
        yield from reader
    except UnreadableFileError as error:
        raise TrainerError(
            Reason.DATASET_INVALID,
            ExitCode.DATA,
            f"{source.field}: {file.name}{error.place}: {error.why}",
            "Mend the file at that place; it has to be a JSON array, JSON Lines or Parquet.",
        ) from error
