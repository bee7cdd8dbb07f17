"""`python -m tests.bench.duplicates`: memory and speed of the duplicate index, from a tenth of the rows to all of them.

The rows are fingerprints, each new but every tenth, which came before: the index's worst case is a new row. What a
fingerprint costs is measured beside it, on short rows.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from finetune_contract.run_config import QualityConfig
from finetune_trainer.data.duplicate_index import DuplicateIndex
from finetune_trainer.data.duplicates import choose_banding, fingerprint
from finetune_trainer.data.formats import Conversation, Turn
from tests.bench.results import FOLDER, Result, write_results

BATCH = 50_000


def main() -> int:
    """Fill an index, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--similarity", type=float, default=1.0)
    args = parser.parse_args()
    config = QualityConfig(duplicates="remove-row", similarity=args.similarity)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="duplicates-", dir=FOLDER) as folder:
        results = fill(Path(folder), config, args.rows)
    results.append(measure_fingerprints(config))
    name = "duplicates" if args.similarity >= 1 else "duplicates-near"
    write_results(name, results, rows=args.rows, similarity=args.similarity)
    return 0


def fill(folder: Path, config: QualityConfig, rows: int) -> list[Result]:
    """Add the rows to an index and measure resident memory after a tenth of them and after all."""
    size = choose_banding(config.similarity).size
    generator = np.random.Generator(np.random.PCG64(1))
    resident: list[float] = []
    found, seconds, repeated = 0, 0.0, b""
    with DuplicateIndex(folder, config) as index:
        for start in range(0, rows, BATCH):
            data = generator.bytes(size * BATCH)
            prints = [repeated if repeated and not n % 10 else data[n * size : (n + 1) * size] for n in range(BATCH)]
            begin = time.perf_counter()
            found += sum(index.find_or_add(each, start + n) is not None for n, each in enumerate(prints))
            seconds += time.perf_counter() - begin
            repeated = prints[1]
            if start + BATCH in (rows // 10, rows):
                index.commit()
                resident.append(read_resident_mebibytes())
        on_disk = sum(path.stat().st_blocks * 512 for path in folder.iterdir()) / 2**20
    assert found == (rows // BATCH - 1) * BATCH // 10
    return [
        Result("resident_growth", resident[-1] - resident[0], "MiB"),
        Result("resident_after_all_rows", resident[-1], "MiB"),
        Result("index_rows_per_second", rows / seconds, "rows/s"),
        Result("index_on_disk", on_disk, "MiB"),
    ]


def measure_fingerprints(config: QualityConfig) -> Result:
    """Measure fingerprints of rows of about 60 words."""
    rng = random.Random(1)
    words = [f"w{number}" for number in range(3000)]
    rows = [
        Conversation((Turn("user", "Tell me more.", "q"), Turn("assistant", " ".join(rng.choices(words, k=60)), "a")))
        for _ in range(5000)
    ]
    begin = time.perf_counter()
    for row in rows:
        fingerprint(row, config)
    return Result("fingerprints_per_second", len(rows) / (time.perf_counter() - begin), "rows/s")


def read_resident_mebibytes() -> float:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096 / 2**20


if __name__ == "__main__":
    sys.exit(main())
