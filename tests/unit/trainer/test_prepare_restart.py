"""A preparation gives the same bytes however many processes share it, and however often it is killed on the way."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import random
import signal
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_contract.run_config import DatasetConfig, FilterConfig, JudgeConfig, QualityConfig, Source
from finetune_trainer.data import chunks, output, prepare, shards
from finetune_trainer.data.judge import Judge
from finetune_trainer.data.prepare import Preparation, SourceFile, SourceRows
from finetune_trainer.data.tokens import TokenCounter
from finetune_trainer.errors import TrainerError

CONFIG = DatasetConfig(
    (Source("unused"),),
    filter=FilterConfig(rules="legacy"),
    quality=QualityConfig(duplicates="remove-row", similarity=0.9),
    judge=JudgeConfig("judge", rows="all", threshold=0.9, text="{output} ({instruction})"),
    holdout_fraction=0.2,
    max_bad_rows=100,
)


def score(texts: Sequence[str]) -> list[float]:
    """What a judge says that knows nothing, and says the same of the same text."""
    return [hashlib.sha256(text.encode()).digest()[0] / 255 for text in texts]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Many chunks and shards out of few rows."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2_000)
    monkeypatch.setattr(prepare, "SHARD_BYTES", 8_000)


def make_rows(number: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    answers = ["I'm sorry, but I can't help with that.", "Sure.", "Gerne: \u201eja\u201c.", "x" * 300, ""]
    return [
        {"instruction": f"Question {rng.randrange(number)}", "input": rng.choice(["", "3, 1"]), "output": answer}
        for answer in rng.choices(answers, weights=[1, 5, 5, 2, 1], k=number)
    ]


@pytest.fixture
def sources(tmp_path) -> list[SourceRows]:
    """Three sources in every layout, with bad rows in them."""
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [json.dumps(row) for row in make_rows(150)]
    lines[70:70] = ["", "no row", '{"instruction": 1}', "  "]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.json.gz").write_bytes(gzip.compress(json.dumps(make_rows(100, 1), indent=1).encode(), mtime=0))
    (folder / "c.json").write_text("[]")
    pq.write_table(pa.Table.from_pylist(make_rows(80, 2)), folder / "d.parquet")
    files = {path.name: SourceFile(path, path.name, "0" * 64) for path in folder.iterdir()}
    return [
        SourceRows("spec.dataset.sources[0]", (files["a.jsonl"], files["c.json"], files["b.json.gz"])),
        SourceRows("spec.dataset.sources[1]", (files["d.parquet"],), "alpaca", 1.5),
    ]


def prepare_into(folder: pathlib.Path, sources: list[SourceRows], workers: int = 0) -> dict[str, bytes]:
    judge = Judge(CONFIG.judge, lambda: score)
    Preparation(CONFIG, folder, TokenCounter(None, "alpaca"), judge=judge).run(sources, num_workers=workers)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, sources, workers):
    assert prepare_into(tmp_path / "some", sources, workers) == prepare_into(tmp_path / "none", sources)


def test_the_size_of_chunks_and_shards_shows_nowhere(tmp_path, sources, monkeypatch):
    small = prepare_into(tmp_path / "small", sources)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(prepare, "SHARD_BYTES", 1 << 20)
    assert prepare_into(tmp_path / "large", sources) == small


class Killer:
    """Counts what a preparation does to the disk, and kills the process at one of these moments."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int = -1) -> None:
        self.count = 0
        self._at = at
        targets: list[tuple[object, str]] = [
            (output.LinesFile, "append"), (output.LinesFile, "close"), (os, "fsync"), (os, "truncate"),
            (pathlib.Path, "replace"), (pathlib.Path, "unlink"), (pathlib.Path, "write_text"),
        ]  # fmt: skip
        for owner, name in targets:
            patch.setattr(owner, name, self._wrap(getattr(owner, name)))

    def _wrap(self, function: Callable) -> Callable:
        def wrapped(*args: object, **options: object) -> object:
            if self.count == self._at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
            return function(*args, **options)

        return wrapped


def run_and_die(folder: pathlib.Path, sources: list[SourceRows], at: int, workers: int = 0) -> None:
    """Prepare in a process of its own that is killed at the moment with this number, unless it is done by then."""
    child = os.fork()
    if not child:
        with pytest.MonkeyPatch.context() as patch:
            Killer(patch, at)
            prepare_into(folder, sources, workers)
        os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.parametrize("few", [False, True], ids=["many-rows", "one-prompt-held-out"])
