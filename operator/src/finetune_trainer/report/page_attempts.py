"""The attempts of a training on a timeline and in a table, for the run report's page. Pure."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

from finetune_trainer.data.page_parts import build_section, build_table
from finetune_trainer.data.plots import escape
from finetune_trainer.report.charts import Bar, choose_time_unit, draw_timeline
from finetune_trainer.report.work import is_good_end

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def build_attempts(report: Mapping[str, Any]) -> str:
    """Return the section; empty where no attempt is known."""
    attempts = report["attempts"]
    if not attempts:
        return ""
    bars = _list_bars(attempts)
    timeline = ""
    if bars:
        lost = any(bar.lost for bar in bars)
        ends = any(bar.marks or not bar.is_good for bar in bars)
        keys = '<span><i class="kept"></i>with training pods</span>'
        keys += '<span><i class="removed"></i>lost to a restart</span>' if lost else ""
        keys += '<span><i class="bad"></i>restart</span>' if ends else ""
        plot = draw_timeline(bars, "Attempts over time")
        timeline = f'<p class="legend">{keys}</p><figure class="wide timeline">{plot}</figure>'
    reasons = report["work"].get("restartsByReason") or {}
    counted = ", ".join(f"{name} {number}" for name, number in sorted(reasons.items()))
    note = f'<p class="note">Restarts by reason: {escape(counted)}.</p>' if counted else ""
    return build_section("Attempts and restarts", note, timeline, _build_table(attempts))


def _list_bars(attempts: Sequence[Mapping[str, Any]]) -> list[Bar]:
    timed = [one for one in attempts if one["startTime"] and one["endTime"]]
    if not timed:
        return []
    zero = min(_seconds(one["startTime"]) for one in timed)
    bars = []
    for one in timed:
        start, end = _seconds(one["startTime"]) - zero, _seconds(one["endTime"]) - zero
        bars.append(
            Bar(
                label=f"Attempt {one['number']}",
                start=start,
                end=end,
                lost=min(one["secondsLost"] or 0.0, end - start),
                marks=[_seconds(time) - zero for time in one["restartTimes"]],
                note=_describe(one),
                is_good=is_good_end(one, is_last=one is attempts[-1]),
            )
        )
    return bars


def _describe(one: Mapping[str, Any]) -> str:
    parts = [one["reason"]] if one["reason"] else []
    parts.append(f"steps {one['resumedFromStep']:,} to {one['reachedStep']:,}")
    if one["stepsLost"]:
        parts.append(f"{one['stepsLost']:,} lost")
    if one["inPodRestarts"]:
        parts.append(f"restarts inside the pod: {one['inPodRestarts']:,}")
    return ", ".join(parts)


def _build_table(attempts: Sequence[Mapping[str, Any]]) -> str:
    names = ("Attempt", "From", "To", "Steps", "Lost", "In the pod", "Ended with", "Nodes")
    lines = [
        (
            f"{one['number']}",
            _show_time(one["startTime"]),
            _show_time(one["endTime"]),
            f"{one['resumedFromStep']:,} to {one['reachedStep']:,}",
            f"{one['stepsLost']:,}",
            f"{one['inPodRestarts']:,}",
            one["reason"] or "not known",
            ", ".join(one["nodes"]),
        )
        for one in attempts
    ]
    return build_table(names, lines, numeric=(0, 3, 4, 5))


def _show_time(text: str | None) -> str:
    return text.replace("T", " ").replace("Z", "") if text else ""


def _seconds(text: str) -> float:
    return dt.datetime.fromisoformat(text).timestamp()


def format_seconds(seconds: float) -> str:
    """Return a time as people say it, such as 2.5 hours."""
    size, unit = choose_time_unit(seconds)
    return f"{seconds / size:.3g} {unit}"
