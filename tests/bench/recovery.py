"""`make bench-recovery`: kills and full disks at seeded random moments, and the stock Trainer under the same schedule.

A campaign is a seed; its record goes on where it stopped, so a large one may take several invocations:
`make bench-recovery KILLS=1000 SEED=7` again and again, until enough faults have struck.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

from tests.bench.recovery_campaign import Campaign
from tests.bench.recovery_record import OURS, STOCK, Record
from tests.bench.results import FOLDER, Result, write_results
from tests.bench.small_volume import leave_mounts_of_host
from tests.bench.training_process import import_stack


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
        "--kills", type=int, default=50, help="kills of the whole campaign, and a tenth as many full disks"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after that time")
    args = parser.parse_args()
    record = Record(FOLDER / f"recovery-{args.seed}.jsonl")
    deadline = time.monotonic() + args.minutes * 60
    leave_mounts_of_host()
    began = time.monotonic()
    import_stack()
    import_seconds = time.monotonic() - began
    with tempfile.TemporaryDirectory(prefix="recovery-", dir=FOLDER) as folder:
        campaign = Campaign(args.seed, record, pathlib.Path(folder), import_seconds)
        for goal in list_goals(args.kills):
            play = campaign.play_kills if goal.kind == "kills" else campaign.play_full_disks
            reach(goal, record, play, deadline)
    report(record, args.seed)
    return 0 if is_flawless(record) else 1


def list_goals(kills: int) -> list[Goal]:
    """Return what a campaign of so many kills consists of; all of them strike whole trainings."""
    disks = math.ceil(0.1 * kills)
    return [Goal(arm, kind, number) for arm in (OURS, STOCK) for kind, number in (("kills", kills), ("disks", disks))]


def reach(goal: Goal, record: Record, play: Callable[[str], object], deadline: float) -> None:
    """Play runs until the goal or the deadline is reached."""
    while record.count_faults(goal.arm, goal.kind) < goal.num_faults and time.monotonic() < deadline:
        began = time.monotonic()
        play(goal.arm)
        sums = record.sum_up(goal.arm, goal.kind)
        print(
            f"{goal.arm} {goal.kind}: {sums.num_faults} of {goal.num_faults}, {sums.num_inside} inside a save, "
            f"{sums.num_resumed} resumed, {sums.num_diverged} runs diverged; {time.monotonic() - began:.0f} s",
            flush=True,
        )
    for error in record.list_errors(goal.arm)[-1:]:
        print(f"{goal.arm}: {error}")


def is_flawless(record: Record) -> bool:
    """Whether nothing of ours was lost."""
    return all(
        sums.num_resumed == sums.num_faults
        and not sums.num_diverged
        and not sums.num_unfinished
        and not sums.num_lost_checkpoints
        for sums in (record.sum_up(OURS, kind) for kind in ("kills", "disks"))
    )


def report(record: Record, seed: int) -> None:
    """Print and write the results."""
    ours, stock = record.sum_up(OURS, "kills"), record.sum_up(STOCK, "kills")
    full, stock_full = record.sum_up(OURS, "disks"), record.sum_up(STOCK, "disks")

    def compare(metric: str, unit: str, mine: float, theirs: float | None) -> Result:
        baseline = "stock Trainer" if theirs is not None else ""
        return Result(metric, mine, unit, baseline, theirs)

    rows = [
        compare("resumed_share", "of kills", ours.resumed_share, stock.resumed_share),
        compare("diverged_runs", "runs", ours.num_diverged, stock.num_diverged),
        compare("lost_intervals_max", "save intervals", ours.lost_intervals_max, stock.lost_intervals_max),
        compare("lost_intervals_mean", "save intervals", ours.lost_intervals_mean, stock.lost_intervals_mean),
        compare("kills", "", ours.num_faults, stock.num_faults),
        compare("kills_inside_a_save", "", ours.num_inside, stock.num_inside),
        compare("kills_of_fresh_processes", "", ours.num_fresh, stock.num_fresh),
        compare("runs", "", ours.num_runs, stock.num_runs),
        compare("helping_hands", "", ours.num_hands, stock.num_hands),
        compare("full_disks", "", full.num_faults, stock_full.num_faults),
        compare("full_disks_resumed_share", "of full disks", full.resumed_share, stock_full.resumed_share),
        compare("full_disks_diverged_runs", "runs", full.num_diverged, stock_full.num_diverged),
    ]
    write_results("recovery", rows, seed=seed, record=record.path.name)


if __name__ == "__main__":
    sys.exit(main())
