"""Where ranks stood when none of them made a step, and which of them holds up the others.

Filled by the supervisor of a pod for its own ranks, and read by the operator over all pods of an attempt.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

STACKS = "stacks"
"""Entry of `ExitReport.details`: by rank, as `{"at": innermost frame, "waits": whether it waits for other ranks}`."""


def choose_culprit(stacks: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the rank that holds up the others; None where it cannot be told.

    That is a rank which does not wait in a collective while others do; else the one that stands where no other does.
    """
    working = [rank for rank, stack in stacks.items() if not stack.get("waits")]
    if working and len(working) < len(stacks):
        return min(working, key=_number)
    places = collections.Counter(str(stack.get("at")) for stack in stacks.values())
    alone = [rank for rank, stack in stacks.items() if places[str(stack.get("at"))] == 1]
    return alone[0] if len(alone) == 1 else None


def describe_stacks(stacks: Mapping[str, Mapping[str, Any]]) -> str:
    """Return in one line where the ranks stand, the culprit first."""
    culprit = choose_culprit(stacks)
    groups: dict[tuple[str, bool], list[str]] = {}
    for rank in sorted(stacks, key=lambda rank: (rank != culprit, _number(rank))):
        stack = stacks[rank]
        groups.setdefault((str(stack.get("at")), bool(stack.get("waits"))), []).append(rank)
    texts = []
    for (place, waits), ranks in groups.items():
        is_one = len(ranks) == 1
        who = f"rank {ranks[0]}" if is_one else f"ranks {_list(ranks)}"
        verb = ("waits" if is_one else "wait") + " for the others" if waits else "stands" if is_one else "stand"
        texts.append(f"{who} {verb} at {place}")
    return "; ".join(texts)


def _list(ranks: list[str]) -> str:
    return ", ".join(ranks) if len(ranks) <= 4 else f"{ranks[0]}, {ranks[1]} ... {ranks[-1]}"


def _number(rank: str) -> int:
    return int(rank) if rank.isdigit() else 0
