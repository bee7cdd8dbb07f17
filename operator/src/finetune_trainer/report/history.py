"""How a training went, from its log of metrics: each step once, what restarts threw away told apart. No torch.

The log only ever grows. Whenever ranks start they write the step at which they go on, so everything that stands before
that line and lies beyond that step was lost. A writer of an older attempt, on a node that was given up, may add lines
among those of a newer one; they count as lost, too.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterable, Iterator, Mapping

START = "start"
"""The `event` of the line that ranks write when they begin."""
_VALUES = ("loss", "eval_loss", "learning_rate", "tokens_per_second")


@dataclasses.dataclass
class Point:
    """One logged step."""

    step: int
    at: float
    """Seconds since 1970."""
    values: Mapping[str, float]
    """What was logged of loss, eval_loss, learning_rate and tokens_per_second."""
    life: int = 0
    """Which life of the ranks logged it, from 0."""
    is_lost: bool = False
    """A restart threw the step away; it was done again."""


@dataclasses.dataclass
class Life:
    """One life of the ranks, from their start to their last line."""

    attempt: int
    first_step: int
    """Step that they went on from."""
    started_at: float
    ended_at: float
    last_step: int
    steps_lost: int = 0
    """Steps of it that the next life did again."""


@dataclasses.dataclass(frozen=True)
class History:
    """A training so far."""

    points: tuple[Point, ...] = ()
    """In the order in which they were logged."""
    lives: tuple[Life, ...] = ()
    total_steps: int = 0
    productive_seconds: float | None = None
    """Time in the steps that led to the present weights; None: the log does not say."""

    @property
    def elapsed_seconds(self) -> float:
        """Time of all lives, without the time between them."""
        return sum(life.ended_at - life.started_at for life in self.lives)

    def list_values(self, name: str) -> list[tuple[int, float]]:
        """Return steps and finite values of one metric, of the steps that were kept."""
        return _list_finite((point for point in self.points if not point.is_lost), name)

    def list_lost(self, name: str) -> list[list[tuple[int, float]]]:
        """Return the same of the steps that were lost, a list for each life that lost some."""
        lost = [point for point in self.points if point.is_lost]
        lives = dict.fromkeys(point.life for point in lost)
        stretches = (_list_finite((point for point in lost if point.life == life), name) for life in lives)
        return [stretch for stretch in stretches if stretch]


def _list_finite(points: Iterable[Point], name: str) -> list[tuple[int, float]]:
    found = ((point.step, point.values[name]) for point in points if name in point.values)
    return [(step, value) for step, value in found if math.isfinite(value)]


def read_history(path: pathlib.Path) -> History:
    """Read a log; lines that are not whole are left out, and a missing file is an empty history."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return replay(_parse(file))
    except FileNotFoundError:
        return History()


def _parse(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            entry = json.loads(line)
            entry["at"] = dt.datetime.fromisoformat(entry["at"]).timestamp()
            entry["step"] = int(entry["step"])
        except (ValueError, TypeError, KeyError):
            continue
        yield entry


def replay(entries: Iterable[Mapping[str, Any]]) -> History:
    """Return what the lines of a log say together."""
    points: list[Point] = []
    lives: list[Life] = []
    total, productive = 0, None
    for entry in entries:
        step, attempt = entry["step"], int(entry.get("attempt") or 0)
        is_stale = bool(lives) and attempt < lives[-1].attempt
        if not is_stale and (entry.get("event") == START or not lives or attempt > lives[-1].attempt):
            # The line of a start may be lost with its node: the ranks then went on before their first line.
            first = step if entry.get("event") == START else step - 1
            _rewind(points, lives, first)
            lives.append(Life(attempt, first, entry["at"], entry["at"], first))
        total = int(entry.get("total_steps") or total)
        if not is_stale:
            lives[-1].ended_at, lives[-1].last_step = entry["at"], max(lives[-1].last_step, step)
            productive = entry.get("productive_seconds", productive)
        values = {name: float(entry[name]) for name in _VALUES if isinstance(entry.get(name), int | float)}
        if values:
            points.append(Point(step, entry["at"], values, len(lives) - 1, is_stale))
    return History(tuple(points), tuple(lives), total, productive)


def _rewind(points: list[Point], lives: list[Life], step: int) -> None:
    """Mark everything beyond a step as lost: the ranks go on from there."""
    for point in points:
        point.is_lost = point.is_lost or point.step > step
    if lives:
        lives[-1].steps_lost = max(0, lives[-1].last_step - step)
