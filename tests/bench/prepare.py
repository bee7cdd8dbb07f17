"""A data preparation end to end, beside a pipeline of `datasets.map` that keeps the same rows.

`make bench-prepare` generates ROWS rows (1,000,000 unless told otherwise), with texts as long as those of instruction
sets, and prepares them with `finetune-trainer prepare`: in legacy mode with a list as long as the recipe's, where both
sides have to keep the same rows or there is no result, and with its default rules. Each runs in a process of its own on
all cores; memory is the proportional set size of all its processes, sampled ten times a second. SHORT=10000000 prepares
so many short rows besides, and a tenth of them, to see whether memory grows.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from tests.bench.filter import make_long_list
from tests.bench.results import Result, write_results

SAMPLE_SECONDS = 0.1
REFUSED_SHARE = 0.12
"""Share of the rows that hold a phrase of the list, as in the recipe's data."""
MEAN_WORDS = 150
PHRASES = "phrases.txt"


@dataclasses.dataclass(frozen=True)
class Run:
    """What one program needed."""

    seconds: float
    peak_bytes: int
    cores: float
    """Processor time over wall time."""
    num_rows: int

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.num_rows / self.seconds

    @property
    def rate_per_core(self) -> float:
        """Rows a second of processor time: what other work on the machine does not touch."""
        return self.num_rows / (self.seconds * self.cores)


def write_rows(path: pathlib.Path, number: int, seed: int = 1) -> None:
    """Write alpaca rows with texts of log-normal lengths; nothing repeats but words and phrases."""
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    weights = [12, 9, 8, 8, 7, 7, 6, 6, 6, 4, 4, 3, 3, 2, 2, 2, 2, 2, 1, 1, 2, 1, 0.2, 0.1, 0.2, 0.1]
    words = ["".join(rng.choices(letters, weights, k=rng.randint(2, 9))) for _ in range(5_000)]
    phrases = [phrase for phrase in make_long_list() if len(phrase) > 12]
    pieces = [" ".join(rng.choices(words, k=12)).capitalize() + rng.choice([". ", "! ", ".\n"]) for _ in range(50_000)]
    with open(path, "w", encoding="utf-8") as file:
        for index in range(number):
            length = max(1, round(rng.lognormvariate(0, 0.7) * MEAN_WORDS / 12 / 1.28))
            output = "".join(rng.choices(pieces, k=length))
            if rng.random() < REFUSED_SHARE:
                output = f"{rng.choice(phrases)} {output}"
            given = rng.choice(pieces) if rng.random() < 0.4 else ""
            row = {
                "instruction": f"{index}: {rng.choice(pieces)}{rng.choice(pieces)}",
                "input": given,
                "output": output,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_short_rows(path: pathlib.Path, number: int) -> None:
    """Write rows of about a hundred bytes."""
    with open(path, "w", encoding="utf-8") as file:
        for index in range(number):
            row = {"instruction": f"What is {index} times {index}?", "output": f"It is {index * index}."}
            file.write(json.dumps(row) + "\n")


def measure(command: list[str], num_rows: int) -> Run:
    """Run a command to its end. Raises CalledProcessError with what it said."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        with _watching(process.pid) as peak:
            code = process.wait()
        seconds = time.monotonic() - begun
        if code:
            said.seek(0)
            raise subprocess.CalledProcessError(code, command, said.read()[-3000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(seconds, peak[0], busy / seconds, num_rows)


@contextlib.contextmanager
def _watching(session: int) -> Iterator[list[int]]:
    """Note the largest sum of the memory of all processes of a session."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], _read_session_bytes(session))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def _read_session_bytes(session: int) -> int:
    total = 0
    for entry in os.listdir("/proc"):
        # A process may end between two looks at it.
        with contextlib.suppress(OSError, ValueError, IndexError):
            if entry.isdigit() and os.getsid(int(entry)) == session:
                lines = pathlib.Path(f"/proc/{entry}/smaps_rollup").read_text(encoding="ascii").splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) << 10
    return total


