"""Weight diffs in stretches, beside loading both models whole and subtracting: `make bench-weight-diff`.

The models are bfloat16 in eight shards. The tuned one differs as fine-tuning at a learning rate of 2e-5 leaves it: each
weight moved by about a thousandth of its size, which many do not show in 8 bits of mantissa. Each arm is a process of
its own that makes the diff once and recovers the model once; both models are in the page cache before either starts.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from finetune_trainer.weight_diff.record import read_record
from tests.bench.results import Result, write_results

NUM_SHARDS = 8
_WIDTH = 4096

_LOAD_EVERYTHING = """
import pathlib, sys
from safetensors.torch import load_file, save_file
import torch
action, first, second, out = sys.argv[1], *map(pathlib.Path, sys.argv[2:])
def load(folder):
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
one, other = load(first), load(second)
sign = 1 if action == "recover" else -1
result = {
    name: torch.add(value.view(torch.int16), one[name].view(torch.int16), alpha=sign).view(value.dtype)
    for name, value in other.items()
}
out.mkdir()
for path in sorted(second.glob("*.safetensors")):
    names = load_file(path).keys()
    save_file({name: result[name] for name in names}, out / path.name, metadata={"format": "pt"})
"""
"""Both models whole in memory, the integer difference of all tensors, written in shards: no digests, no checks."""


def main() -> int:
    """Run both arms and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0, help="size of each model")
    parser.add_argument("--write", metavar="DIR", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write is not None:
        _write_models(options.write, options.gib)
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-weight-diff-") as name:
        root = pathlib.Path(name)
        # A process of its own: what it holds would count as the arms' memory, which are forked from this one.
        writer = (sys.executable, "-m", "tests.bench.weight_diff", "--write", name, "--gib", str(options.gib))
        subprocess.run(writer, check=True)
        base, tuned = root / "base", root / "tuned"
        theirs = _measure_baseline(root, base, tuned)
        ours = _measure_ours(root, base, tuned)
        record = read_record(root / "diff")
        packed = sum(facts.size for facts in record.files.values())
        whole = sum(path.stat().st_size for path in tuned.glob("*.safetensors"))
    results = [
        Result("peak_memory_bytes", _peak(ours), "bytes", "load everything", _peak(theirs)),
        *(
            Result(
                f"{action}_{name}", getattr(ours[action], name), "s", "load everything", getattr(theirs[action], name)
            )
            for action in ("make", "recover")
            for name in ("seconds", "processor_seconds")
        ),
        Result("diff_bytes", packed, "bytes", "the tuned weights", whole),
    ]
    write_results("weight-diff", results)
    return 0


def _write_models(root: pathlib.Path, gib: float) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(5)
    rows = int(gib * 2**30 / NUM_SHARDS / 2 / _WIDTH)
    folders = root / "base", root / "tuned"
    for folder in folders:
        folder.mkdir()
    for shard in range(NUM_SHARDS):
        base, tuned = {}, {}
        for part in range(4):
            weights = torch.randn(rows // 4, _WIDTH, generator=generator) * 0.02
            moved = weights + torch.randn(weights.shape, generator=generator) * 2e-5
            key = f"layers.{4 * shard + part}.weight"
            base[key], tuned[key] = weights.bfloat16(), moved.bfloat16()
        for folder, tensors in zip(folders, (base, tuned), strict=True):
            save_file(tensors, folder / f"model-{shard + 1:05d}-of-{NUM_SHARDS:05d}.safetensors", {"format": "pt"})


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one process took."""

    seconds: float
    """Until all was on the disk."""
    processor_seconds: float
    peak_bytes: int
    """Highest resident memory."""


Costs = dict[str, Cost]
"""By `make` and `recover`."""


def _peak(costs: Costs) -> int:
    return max(cost.peak_bytes for cost in costs.values())


def _measure_ours(root: pathlib.Path, base: pathlib.Path, tuned: pathlib.Path) -> Costs:
    program = (sys.executable, "-m", "finetune_trainer", "weight-diff")
    made = _time(*program, "make", "--base", base, "--tuned", tuned, "--out", root / "diff")
    recovered = root / "recovered"
    back = _time(*program, "recover", "--base", base, "--diff", root / "diff", "--out", recovered)
    _require_equal(tuned, recovered)
    return {"make": made, "recover": back}


def _measure_baseline(root: pathlib.Path, base: pathlib.Path, tuned: pathlib.Path) -> Costs:
    program = (sys.executable, "-c", _LOAD_EVERYTHING)
    diff, recovered = root / "whole-diff", root / "whole-recovered"
    made = _time(*program, "make", base, tuned, diff)
    back = _time(*program, "recover", base, diff, recovered)
    _require_equal(tuned, recovered)
    return {"make": made, "recover": back}


def _time(*command: object) -> Cost:
    """Run a process and return what it took."""
    started = time.monotonic()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if status:
        raise SystemExit(f"failed: {command}")
    seconds = time.monotonic() - started
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def _require_equal(tuned: pathlib.Path, recovered: pathlib.Path) -> None:
    for path in tuned.glob("*.safetensors"):
        if not filecmp.cmp(path, recovered / path.name, shallow=False):
            raise SystemExit(f"{path.name} did not come back to the byte")


if __name__ == "__main__":
    sys.exit(main())