def test_a_run_that_is_killed_at_any_moment_is_carried_on(tmp_path, sources, few):
    if few:
        # So few and equal that chance holds out nothing: the output is shared out again in the end.
        rows = [{"instruction": f"Same {index % 2}", "output": "x" * 900} for index in range(20)]
        sources[0].files[0].path.write_text("\n".join(map(json.dumps, rows)))
        sources = [SourceRows("spec.dataset", sources[0].files[:1])]
    with pytest.MonkeyPatch.context() as patch:
        killer = Killer(patch)
        expected = prepare_into(tmp_path / "undisturbed", sources)
    assert (expected["holdout.jsonl"].count(b"\n") > 0) is True
    rng = random.Random(1)
    moments = rng.sample(range(killer.count - 20 if few else 0, killer.count), 10)
    for moment in moments:
        folder = tmp_path / str(moment)
        run_and_die(folder, sources, moment, workers=rng.choice([0, 0, 2]))
        if not few:
            run_and_die(folder, sources, rng.randrange(moment + 1))
        assert prepare_into(folder, sources) == expected, f"killed at moment {moment} of {killer.count}"


def test_a_restart_reads_no_rows_again_that_a_finished_shard_has(tmp_path, sources, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        killer = Killer(patch)
        prepare_into(tmp_path / "whole", sources)
    folder = tmp_path / "out"
    run_and_die(folder, sources, killer.count // 2)
    state = json.loads((folder / shards.STATE).read_text())["progress"]
    done = []
    monkeypatch.setattr(prepare.RowWork, "draft", record_rows(prepare.RowWork.draft, done))
    prepare_into(folder, sources)
    read = sum(counts["read"] for _, counts in state["tally"]["perSource"])
    assert 0 < read < 332
    assert len(done) == 332 - read


def record_rows(draft: Callable, done: list[int]) -> Callable:
    def recording(self: object, task: prepare.Task) -> object:
        done.extend(range(task.chunk.num_rows))
        return draft(self, task)

    return recording


@pytest.mark.parametrize("damage", ["changed", "shorter", "gone", "state"])
def test_output_that_is_not_as_the_shard_says_is_begun_anew(tmp_path, sources, damage):
    expected = prepare_into(tmp_path / "whole", sources)
    folder = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        killer = Killer(patch)
        prepare_into(tmp_path / "counted", sources)
    run_and_die(folder, sources, killer.count // 2)
    train = folder / "train.jsonl"
    if damage == "changed":
        train.write_bytes(b"#" + train.read_bytes()[1:])
    elif damage == "shorter":
        os.truncate(train, 10)
    elif damage == "gone":
        train.unlink()
    else:
        (folder / shards.STATE).write_text("{}")
    assert prepare_into(folder, sources) == expected


def test_shards_of_other_settings_are_not_carried_on(tmp_path, sources):
    other = dataclasses.replace(CONFIG, seed=7)
    with pytest.MonkeyPatch.context() as patch:
        killer = Killer(patch)
        prepare_into(tmp_path / "counted", sources)
    folder = tmp_path / "out"
    run_and_die(folder, sources, killer.count // 2)
    Preparation(other, folder, TokenCounter(None, "alpaca")).run(sources, num_workers=0)
    Preparation(other, tmp_path / "fresh", TokenCounter(None, "alpaca")).run(sources, num_workers=0)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "fresh" / path.name).read_bytes()


def test_a_restart_that_allows_fewer_bad_rows_says_which_is_too_many(tmp_path, sources):
    with pytest.MonkeyPatch.context() as patch:
        killer = Killer(patch)
        prepare_into(tmp_path / "counted", sources)
    run_and_die(tmp_path / "out", sources, killer.count // 2)
    stricter = dataclasses.replace(CONFIG, max_bad_rows=0)
    with pytest.raises(TrainerError, match=r"a\.jsonl, line 72: not JSON.*1 of the first 71, 0 allowed"):
        Preparation(stricter, tmp_path / "out", TokenCounter(None, "alpaca")).run(sources, num_workers=0)


@pytest.mark.parametrize("workers", [0, 3])
def test_the_same_bad_row_is_one_too_many_for_any_number_of_workers(tmp_path, sources, workers):
    config = dataclasses.replace(CONFIG, max_bad_rows=1)
    with pytest.raises(TrainerError) as caught:
        Preparation(config, tmp_path / "out", TokenCounter(None, "alpaca")).run(sources, num_workers=workers)
    assert "a.jsonl, line 72: not JSON" in caught.value.message
    assert "(bad rows: 2 of the first 72, 1 allowed)" in caught.value.message
