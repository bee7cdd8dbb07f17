"""Plots as inline SVG for the report's page: bars and overlaid histograms. Pure; colours come from the page's classes.

Nothing here needs a script: what a pointer rests on is told by the `<title>` that every bar has.
"""

from __future__ import annotations

import html
import unicodedata
from typing import TYPE_CHECKING

from finetune_trainer.data.histogram import EDGES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_WIDTH = 560
_ROW = 24
_LABEL = 214
_NUMBER = 132
_CHARACTER = 7.5
"""Width of a usual character of the labels, in the plot's units."""
_WIDE = frozenset('mwMWGOQ<>=+#@%&~"\u2026')

_PLOT_HEIGHT = 170
_LEFT = 46
_RIGHT = 26
"""Room for half the label of the last tick."""
_BOTTOM = 40
_MAX_TICKS = 9


def escape(text: object) -> str:
    """Return a text that is safe in HTML, in an element or an attribute, whatever characters it holds."""
    clean = "".join(_show(character) for character in str(text))
    return html.escape(clean, quote=True)


def _show(character: str) -> str:
    """Return a visible sign for what HTML forbids or what would change the text around it."""
    if character in "\n\t":
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn") and code not in (0x200C, 0x200D):
        return f"\\u{code:04x}"
    return character


def shorten(text: str, width: int) -> str:
    """Return as much of a text's one line as fits into a number of usual characters."""
    line = " ".join(text.split())
    used = 0.0
    for index, character in enumerate(line):
        used += 2 if unicodedata.east_asian_width(character) in "WF" else 1.45 if character in _WIDE else 1
        if used > width:
            return line[: max(index - 1, 0)] + "…"
    return line


def format_share(part: int, total: int) -> str:
    """Return a share in percent; what is little is not shown as nothing."""
    if not total:
        return ""
    return "<0.1%" if 0 < part / total < 0.0005 else f"{part / total:.1%}"


def draw_bars(numbers: Mapping[str, int], total: int, kind: str, name: str) -> str:
    """Draw a horizontal bar of a kind per entry, with its number and its share of the total."""
    longest = max(numbers.values(), default=1)
    room = _WIDTH - _LABEL - _NUMBER
    parts = []
    for index, (label, number) in enumerate(numbers.items()):
        top = index * _ROW
        share = escape(format_share(number, total))
        width = max(room * number / longest, 1.0)
        parts.append(
            f"<g><title>{escape(label)}: {number:,} ({share})</title>"
            f'<text class="label" x="{_LABEL - 8}" y="{top + 16}" text-anchor="end">'
            f"{escape(shorten(label, int((_LABEL - 12) / _CHARACTER)))}</text>"
            f'<rect class="bar {kind}" x="{_LABEL}" y="{top + 4}" width="{width:.1f}" height="{_ROW - 8}" rx="2"/>'
            f'<text class="number" x="{_LABEL + width + 6:.1f}" y="{top + 16}">{number:,}'
            f'<tspan class="quiet" dx="6">{share}</tspan></text></g>'
        )
    return wrap_svg(_ROW * len(numbers), name, parts)


