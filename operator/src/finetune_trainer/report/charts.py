"""Curves over steps and attempts over time, as inline SVG without scripts. Pure; colours come from the page's classes.

What a pointer rests on is told by the `<title>` of the strip below it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from finetune_trainer.data.plots import escape, shorten, wrap_svg

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Points = Sequence[Sequence[float]]
    """Pairs of x and y, by x."""

_WIDTH, _HEIGHT = 560.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 14.0, 8.0, 40.0
_STRIPS = 100
"""Places of one curve that tell their value."""
_MAX_TICKS, _MAX_X_TICKS = 6, 9

_WIDE = 1120.0
_BAR_LEFT, _BAR_RIGHT, _ROW = 96.0, 24.0, 34.0


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a plot."""

    kind: str
    """Its class: `line`, `line lost` or `dots`."""
    points: Points


@dataclasses.dataclass(frozen=True)
class Bar:
    """One attempt on the timeline; times in seconds since the first began."""

    label: str
    start: float
    end: float
    lost: float
    """Seconds at its end that were thrown away."""
    marks: Sequence[float]
    """When its ranks were started again."""
    note: str
    """What is said beside it."""
    is_good: bool


def draw_curves(curves: Sequence[Curve], name: str, unit: str, *, from_zero: bool = False) -> str:
    """Draw curves over steps in one plot; the one of kind `line` tells its values."""
    xs = [point[0] for curve in curves for point in curve.points]
    ys = [point[1] for curve in curves for point in curve.points]
    y_ticks = choose_ticks(0.0 if from_zero else min(ys), max(ys))
    # Where a log begins late, the steps before it would be an empty stretch.
    low, high = (0.0 if min(xs) < max(xs) / 4 else min(xs)), max(xs)
    x_ticks = [tick for tick in choose_ticks(low, high, _MAX_X_TICKS) if tick == int(tick)]
    place_x = _scale(low, high, _LEFT, _WIDTH - _RIGHT)
    place_y = _scale(y_ticks[0], y_ticks[-1], _TOP + _HEIGHT, _TOP)
    base = _TOP + _HEIGHT
    parts = [_draw_y_tick(tick, place_y(tick)) for tick in y_ticks]
    parts += [_draw_x_tick(f"{tick:,.0f}", place_x(tick), base) for tick in x_ticks if low <= tick <= high]
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{base}" x2="{_WIDTH - _RIGHT}" y2="{base}"/>')
    for curve in curves:
        places = [(place_x(point[0]), place_y(point[1])) for point in curve.points]
        parts.append(_draw_dots(places) if curve.kind == "dots" else _draw_line(curve.kind, places))
    told = next(curve for curve in curves if curve.kind == "line")
    parts += _draw_strips(told.points, place_x, unit)
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="quiet" x="{middle}" y="{base + 34}" text-anchor="middle">step</text>')
    return wrap_svg(base + _BOTTOM, name, parts, _WIDTH)


def draw_timeline(bars: Sequence[Bar], name: str) -> str:
    """Draw a bar for each attempt along one axis of time."""
    end = max(1.0, *(bar.end for bar in bars))
    size, unit = choose_time_unit(end)
    place = _scale(0.0, end, _BAR_LEFT, _WIDE - _BAR_RIGHT)
    base = _TOP + 2 * _ROW * len(bars) * 0.75
    parts = []
    for tick in choose_ticks(0.0, end / size, _MAX_X_TICKS):
        if tick * size <= end:
            x = place(tick * size)
            parts.append(f'<line class="grid" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{base:.1f}"/>')
            parts.append(_draw_x_tick(f"{tick:g}", x, base))
    for index, bar in enumerate(bars):
        parts.append(_draw_bar(bar, _TOP + index * _ROW * 1.5, place))
    parts.append(f'<line class="axis" x1="{_BAR_LEFT}" y1="{base:.1f}" x2="{_WIDE - _BAR_RIGHT}" y2="{base:.1f}"/>')
    middle = (_BAR_LEFT + _WIDE - _BAR_RIGHT) / 2
    about = f"{unit} since the first training pod started"
    parts.append(f'<text class="quiet" x="{middle}" y="{base + 36:.1f}" text-anchor="middle">{about}</text>')
    return wrap_svg(base + _BOTTOM + 2, name, parts, _WIDE)


