"""The form in which every benchmark reports: a table for people, JSON for tools.

A ratio stands only beside the baseline that was measured in the same run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "build" / "bench"


@dataclasses.dataclass(frozen=True)
class Result:
    """One figure, with what it is compared to."""

    metric: str
    value: float
    unit: str
    baseline: str = ""
    """What the baseline is; empty: the figure stands alone."""
    baseline_value: float | None = None

    @property
    def ratio(self) -> float | None:
        """Value over the baseline's value; None without one."""
        return self.value / self.baseline_value if self.baseline_value else None


def write_results(name: str, results: Sequence[Result], **facts: Any) -> pathlib.Path:
    """Print the results as a table, and write them with the commit and the machine; `facts` go in beside them."""
    report = {
        "name": name,
        "commit": read_commit(),
        "machine": describe_machine(),
        "results": [{**dataclasses.asdict(result), "ratio": result.ratio} for result in results],
        **facts,
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(format_table(results))
    print(f"written: {path.relative_to(REPOSITORY)}")
    return path


def format_table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| metric | value | unit | baseline | its value | ratio |", "|---|---:|---|---|---:|---:|"]
    for one in results:
        there = "" if one.baseline_value is None else f"{one.baseline_value:.4g}"
        ratio = "" if one.ratio is None else f"{one.ratio:.3g}"
        lines.append(f"| {one.metric} | {one.value:.4g} | {one.unit} | {one.baseline} | {there} | {ratio} |")
    return "\n".join(lines)


def read_commit() -> str:
    """Return the commit of the checkout, with `+` when files differ from it."""

    def ask(*arguments: str) -> str:
        return subprocess.run(
            ("git", *arguments), cwd=REPOSITORY, check=True, capture_output=True, text=True
        ).stdout.strip()

    return ask("rev-parse", "--short", "HEAD") + ("+" if ask("status", "--porcelain", "--untracked-files=no") else "")


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, cores and memory."""
    model = platform.machine()
    for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    kibibytes = int(pathlib.Path("/proc/meminfo").read_text(encoding="utf-8").split()[1])
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(kibibytes / 2**20, 1)}