def draw_histograms(before: Mapping[int, int], after: Mapping[int, int], unit: str, name: str) -> str:
    """Draw two histograms over each other; they map the first length of a bin to its rows."""
    used = [EDGES.index(first) for first in (*before, *after)] or [0]
    low, high = max(min(used) - 1, 0), min(max(used) + 2, len(EDGES))
    step = (_WIDTH - _LEFT - _RIGHT) / (high - low)
    ticks = _choose_row_ticks(max((*before.values(), *after.values()), default=1))
    scale = _PLOT_HEIGHT / ticks[-1]
    base = 8 + _PLOT_HEIGHT
    parts = [_draw_row_tick(tick, base - tick * scale) for tick in ticks]
    outline = f"M{_LEFT},{base}"
    for position, index in enumerate(range(low, high)):
        x = _LEFT + position * step
        first = EDGES[index]
        old, new = before.get(first, 0), after.get(first, 0)
        last = EDGES[index + 1] - 1 if index + 1 < len(EDGES) else first
        span = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        parts.append(
            f"<g><title>{span} {escape(unit)}: {old:,} rows before, {new:,} after</title>"
            f"{_draw_bin('before', x, base, step, old * scale)}{_draw_bin('after', x, base, step, new * scale)}"
            f'<rect class="hover" x="{x:.1f}" y="8" width="{step:.1f}" height="{_PLOT_HEIGHT}"/></g>'
        )
        outline += f"V{base - old * scale:.1f}H{x + step:.1f}"
    parts.append(f'<path class="outline" d="{outline}V{base}"/>')
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{base}" x2="{_WIDTH - _RIGHT}" y2="{base}"/>')
    parts += [_draw_length_tick(EDGES[index], _LEFT + (index - low) * step, base) for index in _choose_ticks(low, high)]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="quiet" x="{middle}" y="{base + 34}" text-anchor="middle">{escape(unit)}</text>')
    return wrap_svg(base + _BOTTOM, name, parts)


def draw_fates(fates: Sequence[tuple[str, str, int]], name: str) -> str:
    """Draw one bar in which each (class, label, rows) has its share."""
    total = sum(rows for _, _, rows in fates) or 1
    width, x, parts = 2 * _WIDTH, 0.0, []
    for kind, label, rows in fates:
        part = width * rows / total
        title = f"<title>{escape(label)}: {rows:,} ({escape(format_share(rows, total))})</title>"
        parts.append(f'<rect class="{kind}" x="{x:.1f}" y="0" width="{part:.1f}" height="22">{title}</rect>')
        x += part
    return wrap_svg(22, name, parts, width)


def wrap_svg(height: float, name: str, parts: Sequence[str], width: float = _WIDTH) -> str:
    """Return the SVG of a plot with a name for those who do not see it."""
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}">{"".join(parts)}</svg>'


def _draw_bin(kind: str, x: float, base: float, step: float, height: float) -> str:
    if height <= 0:
        return ""
    # A bin with a single row among millions still shows.
    height = max(height, 0.8)
    return f'<rect class="{kind}" x="{x:.1f}" y="{base - height:.1f}" width="{step:.1f}" height="{height:.1f}"/>'


def _draw_row_tick(rows: int, y: float) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>'
        f'<text class="number" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_shorten_number(rows)}</text>'
    )


def _draw_length_tick(length: int, x: float, base: float) -> str:
    return (
        f'<line class="axis" x1="{x:.1f}" y1="{base}" x2="{x:.1f}" y2="{base + 4}"/>'
        f'<text class="number" x="{x:.1f}" y="{base + 17}" text-anchor="middle">{length:,}</text>'
    )


def _choose_row_ticks(most: int) -> list[int]:
    """Return 0 and up to five round numbers, the last of which is at least `most`."""
    step = 1
    while step * 5 < most:
        step = _next_round(step)
    return list(range(0, -(-most // step) * step + 1, step))


def _next_round(step: int) -> int:
    """Return the number after `step` in 1, 2, 5, 10, 20, 50 and so on."""
    return step * 5 // 2 if str(step).startswith("2") else step * 2


def _choose_ticks(low: int, high: int) -> list[int]:
    """Return bins that begin at powers of two, no more than fit beside each other."""
    powers = [index for index in range(low, high + 1) if index < len(EDGES) and EDGES[index].bit_count() <= 1]
    if low == 0 and high - low > 8:
        # Zero and one stand too close together to be read.
        powers = [index for index in powers if EDGES[index] != 1]
    every = -(-len(powers) // _MAX_TICKS)
    return powers[::every]


def _shorten_number(number: int) -> str:
    for size, sign in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= 10 * size or (number >= size and number % (size // 10) == 0):
            return f"{number / size:g}{sign}"
    return f"{number}"