def _draw_bar(bar: Bar, top: float, place: Callable[[float], float]) -> str:
    left, right = place(bar.start), max(place(bar.end), place(bar.start) + 2)
    kept = max(left, place(max(bar.start, bar.end - bar.lost)))
    title = f"<title>{escape(bar.label)}: {escape(bar.note)}</title>"
    height = _ROW - 14
    parts = [
        f'<text x="{_BAR_LEFT - 10}" y="{top + 15:.1f}" text-anchor="end">{escape(bar.label)}</text>',
        f'<rect class="kept" x="{left:.1f}" y="{top:.1f}" width="{kept - left:.1f}" height="{height}" rx="2"/>',
        f'<rect class="removed" x="{kept:.1f}" y="{top:.1f}" width="{right - kept:.1f}" height="{height}" rx="2"/>',
    ]
    parts += [
        f'<rect class="bad" x="{place(mark) - 1.5:.1f}" y="{top - 3:.1f}" width="3" height="{height + 6}"/>'
        for mark in bar.marks
    ]
    if not bar.is_good:
        parts.append(f'<rect class="bad" x="{right - 1.5:.1f}" y="{top - 3:.1f}" width="3" height="{height + 6}"/>')
    # Below the bar, and to the side where there is room.
    anchor, x = ("start", left) if left < (_WIDE + _BAR_LEFT) / 2 else ("end", right)
    room = int((_WIDE - _BAR_LEFT) / 2 / 6.6)
    note = escape(shorten(bar.note, room))
    parts.append(f'<text class="quiet" x="{x:.1f}" y="{top + height + 15:.1f}" text-anchor="{anchor}">{note}</text>')
    return f"<g>{title}{''.join(parts)}</g>"


def choose_time_unit(seconds: float) -> tuple[float, str]:
    """Return the unit in which a time reads well: its seconds and its name."""
    for size, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 3 * size:
            return size, name
    return 1.0, "seconds"


def choose_ticks(low: float, high: float, most: int = _MAX_TICKS) -> list[float]:
    """Return round numbers, about `most` of them, the first at most `low` and the last at least `high`."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / most))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10, 20) if span / (step * factor) <= most - 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 15) for index in range(first, max(last, first + 1) + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low or 1.0
    return lambda value: start + (end - start) * (value - low) / span


def _draw_line(kind: str, places: Sequence[tuple[float, float]]) -> str:
    path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in places)
    # A single point has no line.
    dot = (
        f'<circle class="{kind} dot" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="2"/>'
        if len(places) == 1
        else ""
    )
    return f'<path class="{kind}" d="{path}"/>{dot}'


def _draw_dots(places: Sequence[tuple[float, float]]) -> str:
    return "".join(f'<circle class="dots" cx="{x:.1f}" cy="{y:.1f}" r="3.4"/>' for x, y in places)


def _draw_strips(points: Points, place: Callable[[float], float], unit: str) -> list[str]:
    every = -(-len(points) // _STRIPS)
    shown = points[::every]
    width = (_WIDTH - _LEFT - _RIGHT) / max(len(shown), 1)
    return [
        f'<rect class="hover" x="{place(point[0]) - width / 2:.1f}" y="{_TOP}" width="{width:.1f}" height="{_HEIGHT}">'
        f"<title>step {point[0]:,.0f}: {escape(format_number(point[1]))} {escape(unit)}</title></rect>"
        for point in shown
    ]


def _draw_y_tick(value: float, y: float) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>'
        f'<text class="number" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{format_number(value)}</text>'
    )


def _draw_x_tick(text: str, x: float, base: float) -> str:
    return (
        f'<line class="axis" x1="{x:.1f}" y1="{base:.1f}" x2="{x:.1f}" y2="{base + 4:.1f}"/>'
        f'<text class="number" x="{x:.1f}" y="{base + 18:.1f}" text-anchor="middle">{text}</text>'
    )


def format_number(value: float) -> str:
    """Return a number with four digits, thousands told apart."""
    if value and abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
