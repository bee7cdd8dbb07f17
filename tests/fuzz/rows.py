"""Files of rows, damaged in seeded ways, put through a whole preparation.

Whatever the bytes: the preparation ends with data whose counts add up, or with a TrainerError; in bounded time and
memory, and never with another exception or a crash. A case is its seed: the same seed makes the same file.

`python -m tests.fuzz.rows --seconds 3600 --seed 1` runs a campaign, in processes that may crash, and keeps what fails
under build/fuzz.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import dataclasses
import gzip
import io
import json
import lzma
import os
import pathlib
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_contract.run_config import DatasetConfig, FilterConfig, QualityConfig, Source
from finetune_trainer.data import chunks, compression, prepare
from finetune_trainer.data.formats import FORMATS
from finetune_trainer.data.prepare import Preparation, SourceFile, SourceRows
from finetune_trainer.data.refusals import make_filter
from finetune_trainer.data.tokens import TokenCounter
from finetune_trainer.errors import TrainerError

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SECONDS_PER_CASE = 20
"""Processor time that one file may take."""
MEMORY_PER_CASE = 512 << 20
"""Bytes by which the process may grow over all its cases."""
CASES_PER_PROCESS = 200

TOKENS = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\n", b"\r\n", b"\r", b"\0", b"NaN", b"-Infinity", b"1e999",
    b"null", b"true", b"01", b"-", b"\\u0000", b"\\ud800", b"\\udc00\\ud800", b"\xff", b"\xc3", b"\xed\xa0\x80",
    b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"PAR1", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"PK\x03\x04",
    b"\xe2\x80\xa8", b" ", b"\x0b", b'"instruction":', b'"output":1', b'"conversations":',
    b'"messages":[{"role":"user","content":[]}]', b'{"a":' * 1200, b"[" * 3000, b"9" * 5000, b"\\n" * 3000,
    b" " * 70_000, b"x" * 70_000, b"\n" * 5000, b"[]," * 20_000,
]  # fmt: skip

Pack = Callable[[bytes], bytes]
PACKS: list[Pack] = [
    bytes,
    lambda data: gzip.compress(data, 1, mtime=0),
    bz2.compress,
    lambda data: lzma.compress(data, preset=0),
    lambda data: bytes(pa.compress(data, "zstd", asbytes=True)),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """One damaged file, and how it is prepared."""

    content: bytes
    format: str
    config: DatasetConfig
    limits: dict[str, int]


class BrokenPromiseError(AssertionError):
    """What must not happen."""


def make_case(seed: int) -> Case:
    """Return the case of a seed."""
    rng = random.Random(seed)
    rows = make_rows(rng, rng.choice(FORMATS), rng.choice([1, 3, 40]))
    if rng.random() < 0.3:
        content = damage(rng, write_parquet(rng, rows), rng.choice([0, 0, 1, 3]))
    else:
        content = damage(rng, write_text(rng, rows), rng.choice([0, 1, 1, 2, 2, 8]))
        packed = rng.choice([*PACKS[:1] * 4, *PACKS])(content)
        content = packed if packed == content else damage(rng, packed, rng.choice([0, 0, 0, 1, 3]))
    quality = QualityConfig(duplicates=rng.choice(["", "remove-row", "flag"]), similarity=rng.choice([1.0, 0.8]))
    if rng.random() < 0.3:
        quality = dataclasses.replace(quality, truncated="flag", repetition="remove-row", html="flag", pii="flag")
        quality = dataclasses.replace(quality, special_tokens="remove-row", language="flag", languages=("en",))
    config = DatasetConfig(
        (Source("unused"),),
        filter=FilterConfig(rules=rng.choice(["default", "legacy"])),
        quality=quality,
        holdout_fraction=rng.choice([0.0, 0.1, 1.0]),
        max_bad_rows=rng.choice([0, 2] + [1 << 40] * 6),
    )
    small = {"CHUNK_BYTES": 2_000, "MAX_ROW_BYTES": 50_000, "BOMB_BYTES": 200_000}
    return Case(content, rng.choice(["auto"] * 8 + [*FORMATS]), config, small if rng.random() < 0.7 else {})


def make_rows(rng: random.Random, kind: str, number: int) -> list[Any]:
    """Return good rows of one format, some with odd texts."""

    def text() -> str:
        odd = [
            "",
            " ",
            "I'm sorry, but I can't.",
            "\0",
            "\u2028",
            "\U0001f600",
            "<b>x</b>",
            "a@b.de",
            "x" * 3000,
            "\ud83d",
        ]
        return rng.choice(odd) if rng.random() < 0.3 else " ".join(rng.choices(["one", "zwei", "trois", "四"], k=9))

    rows: list[Any] = []
    for _ in range(number):
        if kind == "alpaca":
            rows.append({"instruction": text(), "input": rng.choice([text(), "", None]), "output": text()})
        elif kind == "evol":
            rows.append({"instruction": text(), "output": text(), "extra": rng.choice([1, None, [{}], 10**30, 1e308])})
        elif kind == "sharegpt":
            roles = rng.choices(["human", "gpt", "system", "tool"], [9, 9, 1, 1], k=rng.randrange(5))
            rows.append({"conversations": [{"from": role, "value": text()} for role in roles]})
        else:
            roles = rng.choices(["user", "assistant", "system"], k=rng.randrange(5))
            rows.append({"messages": [{"role": role, "content": text()} for role in roles]})
    return rows


def write_text(rng: random.Random, rows: list[Any]) -> bytes:
    """Return rows as JSON or JSON Lines in one of many layouts."""
    if rng.random() < 0.4:
        text = json.dumps(rows, indent=rng.choice([None, None, 1]), ensure_ascii=rng.random() < 0.5)
    else:
        lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows]
        lines = [json.dumps(line) if rng.random() < 0.05 else line for line in lines]
        text = rng.choice(["\n", "\r\n", "\n\n"]).join(lines)
    encoding = rng.choices(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252"], [30, 2, 1, 1, 1, 1])[0]
    return text.encode(encoding, "surrogatepass" if "utf" in encoding else "replace")


def write_parquet(rng: random.Random, rows: list[Any]) -> bytes:
    """Return rows as Parquet, with columns of other types beside them."""
    clean = json.loads(json.dumps(rows).replace('"\\ud83d"', '"?"').replace("1000000000000000000000000000000", "7"))
    for row in clean:
        row.pop("extra", None)
    table = pa.Table.from_pylist(clean) if any(clean[0].values()) else pa.table({"messages": [1] * len(clean)})
    extra: list[Any] = rng.choice([[b"\xff"], [1.5], [None], [[[1]]]])
    if rng.random() < 0.3:
        table = table.append_column("extra", pa.array(extra * len(clean)))
    if rng.random() < 0.1:
        table = table.append_column("time", pa.array([2**62] * len(clean), pa.timestamp("ms")))
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression=rng.choice(["none", "snappy", "zstd", "gzip"]),
        row_group_size=rng.choice([1, 7, 1000]),
        use_dictionary=rng.random() < 0.7,
    )
    return sink.getvalue()


def damage(rng: random.Random, content: bytes, times: int) -> bytes:
    """Return the content with so many things wrong with it."""
    data = bytearray(content)
    for _ in range(times):
        place = rng.randrange(len(data) + 1)
        length = min(rng.choice([1, 2, 8, 100, 4000]), len(data) - place)
        kind = rng.randrange(7)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place:place] = rng.choice(TOKENS)
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            del data[place : place + length]
        elif kind == 4:
            data[place:place] = data[place : place + length] * rng.choice([1, 2, 20])
        elif kind == 5:
            data[place : place + length] = rng.randbytes(length)
        else:
            other = rng.randrange(len(data) + 1)
            data[place : place + length] = data[other : other + length]
    return bytes(data)


def check_case(case: Case, folder: pathlib.Path) -> str:
    """Prepare a case in an empty folder; return how it ended. Raises BrokenPromiseError, and whatever comes out."""
    path = folder / "data"
    path.write_bytes(case.content)
    source = SourceRows("spec.dataset", (SourceFile(path, "data", "0" * 64),), case.format)
    out = folder / "out"
    with contextlib.ExitStack() as stack:
        for name, value in case.limits.items():
            stack.enter_context(mock.patch.object(compression if name == "BOMB_BYTES" else chunks, name, value))
        stack.enter_context(mock.patch.object(prepare, "SHARD_BYTES", 5_000 if case.limits else 64 << 20))
        try:
            manifest = Preparation(case.config, out, TokenCounter(None, "alpaca")).run([source], num_workers=0)
        except TrainerError as error:
            if not error.message or len(error.message) > 2_000 or not error.hint:
                raise BrokenPromiseError(f"no proper message: {error.message[:300]!r}, {error.hint!r}") from error
            return str(error.reason)
    _check_counts(manifest, out)
    return "prepared"


def _check_counts(manifest: dict[str, Any], out: pathlib.Path) -> None:
    if manifest["rowsRead"] != manifest["rowsKept"] + manifest["rowsRemoved"] + manifest["rowsBad"]:
        raise BrokenPromiseError(f"counts do not add up: {manifest}")
    found: list[int] = []
    for name, entry in manifest["files"].items():
        lines = [json.loads(line) for line in (out / name).read_bytes().splitlines()]
        if len(lines) != entry["lines"]:
            raise BrokenPromiseError(f"{name}: {len(lines)} lines, {entry['lines']} in the manifest")
        found += [line["index"] for line in lines]
    if sorted(found) != list(range(manifest["rowsRead"])):
        raise BrokenPromiseError("rows are missing or twice in the output")


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Limit processor time, and by far more generously the time of the clock, for who waits needs none."""

    def refuse(*_: object) -> None:
        raise BrokenPromiseError("not done in time")

    before = [(kind, signal.signal(kind, refuse)) for kind in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS_PER_CASE)
    signal.setitimer(signal.ITIMER_REAL, 20 * SECONDS_PER_CASE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for kind, handler in before:
            signal.signal(kind, handler)


def run_cases(seeds: range, deadline: float = float("inf")) -> dict[str, int]:
    """Check the cases of these seeds until the deadline (monotonic); return how they ended."""
    ends: dict[str, int] = {}
    for seed in seeds:
        if time.monotonic() > deadline:
            break
        with tempfile.TemporaryDirectory() as folder, _time_limit():
            try:
                end = check_case(make_case(seed), pathlib.Path(folder))
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise
        ends[end] = ends.get(end, 0) + 1
    return ends


def _run_batch(seeds: range, progress: pathlib.Path) -> None:
    """Run in a process of its own: leave the number of the case in a file, so that a crash can be told apart."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ends: dict[str, int] = {}
    for seed in seeds:
        progress.write_text(json.dumps({"seed": seed, "ends": ends}))
        for end, number in run_cases(range(seed, seed + 1)).items():
            ends[end] = ends.get(end, 0) + number
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        if grown > MEMORY_PER_CASE:
            raise BrokenPromiseError(f"the process has grown by {grown >> 20} MiB at seed {seed}")
    progress.write_text(json.dumps({"seed": seeds.stop, "ends": ends}))


def run_campaign(first: int, seconds: float) -> int:
    """Run cases in processes of their own; print what fails and how the others ended. Return the number of failures."""
    begun, seed, failures = time.monotonic(), first, 0
    total: dict[str, int] = {}
    failed_folder = REPOSITORY / "build" / "fuzz"
    # Read once, here, and not in every child.
    make_filter(FilterConfig())
    with tempfile.TemporaryDirectory() as folder:
        progress = pathlib.Path(folder) / "progress.json"
        while time.monotonic() - begun < seconds:
            child = os.fork()
            if not child:
                os.environ["TMPDIR"] = folder
                try:
                    _run_batch(range(seed, seed + CASES_PER_PROCESS), progress)
                except BaseException as error:
                    print(f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')}", flush=True)
                    os._exit(1)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            state = json.loads(progress.read_text())
            for end, number in state["ends"].items():
                total[end] = total.get(end, 0) + number
            if status:
                failures += 1
                failed_folder.mkdir(parents=True, exist_ok=True)
                (failed_folder / f"{state['seed']}.bin").write_bytes(make_case(state["seed"]).content)
                print(f"seed {state['seed']}: wait status {status}; its file is in {failed_folder}", flush=True)
                shutil.rmtree(pathlib.Path(folder), ignore_errors=True)
                pathlib.Path(folder).mkdir(exist_ok=True)
            seed = state["seed"] + (1 if status else 0)
    minutes = (time.monotonic() - begun) / 60
    ends = ", ".join(f"{end} {number}" for end, number in sorted(total.items()))
    print(f"{sum(total.values())} cases in {minutes:.1f} minutes, {failures} failures: {ends}")
    return failures


def main() -> int:
    """Run a campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    return 1 if run_campaign(args.seed, args.seconds) else 0


if __name__ == "__main__":
    raise SystemExit(main())
