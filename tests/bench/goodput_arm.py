"""Real trainings on a CPU for the goodput benchmark: a rank is killed at given moments, and its supervisor restarts it.

Every step is seen in the trainer's own `metrics.jsonl`. Times are in seconds from the start of the training's process.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from tests.bench.goodput_replay import Costs
from tests.bench.training_process import StepLog, TrainingProcess, start_training
from tests.support import tiny_models
from tests.support.training_runs import Run, build_texts, write_data

SETTINGS = (
    "topology.processes_per_node=1",
    "topology.in_pod_restarts=1000",
    "training.gradient_accumulation_steps=8",
    "training.logging_steps=1",
    "training.max_steps=100000",
    "checkpoint.keep_latest=2",
)
POLL_SECONDS = 0.005
PATIENCE_SECONDS = 120.0
CALIBRATION_STEPS, CALIBRATION_EVERY, CALIBRATION_KILLS = 30, 3, 4


@dataclasses.dataclass(frozen=True)
class Step:
    """One step that was seen."""

    at: float
    number: int
    productive_seconds: float
    """The trainer's sum after it."""


class Life:
    """A training that runs, what was seen of it, and the kills that struck it."""

    def __init__(self, run: Run, every_steps: int) -> None:
        self._log = StepLog(run.root)
        self._run = run
        self._process: TrainingProcess = start_training(run, *SETTINGS, f"checkpoint.every_steps={every_steps}")
        self._began = time.monotonic()
        self.steps: list[Step] = []
        self.stalls: list[float] = []
        """How long training stood still for each save that was committed."""
        self.saves: list[float] = []
        """How long each took until it was committed."""
        self.kills: list[tuple[float, int]] = []
        """When each kill struck, and how many steps had been seen by then."""

    @property
    def now(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._began

    def watch_until(self, is_reached: Callable[[], bool]) -> None:
        """Note what happens until the condition holds. Raises AssertionError when the training ends or stands still."""
        since = self.now
        while not is_reached():
            entries = self._log.read_entries()
            for entry in entries:
                self._note(entry)
            since = self.now if entries else since
            if self._process.exit_code is not None or self.now - since > PATIENCE_SECONDS:
                tail = (self._run.root / "trainer.log").read_text()[-2000:]
                raise AssertionError(f"the training ended ({self._process.exit_code}) or stands still:\n{tail}")
            time.sleep(POLL_SECONDS)

    def _note(self, entry: dict[str, Any]) -> None:
        if "loss" in entry:
            self.steps.append(Step(self.now, entry["step"], entry["productive_seconds"]))
        elif "checkpoint_seconds" in entry:
            self.stalls.append(entry["checkpoint_seconds"])
            self.saves.append(entry["save_seconds"])

    def kill_rank(self) -> None:
        """Kill the rank, as soon as there is one."""
        found: list[int] = []

        def has_rank() -> bool:
            found[:] = self._process.list_ranks()
            return bool(found)

        self.watch_until(has_rank)
        os.kill(found[0], signal.SIGKILL)
        self.kills.append((self.now, len(self.steps)))

    def end(self) -> None:
        """Kill everything."""
        self._process.kill()

    def count_productive(self) -> float:
        """Return the trainer's sum for the weights of this moment."""
        if self.kills and self.kills[-1][1] == len(self.steps):
            # Cut during a restart: the newest checkpoint is what there is.
            newest = max(self._run.manifests(), default=0)
            sums = [step.productive_seconds for step in self.steps if step.number == newest]
            return sums[-1] if sums else 0.0
        return self.steps[-1].productive_seconds if self.steps else 0.0


class Workshop:
    """Makes workspaces for trainings of one tiny model."""

    def __init__(self, root: pathlib.Path) -> None:
        self._root = root
        self._data = write_data(root / "data")
        self._model = tiny_models.build_tiny_llama(root / "model", build_texts(), vocab_size=1000, hidden=256, layers=4)

    def make_run(self, name: str) -> Run:
        """Return a run on an empty workspace."""
        (self._root / name).mkdir()
        return Run(self._root / name, self._model, self._data)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a training that saves often was measured at."""

    costs: Costs
    """With the slowdown in the stall."""
    slowdown: float
    """How much longer the step beside a save takes than others."""
    mean_step: float
    """Of all steps, those beside a save included: what the trainer itself counts as productive."""
    num_restarts: int


def calibrate(workshop: Workshop) -> Calibration:
    """Measure steps and saves of an undisturbed training, then kills."""
    life = Life(workshop.make_run("calibration"), CALIBRATION_EVERY)
    try:
        life.watch_until(lambda: len(life.steps) >= CALIBRATION_STEPS)
        steps = list(life.steps)
        restarts = [_measure_restart(life) for _ in range(CALIBRATION_KILLS)]
    finally:
        life.end()
    beside, alone = split_steps(steps, CALIBRATION_EVERY)
    step = statistics.fmean(alone)
    slowdown = max(0.0, statistics.median(beside) - statistics.median(alone))
    costs = Costs(
        step=step,
        stall=statistics.fmean(life.stalls) + slowdown,
        save=max(statistics.fmean(life.saves), statistics.fmean(life.stalls) + slowdown),
        restart=statistics.fmean(restarts) - step,
        start=steps[0].at - steps[0].productive_seconds,
    )
    return Calibration(costs, slowdown, statistics.fmean(beside + alone), len(restarts))


def _measure_restart(life: Life) -> float:
    """Kill the rank one step after a resume, and return the time to the end of its next step."""
    seen = len(life.steps)
    life.watch_until(lambda: len(life.steps) > seen)
    life.kill_rank()
    at, count = life.kills[-1]
    life.watch_until(lambda: len(life.steps) > count)
    return life.steps[count].at - at


def split_steps(steps: Sequence[Step], every: int) -> tuple[list[float], list[float]]:
    """Return the durations of the steps right after a save's, and of the others; the first step warms up."""
    beside: list[float] = []
    alone: list[float] = []
    for before, step in itertools.pairwise(steps[1:]):
        chosen = beside if before.number % every == 0 else alone
        chosen.append(step.productive_seconds - before.productive_seconds)
    return beside, alone


@dataclasses.dataclass(frozen=True)
class Played:
    """How a real training under kills went."""

    every_steps: int
    productive_seconds: float
    wall_seconds: float
    kills: tuple[float, ...]
    """When the kills struck."""

    @property
    def goodput(self) -> float:
        """Productive over all time, by the trainer's own clock."""
        return self.productive_seconds / self.wall_seconds


def play(run: Run, every_steps: int, moments: Sequence[float], until: float) -> Played:
    """Train under kills at these moments, and cut it off at `until`."""
    life = Life(run, every_steps)
    try:
        for moment in moments:
            life.watch_until(lambda due=moment: life.now >= due)  # type: ignore[misc]
            life.kill_rank()
        life.watch_until(lambda: life.now >= until)
        wall = life.now
    finally:
        life.end()
    return Played(every_steps, life.count_productive(), wall, tuple(at for at, _ in life.kills))
