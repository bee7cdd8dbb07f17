"""A training under kills, replayed from measured times: how much of its time was productive. Pure.

Time runs from the start of the first process. A step counts once it is done; a kill takes back every step after the
newest committed checkpoint; a kill during a restart begins the restart again.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterable, Iterator


@dataclasses.dataclass(frozen=True)
class Costs:
    """What things take, in seconds."""

    step: float
    """One optimizer step."""
    stall: float
    """How long training stands still for a save."""
    save: float
    """From the start of a save until it is committed; at least the stall."""
    restart: float
    """From a kill to the beginning of the next step."""
    start: float
    """From the start of the first process to the beginning of its first step."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a replayed training went."""

    productive_seconds: float
    """The steps that survived."""
    wall_seconds: float
    num_kills: int
    steps_lost: int

    @property
    def goodput(self) -> float:
        """Productive over all time, 0 to 1."""
        return self.productive_seconds / self.wall_seconds


def draw_gaps(seed: int, mean_seconds: float) -> Iterator[float]:
    """Return times from one kill to the next, exponentially distributed."""
    source = random.Random(seed)
    return (source.expovariate(1 / mean_seconds) for _ in itertools.count())


def choose_interval(costs: Costs, mean_gap_seconds: float) -> int:
    """Return the steps between saves by Young's formula: the square root of 2 x stall x mean time between kills."""
    return max(1, round(math.sqrt(2 * costs.stall * mean_gap_seconds) / costs.step))


def replay(costs: Costs, total_steps: int, every_steps: int, gaps: Iterable[float], until: float = math.inf) -> Outcome:
    """Play a training to its end, which is committed, or to the moment `until`. No more gaps: no more kills."""
    remaining = iter(gaps)
    clock, committed, num_kills, lost = 0.0, 0, 0, 0
    kill_at = next(remaining, math.inf)
    begin = costs.start
    while True:
        life = _live(costs, (committed, total_steps, every_steps), begin, min(kill_at, until))
        if life.ended_at is not None or kill_at >= until:
            wall = until if life.ended_at is None else life.ended_at
            return Outcome(life.step * costs.step, wall, num_kills, lost)
        lost += life.step - life.committed
        committed, num_kills, clock = life.committed, num_kills + 1, kill_at
        begin = clock + costs.restart
        kill_at = clock + next(remaining, math.inf)


@dataclasses.dataclass(frozen=True)
class _Life:
    step: int
    committed: int
    ended_at: float | None
    """When the end of training was committed; None: it was cut off before."""


def _live(costs: Costs, course: tuple[int, int, int], begin: float, cut: float) -> _Life:
    """Make steps from `begin` until the end of training or the cut. `course`: first, last, and steps between saves."""
    committed, total, every = course
    step, clock = committed, begin
    pending: tuple[float, int] | None = None
    while step < total and clock + costs.step <= cut:
        clock += costs.step
        step += 1
        if pending is not None and pending[0] <= clock:
            committed, pending = pending[1], None
        if step % every == 0 or step == total:
            if pending is not None:
                # At most one save is in flight: the next waits for its commit.
                clock = max(clock, pending[0])
            if clock > cut:
                break
            committed = pending[1] if pending is not None else committed
            pending = (clock + costs.save, step)
            clock += costs.stall
    if pending is not None and pending[0] <= cut:
        committed = pending[1]
        if committed == total:
            return _Life(step, committed, pending[0])
    return _Life(step, committed, None)


@dataclasses.dataclass(frozen=True)
class Campaign:
    """Many replays of one training."""

    goodput: float
    """Productive over all time, of all replays together."""
    worst: float
    """The fifth percentile of the single replays."""
    num_kills: int


def replay_many(costs: Costs, course: tuple[int, int], mean_gap_seconds: float, seeds: Iterable[int]) -> Campaign:
    """Replay a training, `course` being its steps and the steps between saves, under as many histories of kills."""
    outcomes = [replay(costs, *course, draw_gaps(seed, mean_gap_seconds)) for seed in seeds]
    single = sorted(outcome.goodput for outcome in outcomes)
    return Campaign(
        sum(outcome.productive_seconds for outcome in outcomes) / sum(outcome.wall_seconds for outcome in outcomes),
        single[len(single) // 20],
        sum(outcome.num_kills for outcome in outcomes),
    )
