"""`make bench-recovery`: kills and full disks at seeded random moments, and the stock Trainer under the same schedule.

A campaign is a seed; its record goes on where it stopped, so a large one may take several invocations:
`make bench-recovery KILLS=300 ENGINE=700 SEED=7 MINUTES=5` again and again, until enough faults have struck. KILLS
strike whole trainings, ENGINE the save engine alone on synthetic state, which is reported apart.

lost_intervals of a fault is the work done twice, in save intervals: the last step reported before the fault, less the
step that training went on from, over the steps between two saves. A save takes no time of the training's but is only
there once it is committed: until then the checkpoint before it counts, so a fault inside a save costs the interval
before it and the steps beside its write. With at most one save in flight, and the next one waiting for it, that is
less than two intervals whatever the volume, and 1 plus the share of an interval that a save takes where a save is
shorter than that. Saves that training waits for lose at most 1, and the time of the wait, which counts as no step.
lost_checkpoints are complete checkpoints that were damaged or passed over: they must not be.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable

from tests.bench.recovery_campaign import Campaign
from tests.bench.recovery_record import ENGINE, OURS, STOCK, Record, Sums
from tests.bench.results import FOLDER, Result, write_results
from tests.bench.scratch import make_scratch
from tests.bench.small_volume import leave_mounts_of_host
from tests.bench.training_process import import_stack

BASELINE_KILLS = 30
"""The stock Trainer's rate is known after so many; the first of the same schedule."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """How many faults of a kind an arm is to have been struck by."""

    arm: str
    kind: str
    num_faults: int


def main() -> int:
    """Go on with the campaign, and report what it has come to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kills", type=int, default=50, help="kills of whole trainings, and a tenth as many full disks"
    )
    parser.add_argument("--engine", type=int, default=50, help="the same, of the save engine alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after that time")
    args = parser.parse_args()
    record = Record(FOLDER / f"recovery-{args.seed}.jsonl")
    deadline = time.monotonic() + args.minutes * 60
    leave_mounts_of_host()
    began = time.monotonic()
    import_stack()
    import_seconds = time.monotonic() - began
    with make_scratch(FOLDER, "recovery") as folder:
        campaign = Campaign(args.seed, record, folder, import_seconds)
        for goal in list_goals(args.kills, args.engine):
            play = campaign.play_kills if goal.kind == "kills" else campaign.play_full_disks
            reach(goal, record, play, deadline)
    report(record, args.seed)
    return 0 if is_flawless(record) else 1


def list_goals(kills: int, engine_kills: int) -> list[Goal]:
    """Return what a campaign of so many kills consists of."""
    sizes = ((OURS, kills), (STOCK, min(kills, BASELINE_KILLS)), (ENGINE, engine_kills))
    return [
        Goal(arm, kind, number)
        for arm, size in sizes
        for kind, number in (("kills", size), ("disks", math.ceil(0.1 * size)))
    ]


def reach(goal: Goal, record: Record, play: Callable[[str], object], deadline: float) -> None:
    """Play runs until the goal or the deadline is reached."""
    while record.count_faults(goal.arm, goal.kind) < goal.num_faults and time.monotonic() < deadline:
        began, num_errors = time.monotonic(), len(record.list_errors(goal.arm))
        play(goal.arm)
        sums = record.sum_up(goal.arm, goal.kind)
        print(
            f"{goal.arm} {goal.kind}: {sums.faults} of {goal.num_faults}, {sums.faults_inside_a_save} inside a save, "
            f"{sums.faults_resumed} resumed, {sums.diverged_runs} runs diverged; {time.monotonic() - began:.0f} s",
            flush=True,
        )
        for error in record.list_errors(goal.arm)[num_errors:]:
            print(f"did not resume by itself: {error}", flush=True)


def is_flawless(record: Record) -> bool:
    """Whether nothing of ours was lost."""
    return not any(record.sum_up(arm, kind).has_losses for arm in (OURS, ENGINE) for kind in ("kills", "disks"))


def report(record: Record, seed: int) -> None:
    """Print and write the results."""
    stock = {kind: record.sum_up(STOCK, kind) for kind in ("kills", "disks")}
    rows = []
    for prefix, arm in (("", OURS), ("engine_", ENGINE)):
        for kind, middle in (("kills", ""), ("disks", "full_disks_")):
            sums = record.sum_up(arm, kind)
            if sums.faults:
                rows += _list_rows(prefix + middle, sums, stock[kind] if arm == OURS else None)
    struck = {arm: record.list_struck(arm) for arm in (OURS, STOCK, ENGINE)}
    write_results("recovery", rows, seed=seed, record=record.path.name, struck=struck)
    print(f"killed: {struck}")


def _list_rows(prefix: str, mine: Sums, theirs: Sums | None) -> list[Result]:
    """Return the rows of one kind of faults, the baseline's beside them where it has struck any."""
    figures = {
        "faults": "",
        "faults_inside_a_save": "",
        "faults_of_fresh_processes": "",
        "resumed_share": "of faults",
        "lost_checkpoints": "",
        "lost_intervals_max": "save intervals",
        "lost_intervals_mean": "save intervals",
        "runs": "",
        "diverged_runs": "runs",
        "unfinished_runs": "runs",
        "helping_hands": "",
    }
    baseline = theirs if theirs is not None and theirs.faults else None
    rows = []
    for metric, unit in figures.items():
        there = None if baseline is None else getattr(baseline, metric)
        name = "" if baseline is None else "stock Trainer"
        rows.append(Result(prefix + metric, getattr(mine, metric), unit, name, there))
    return rows


if __name__ == "__main__":
    sys.exit(main())
