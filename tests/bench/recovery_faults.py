"""The schedule of a recovery campaign: which fault strikes when, all of it from the seed; pure."""

from __future__ import annotations

import dataclasses
import random

LAST_STEP = 24
EVERY_STEPS = 3

FAULTS_PER_RUN = 6
"""After that many a run is left to end, so that its weights can be compared."""

FRESH_EVERY = 5
"""Of so many of the first faults one strikes a training that was started fresh, imports and all."""

NUM_FRESH = 6
"""So many are dear enough: one costs as much as five others."""

VARIANTS = (
    ("training.zero_stage=3", "training.packing=true"),
    ("training.zero_stage=2", "training.packing=false"),
)
"""Settings that the runs take in turn."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault: what it strikes, and at what moment of the life of a training."""

    target: str
    """pod: everything at once; supervisor, rank, writer: one process; disk: the volume runs full."""
    moment: str
    """start: before the first step; step: training; save: a save has begun; last-byte: all of its files are written."""
    count: int
    """So many steps or saves of this life begin before the moment comes."""
    share: float
    """How far into the start, step or save, as a share of its usual time; of a disk, what is left of a checkpoint."""
    is_fresh: bool = False
    """Whether the life it strikes was started fresh instead of being forked."""
    rank: int = 0
    """The rank that is struck, or whose writer is."""


def plan_kills(seed: int, run: int, *, may_be_fresh: bool = True) -> list[Fault]:
    """Return the kills of one run of the campaign, in their order."""
    chance = random.Random(f"kills {seed} {run}")
    first = run * FAULTS_PER_RUN
    return [_plan_kill(chance, may_be_fresh and _is_fresh(number)) for number in range(first, first + FAULTS_PER_RUN)]


def _is_fresh(number: int) -> bool:
    return number % FRESH_EVERY == 0 and number < NUM_FRESH * FRESH_EVERY


def _plan_kill(chance: random.Random, is_fresh: bool) -> Fault:
    target = chance.choices(("pod", "supervisor", "rank", "writer"), (66, 10, 12, 12))[0]
    if target == "writer":
        moment = chance.choices(("save", "step"), (75, 25))[0]
    elif target == "rank":
        moment = chance.choice(("save", "step"))
    else:
        moment = chance.choices(("save", "last-byte", "step", "start"), (50, 12, 25, 13))[0]
    count = chance.randint(1, 6) if moment == "step" else chance.randint(1, 2)
    return Fault(target, moment, count, chance.random(), is_fresh, chance.randint(0, 1))


def plan_full_disks(seed: int, run: int) -> list[Fault]:
    """Return the faults of one run on a small volume: full before a save begins, or in the middle of it."""
    chance = random.Random(f"disks {seed} {run}")
    return [
        Fault("disk", moment, chance.randint(1, 6) if moment == "step" else chance.randint(1, 2), chance.random())
        for moment in chance.choices(("step", "save"), (30, 70), k=FAULTS_PER_RUN)
    ]
