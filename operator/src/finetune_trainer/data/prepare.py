"""From local files of rows to a prepared data set: read, judge, split, write, count.

Rows stream through in chunks that processes share out among themselves (`workers`, `row_work`); memory does not grow
with their number, and a run that was interrupted is carried on (`shards`). The result depends on the rows, the rules
and the settings alone: the same input gives the same bytes and the same digest on any machine. Fetching the files is
the command's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from finetune_contract.parsing import to_plain
from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.data import output, problems
from finetune_trainer.data.chunks import CHUNK_BYTES, ChunkReader
from finetune_trainer.data.formats import detect_format
from finetune_trainer.data.report import Counts, Tally
from finetune_trainer.data.row_work import Answers, Done, Position, Questions, RowWork, Task
from finetune_trainer.data.rows import Row, UnreadableFileError, parse_chunk
from finetune_trainer.data.rules import rules_digest
from finetune_trainer.data.shards import DUPLICATES, SHARD_BYTES, Progress, Shards
from finetune_trainer.data.split import holdout_share
from finetune_trainer.data.workers import Workers, count_cores
from finetune_trainer.errors import TrainerError
from finetune_trainer.reporting import emit

if TYPE_CHECKING:
    import pathlib

    from finetune_contract.run_config import DatasetConfig, JudgeConfig
    from finetune_trainer.data.chunks import Chunk
    from finetune_trainer.data.decontamination import ContaminationIndex
    from finetune_trainer.data.duplicate_index import DuplicateIndex
    from finetune_trainer.data.judge import Judge
    from finetune_trainer.data.tokens import TokenCounter

VERSION = 2
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


def make_digest(
    sources: Sequence[SourceRows],
    config: DatasetConfig,
    phrases: Sequence[str] | None = None,
    contamination: ContaminationIndex | None = None,
) -> str:
    """Return the name of the data set that these rows and settings give."""
    facts = {
        "version": VERSION,
        "sources": [
            {"files": [file.sha256 for file in source.files], "format": source.format, "weight": source.weight}
            for source in sources
        ],
        "settings": build_settings(config, phrases, contamination),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def build_settings(
    config: DatasetConfig, phrases: Sequence[str] | None, contamination: ContaminationIndex | None = None
) -> dict[str, Any]:
    """Return the settings that decide what the prepared data holds."""
    return {
        "fields": dict(config.fields),
        "filter": dataclasses.asdict(config.filter),
        # What the tasks say decides, not where the job finds it.
        "quality": dataclasses.asdict(dataclasses.replace(config.quality, contamination_tasks=())),
        "tasks": None if contamination is None else contamination.digest,
        "judge": _build_judge_settings(config.judge),
        "phrases": None if phrases is None else list(phrases),
        "rules": rules_digest(),
        "holdoutFraction": config.holdout_fraction,
        "seed": config.seed,
    }


def _build_judge_settings(judge: JudgeConfig) -> dict[str, Any] | None:
    """Return what of the judge decides: its files, wherever they come from, and what it is asked."""
    if not judge.source:
        return None
    return {name: value for name, value in to_plain(judge).items() if name not in _FETCHING}


_FETCHING = ("source", "revision", "secret_prefix")
_NAMES = (output.TRAIN, output.HOLDOUT, output.REMOVED, output.BAD)
_MAX_WORKERS = 32
"""More could not be kept busy by the one process that reads and writes."""
_SMALL_BYTES = 4 << 20
"""So little input is done before other processes have started."""


class Preparation:
    """One run over all rows."""

    def __init__(
        self,
        config: DatasetConfig,
        folder: pathlib.Path,
        tokens: TokenCounter,
        phrases: Sequence[str] | None = None,
        advance: Advance = lambda _share, _counts: None,
        *,
        contamination: ContaminationIndex | None = None,
        judge: Judge | None = None,
    ) -> None:
        self._config = config
        self._folder = folder
        self._tokens = tokens
        self._phrases = phrases
        self._advance = advance
        self._contamination = contamination
        self._judge = judge
        self._duplicates: DuplicateIndex | None = None
        self._work = RowWork(config, tokens, phrases, contamination)
        self._progress = Progress(Tally(config.seed))
        self._files: dict[str, output.LinesFile] = {}
        self._shard_bytes = 0
        """Input since the last finished shard."""

    def run(
        self, sources: Sequence[SourceRows], *, dry: bool = False, num_workers: int | None = None
    ) -> dict[str, Any]:
        """Write the data set into the folder and return its manifest. Raises TrainerError.

        What an interrupted run with the same rows and settings has finished is carried on. A dry run writes the report
        and the lists of removed and bad rows, and leaves a folder with data alone. `num_workers` is how many processes
        share the work, 0 for this one alone, None for what suits the machine; the bytes are the same.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        if dry:
            self._refuse_data()
        (self._folder / output.MANIFEST).unlink(missing_ok=True)
        # A restart finds its place by chunks, so they have to be cut in the same places.
        shards = Shards(self._folder, f"{self._make_digest(sources)} {CHUNK_BYTES}")
        number = _choose_num_workers(sources) if num_workers is None else num_workers
        try:
            self._prepare_rows(sources, shards, dry, number)
        finally:
            shards.close()
            for file in self._files.values():
                file.close()
            if self._duplicates is not None:
                self._duplicates.close()
        self._advance(1.0, self._progress.tally.counts)
        if not dry:
            self._hold_out_one_prompt_if_needed()
        manifest = self._write_report(sources)
        # After the report, which says what took everything away.
        if not self._progress.tally.counts.kept:
            names = [file.name for source in sources for file in source.files]
            raise problems.nothing_left(self._progress.tally, names, self._folder / output.PAGE)
        if not dry:
            output.write_manifest(self._folder, manifest)
        shards.drop()
        return manifest

    def _prepare_rows(self, sources: Sequence[SourceRows], shards: Shards, dry: bool, num_workers: int) -> None:
        """Write what becomes of all rows that no finished shard holds."""
        workers: Workers[Task, Done] = Workers(self._work, num_workers)
        # Forked before a file is opened: what is buffered for a file would be written by every process.
        with workers:
            if self._judge is not None:
                self._judge.load()
            self._open_files(shards, dry)
            for task, done in workers.map(self._list_tasks(sources), self._answer):
                self._merge(task, done, sources[task.source])
                if not dry and self._shard_bytes >= SHARD_BYTES:
                    self._finish_shard(shards)
            shards.wait()

    def _finish_shard(self, shards: Shards) -> None:
        # The index first: rows that it knows from after the last shard are known by their numbers when they come again.
        if self._duplicates is not None:
            self._duplicates.commit()
        shards.finish(self._progress, self._files)
        self._shard_bytes = 0

    def _answer(self, questions: Questions) -> Answers:
        """Say what only this process knows of a chunk's rows."""
        asked = questions.judge if self._judge is not None else {}
        removed = self._judge.find_removed(list(asked.values())) if self._judge is not None and asked else []
        answers = Answers(dict(zip(asked, removed, strict=True)))
        for place, (number, mark) in questions.fingerprints.items():
            is_removed = answers.judge.get(place, False) and asked[place].decides
            earlier = self._duplicates.find_or_add(mark, number) if self._duplicates and not is_removed else None
            if earlier is not None:
                answers.duplicate_of[place] = earlier
        return answers

    def _refuse_data(self) -> None:
        for name in (output.TRAIN, output.MANIFEST):
            if (self._folder / name).exists():
                raise TrainerError(
                    Reason.INVALID_CONFIG,
                    ExitCode.USAGE,
                    f"--dry-run would replace the report of the data in {self._folder}, which has a {name}",
                    "Name another folder with --out.",
                )

    def _open_files(self, shards: Shards, dry: bool) -> None:
        """Open the output files: those of an interrupted run where its last shard ends, or new ones."""
        found = None if dry else shards.restore(_NAMES)
        # What was allowed then may be too much now; the rows are read again to say so.
        is_allowed = found is not None and found[0].tally.counts.bad <= self._config.max_bad_rows
        if found is not None and is_allowed and self._open_duplicates():
            self._progress, self._files = found
            emit("carrying on with the data", shards=self._progress.num_shards, rows=self._progress.tally.counts.read)
            return
        for file in found[1].values() if found else ():
            file.close()
        shards.drop()
        self._open_duplicates()
        unkept = (output.TRAIN, output.HOLDOUT) if dry else ()
        self._files = {name: output.LinesFile(self._folder / name, kept=name not in unkept) for name in _NAMES}

    def _open_duplicates(self) -> bool:
        """Open the index of duplicates, if one is needed; False when it does not hold what was committed."""
        if not self._config.quality.duplicates:
            return True
        from finetune_trainer.data.duplicate_index import DamagedIndexError, DuplicateIndex

        try:
            self._duplicates = DuplicateIndex(self._folder / DUPLICATES, self._config.quality)
        except DamagedIndexError:
            return False
        return True

    def _make_digest(self, sources: Sequence[SourceRows]) -> str:
        return make_digest(sources, self._config, self._phrases, self._contamination)

    def _list_tasks(self, sources: Sequence[SourceRows]) -> Iterator[Task]:
        """Yield all chunks after the place where an interrupted run has left off. Raises TrainerError."""
        begin = self._progress.position
        for index in range(begin.source, len(sources)):
            source, source_rows = sources[index], 0
            if index == len(self._progress.formats):
                self._progress.formats.append(source.format)
            for file_index, file in enumerate(source.files):
                if index == begin.source and file_index < begin.file:
                    continue
                if index == begin.source and file_index == begin.file:
                    source_rows = begin.source_rows - begin.file_rows
                place = Position(index, file_index, 0, source_rows)
                try:
                    for task in self._list_file_tasks(source, file, place):
                        source_rows = task.end.source_rows
                        if index > begin.source or file_index > begin.file or task.end.file_rows > begin.file_rows:
                            yield dataclasses.replace(task, share=(index + task.share) / len(sources))
                except UnreadableFileError as error:
                    raise problems.unreadable_file(source.field, file.name, error) from error

    def _list_file_tasks(self, source: SourceRows, file: SourceFile, begin: Position) -> Iterator[Task]:
        """Yield a file's chunks; `begin` is where it begins. Raises UnreadableFileError."""
        reader, rows = ChunkReader(file.path), 0
        formats = self._progress.formats
        for chunk in reader:
            if formats[begin.source] == "auto":
                formats[begin.source] = self._detect(chunk, file, source)
            before, rows = rows, rows + chunk.num_rows
            yield Task(
                chunk,
                begin.source,
                begin.source_rows + before,
                file.name.encode("utf-8", "backslashreplace").decode(),
                formats[begin.source],
                source.weight,
                Position(begin.source, begin.file, rows, begin.source_rows + rows),
                (begin.file + reader.share) / len(source.files),
            )

    def _detect(self, chunk: Chunk, file: SourceFile, source: SourceRows) -> str:
        """Return the format of the chunk's first row that can be read; `auto` when there is none."""
        row = next((item for item in parse_chunk(chunk) if isinstance(item, Row)), None)
        if row is None:
            return "auto"
        found = detect_format(row.value, self._config.fields)
        if found is None:
            raise problems.unknown_format(source.field, file.name, row)
        return found

    def _merge(self, task: Task, done: Done, source: SourceRows) -> None:
        """Take over what became of the next chunk. Raises TrainerError when one bad row is too many."""
        progress = self._progress
        bad_before = progress.tally.counts.bad
        progress.tally.merge(done.tally)
        over = self._config.max_bad_rows - bad_before
        if len(done.bad) > over:
            # Rows of earlier sources, and those of this one up to the row that is too many.
            read = sum(counts.read for index, counts in progress.tally.per_source.items() if index < task.source)
            read += done.bad[over] + 1
            first = progress.tally.bad_rows[0]
            raise problems.too_many_bad_rows(source.field, first, bad_before + over + 1, read)
        for name, lines in done.lines.items():
            self._files[name].append(lines, done.num_lines[name])
        progress.lowest_share = min(progress.lowest_share, done.lowest_share)
        progress.num_tokens += done.num_tokens
        progress.position = task.end
        self._shard_bytes += task.num_bytes
        self._advance(task.share, progress.tally.counts)

    def _hold_out_one_prompt_if_needed(self) -> None:
        """Hold out one prompt of a small data set when chance chose none, and always leave one to train on."""
        train, holdout = self._files[output.TRAIN], self._files[output.HOLDOUT]
        if self._config.holdout_fraction > 0 and train.num_lines > 1 and not holdout.num_lines:
            lowest, seed = self._progress.lowest_share, self._config.seed
            self._split_again(train, lambda line: holdout_share(line["messages"], seed) == lowest)
            train, holdout = self._files[output.TRAIN], self._files[output.HOLDOUT]
        if not train.num_lines:
            self._split_again(holdout, lambda _: False)

    def _split_again(self, file: output.LinesFile, is_held_out: Callable[[dict[str, Any]], bool]) -> None:
        """Share the lines of one file out anew between training and holdout, and count the tokens anew."""
        paths = [self._folder / name for name in (output.HOLDOUT, output.TRAIN)]
        new = [output.LinesFile(path.with_suffix(".new")) for path in paths]
        self._progress.num_tokens = 0
        with new[0] as holdout, new[1] as train, open(file.path, "rb") as lines:
            for line in lines:
                value = orjson.loads(line)
                if is_held_out(value):
                    holdout.append(line, 1)
                else:
                    train.append(line, 1)
                    self._progress.num_tokens += sum(map(sum, self._tokens.measure([value["messages"]])))
        # The one that has grown first: between the two, and after them, a restart finds what it can tell from a shard.
        for path, one in zip(paths, new, strict=True):
            one.path = one.path.replace(path)
        self._files |= {output.TRAIN: train, output.HOLDOUT: holdout}

    def _write_report(self, sources: Sequence[SourceRows]) -> dict[str, Any]:
        tally = self._progress.tally
        facts = {
            "version": VERSION,
            "digest": self._make_digest(sources),
            "rowsTrain": self._files[output.TRAIN].num_lines,
            "rowsHoldout": self._files[output.HOLDOUT].num_lines,
            "tokens": self._progress.num_tokens if self._tokens.is_usable else None,
        }
        settings = build_settings(self._config, self._phrases, self._contamination)
        described = [self._describe_source(index, source) for index, source in enumerate(sources)]
        report = facts | tally.to_report() | {"sources": described, "settings": settings}
        output.write_report(self._folder, report, tally.list_samples())
        entries = {name: file.to_entry() for name, file in self._files.items()}
        return facts | tally.to_facts() | {"files": entries}

    def _describe_source(self, index: int, source: SourceRows) -> dict[str, Any]:
        counts = self._progress.tally.per_source.get(index, Counts())
        files = [{"name": file.name, "sha256": file.sha256} for file in source.files]
        facts = {"format": self._progress.formats[index], "weight": source.weight}
        return facts | counts.to_facts() | {"files": files}


def _choose_num_workers(sources: Sequence[SourceRows]) -> int:
    """Return how many processes to start: none for little input, or where one core is all there is."""
    num_bytes = sum(file.path.stat().st_size for source in sources for file in source.files)
    cores = count_cores()
    return 0 if num_bytes < _SMALL_BYTES or cores == 1 else min(cores, _MAX_WORKERS)
