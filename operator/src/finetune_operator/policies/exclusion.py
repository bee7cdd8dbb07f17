"""Which nodes a job avoids, and for how long. Called by `attempts`. Pure.

A node may be the only one left: at most a few are avoided at once, the oldest drops out for a newer one, each is tried
again after a day, and earlier when the next attempt fits nowhere.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from finetune_operator.record import Exclusion, to_text, to_time

MAX_EXCLUDED = 4
"""Nodes that one job avoids at once."""
EXCLUDED_HOURS = 24


def exclude_node(
    exclusions: Sequence[Exclusion], node: str, reason: str, now: datetime.datetime
) -> tuple[Exclusion, ...]:
    """Return the exclusions with one more, which is the newest; the oldest drop out."""
    until = to_text(now + datetime.timedelta(hours=EXCLUDED_HOURS))
    others = tuple(each for each in list_current(exclusions, now) if each.node != node)
    return (*others, Exclusion(node, reason, until))[-MAX_EXCLUDED:]


def list_current(exclusions: Sequence[Exclusion], now: datetime.datetime) -> tuple[Exclusion, ...]:
    """Return the exclusions whose time is not over, the oldest first."""
    return tuple(each for each in exclusions if (until := to_time(each.until)) is not None and until > now)