def run_ours(source: pathlib.Path, folder: pathlib.Path, num_rows: int, *options: str) -> tuple[Run, set[int]]:
    """Prepare a file; return what it needed, and the numbers of the rows that were kept."""
    out = folder / "ours"
    command = [sys.executable, "-m", "finetune_trainer", "prepare", "--source", str(source), "--out", str(out)]
    run = measure([*command, *options], num_rows)
    with open(out / "removed.jsonl", "rb") as lines:
        removed = {json.loads(line)["index"] for line in lines}
    shutil.rmtree(out)
    return run, set(range(num_rows)) - removed


def run_baseline(source: pathlib.Path, folder: pathlib.Path, num_rows: int, style: str) -> tuple[Run, set[int]]:
    """Prepare a file with `datasets`; return the same."""
    out, cache, cores = folder / "baseline.jsonl", folder / "cache", str(len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "tests.bench.prepare_baseline", str(folder / PHRASES)]
    run = measure([*command, str(source), str(out), str(cache), style, cores], num_rows)
    with open(out, "rb") as lines:
        kept = {int(json.loads(line)["messages"][0]["content"].partition(":")[0]) for line in lines}
    out.unlink()
    shutil.rmtree(cache)
    return run, kept


def compare(number: int, folder: pathlib.Path) -> list[Result]:
    """Measure both sides on the same rows."""
    source = folder / "rows.jsonl"
    write_rows(source, number)
    print(f"{number} rows, {source.stat().st_size >> 20} MiB", flush=True)
    (folder / PHRASES).write_text("\n".join(make_long_list()), encoding="utf-8")
    legacy, kept = run_ours(source, folder, number, "--rules", "legacy", "--phrases", str(folder / PHRASES))
    print(f"ours, legacy: {legacy}", flush=True)
    default, _ = run_ours(source, folder, number)
    print(f"ours, default rules: {default}", flush=True)
    by_row, kept_by_row = run_baseline(source, folder, number, "rows")
    print(f"datasets, by row: {by_row}", flush=True)
    batched, kept_batched = run_baseline(source, folder, number, "batched")
    print(f"datasets, batched: {batched}", flush=True)
    source.unlink()
    if not kept == kept_by_row == kept_batched:
        raise SystemExit(f"different rows are kept: {len(kept)}, {len(kept_by_row)}, {len(kept_batched)}")
    name = "datasets.filter and .map"
    return [
        Result("rows_per_second", legacy.rate, "rows/s", name, by_row.rate),
        Result("rows_per_processor_second", legacy.rate_per_core, "rows/s", name, by_row.rate_per_core),
        Result("rows_per_second_against_batched", legacy.rate, "rows/s", f"{name}, batched", batched.rate),
        Result("rows_per_second_default_rules", default.rate, "rows/s", name, by_row.rate),
        Result("peak_memory_bytes", legacy.peak_bytes, "bytes", name, by_row.peak_bytes),
        Result("cores_used", legacy.cores, "cores", name, by_row.cores),
    ]


def measure_memory(numbers: list[int], folder: pathlib.Path) -> list[Result]:
    """Prepare files of more and more short rows; return the growth of memory from the first to the last."""
    source, peaks = folder / "short.jsonl", []
    for number in numbers:
        write_short_rows(source, number)
        run, _ = run_ours(source, folder, number, "--quality", "duplicates")
        print(f"{number} short rows, with duplicates: {run}", flush=True)
        peaks.append(run.peak_bytes)
    source.unlink()
    metric = f"peak_memory_bytes_of_{numbers[-1]}_short_rows"
    return [Result(metric, peaks[-1], "bytes", f"{numbers[0]} short rows", peaks[0])]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=int(os.environ.get("ROWS") or 1_000_000))
    parser.add_argument("--short", type=int, default=int(os.environ.get("SHORT") or 0))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as folder:
        results = compare(args.rows, pathlib.Path(folder))
        if args.short:
            results += measure_memory([args.short // 10, args.short], pathlib.Path(folder))
    write_results("prepare", results, rows=args.rows)


if __name__ == "__main__":
    main()
