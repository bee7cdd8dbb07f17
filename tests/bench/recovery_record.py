"""The file of a recovery campaign: a line per fault, a line per run; and the sums over it."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import pathlib
from typing import Any

OURS, STOCK, ENGINE = "ours", "stock", "engine"
"""The arms: a training by us, one by the stock Trainer, and our save engine alone."""


@dataclasses.dataclass(frozen=True)
class Sums:
    """What the faults of one kind in one arm came to."""

    faults: int
    faults_inside_a_save: int
    faults_of_fresh_processes: int
    faults_resumed: int
    """Faults after which training went on by itself."""
    lost_checkpoints: int
    """Faults after which a complete checkpoint was damaged or passed over."""
    lost_intervals_max: float
    lost_intervals_mean: float
    runs: int
    diverged_runs: int
    unfinished_runs: int
    """Runs that never came to their end, whatever was done."""
    helping_hands: int

    @property
    def resumed_share(self) -> float:
        """Share of the faults after which training went on by itself."""
        return self.faults_resumed / self.faults if self.faults else 0.0

    @property
    def has_losses(self) -> bool:
        """Whether anything was lost that must not be."""
        return self.faults_resumed < self.faults or bool(
            self.lost_checkpoints or self.diverged_runs or self.unfinished_runs
        )


class Record:
    """The file of one campaign, which goes on where it stopped."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        whole, run = b"", b""
        for line in path.read_bytes().splitlines(keepends=True):
            run += line
            if b'"end": ' in line and line.endswith(b"}\n"):
                whole, run = whole + run, b""
        # What a kill has cut short is not built upon: that run is played again.
        if len(whole) < path.stat().st_size:
            path.write_bytes(whole)
        self._lines: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]

    def add_run(self, arm: str, kind: str, number: int, faults: list[dict[str, Any]], **facts: Any) -> None:
        """Append the faults of a run and its end; all of it at once, so that a run is there whole or not at all."""
        run = {"arm": arm, "kind": kind, "run": number}
        lines = [{**run, "fault": fault} for fault in faults] + [{**run, "end": facts}]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._lines += lines

    def choose_run(self, arm: str, kind: str) -> int:
        """Return the number of the first run of a kind that is not done."""
        done = {line["run"] for line in self._lines if (line["arm"], line["kind"]) == (arm, kind)}
        return next(number for number in itertools.count() if number not in done)

    def count_faults(self, arm: str, kind: str) -> int:
        """Return how many faults of a kind are done."""
        return len(self._list(arm, kind, "fault"))

    def list_errors(self, arm: str) -> list[str]:
        """Return what was said where training did not go on by itself."""
        faults = [fault for kind in ("kills", "disks") for fault in self._list(arm, kind, "fault")]
        return [fault.get("error", "") for fault in faults if fault["has_resumed"] is False]

    def sum_up(self, arm: str, kind: str) -> Sums:
        """Return the sums over the faults of a kind in an arm."""
        faults, ends = self._list(arm, kind, "fault"), self._list(arm, kind, "end")
        lost = [fault["lost_intervals"] for fault in faults]
        return Sums(
            faults=len(faults),
            faults_inside_a_save=sum(fault["was_inside"] for fault in faults),
            faults_of_fresh_processes=sum(fault["fault"]["is_fresh"] for fault in faults),
            faults_resumed=sum(bool(fault["has_resumed"]) for fault in faults),
            lost_checkpoints=sum(fault["has_lost_checkpoint"] for fault in faults),
            lost_intervals_max=max(lost, default=0.0),
            lost_intervals_mean=sum(lost) / len(lost) if lost else 0.0,
            runs=len(ends),
            diverged_runs=sum(end["is_finished"] and end["has_diverged"] for end in ends),
            unfinished_runs=sum(not end["is_finished"] for end in ends),
            helping_hands=sum(end["num_hands"] for end in ends),
        )

    def list_struck(self, arm: str) -> dict[str, int]:
        """Return how often each kind of process was killed."""
        return dict(sorted(collections.Counter(fault["struck"] for fault in self._list(arm, "kills", "fault")).items()))

    def _list(self, arm: str, kind: str, part: str) -> list[dict[str, Any]]:
        wanted = (line for line in self._lines if line["arm"] == arm and line["kind"] == kind)
        return [line[part] for line in wanted if part in line]
