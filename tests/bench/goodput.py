"""`make bench-goodput`: how much of a training's time is productive under kills, beside the recipe's one save at 800.

Step, save and restart times are measured on a tiny model, then the recipe's 1,287 steps are replayed under seeded
exponential kills. A real training per arm, cut at one wall time, shows that the replay tells the truth.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import tempfile
from pathlib import Path

from tests.bench.goodput_arm import Calibration, Played, Workshop, calibrate, play
from tests.bench.goodput_replay import Costs, choose_interval, draw_gaps, replay, replay_many
from tests.bench.results import FOLDER, Result, write_results
from tests.bench.training_process import import_stack

TOTAL_STEPS = 1287
RECIPE_EVERY = 800
EVERY = 6
"""Steps between our saves in the headline case."""
INTERVALS_PER_KILL = 34
NUM_REPLAYS = 400
RARE_KILLS = 77
"""Trainings per kill in the row on rare kills."""
MIN_KILLS = 3
RECIPE = "one save, at step 800"
REPLAY = "the replay"


def main() -> int:
    """Measure, replay, play, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180.0, help="wall time of each real training")
    parser.add_argument("--gap", type=float, default=45.0, help="mean seconds between kills of a real training")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    import_stack()
    with tempfile.TemporaryDirectory(prefix="goodput-", dir=FOLDER) as folder:
        workshop = Workshop(Path(folder))
        measured = calibrate(workshop)
        print(f"measured: {measured}", flush=True)
        real, played = play_arms(workshop, measured, args)
    rows = replay_recipe(measured.costs) + real + list_costs(measured)
    facts = {name: dataclasses.asdict(each) for name, each in played.items()}
    write_results("goodput", rows, seed=args.seed, replays=NUM_REPLAYS, **facts)
    return 0


def replay_recipe(costs: Costs) -> list[Result]:
    """Replay the recipe's steps: at the headline's rate of kills, with the interval that Young chooses, and others."""

    def row(metric: str, every: int, mean: float, times: Costs = costs) -> Result:
        ours, recipe = (
            replay_many(times, (TOTAL_STEPS, each), mean, range(NUM_REPLAYS)).goodput for each in (every, RECIPE_EVERY)
        )
        return Result(metric, ours, "of the time", RECIPE, recipe)

    mean = INTERVALS_PER_KILL * (EVERY * costs.step + costs.stall)
    rare = RARE_KILLS * TOTAL_STEPS * costs.step
    slow = dataclasses.replace(costs, restart=4 * costs.restart)
    worst = replay_many(costs, (TOTAL_STEPS, EVERY), mean, range(NUM_REPLAYS)).worst
    return [
        row("goodput", EVERY, mean),
        Result("goodput_worst_in_20", worst, "of the time"),
        row("goodput_youngs_interval", choose_interval(costs, mean), mean),
        row("goodput_restart_4_times_as_long", EVERY, mean, slow),
        row("goodput_rare_kills", choose_interval(costs, rare), rare),
        Result("youngs_interval", choose_interval(costs, mean), "steps"),
    ]


def play_arms(
    workshop: Workshop, measured: Calibration, args: argparse.Namespace
) -> tuple[list[Result], dict[str, Played]]:
    """Train really in both arms under the same kills, and put the replay of just these kills beside each."""
    moments = choose_moments(args.seed, args.gap, args.seconds)
    # The trainer counts a step as productive also where a save beside it slows it down.
    costs = dataclasses.replace(measured.costs, step=measured.mean_step, stall=measured.costs.stall - measured.slowdown)
    steps = round(args.seconds / costs.step)
    intervals = {"": choose_interval(costs, args.gap), "_recipe": round(steps * RECIPE_EVERY / TOTAL_STEPS)}
    rows, plays = [], {}
    for name, every in intervals.items():
        plays[f"real{name}"] = played = play(workshop.make_run(f"real{name}"), every, moments, args.seconds)
        told = replay_played(costs, every, played)
        print(f"real{name}: every {every} steps, {len(played.kills)} kills, {played.goodput:.4f}, told {told:.4f}")
        rows += [
            Result(f"goodput_real{name}", played.goodput, "of the time", REPLAY, told),
            Result(f"goodput_real{name}_off_by", 100 * (played.goodput - told), "points"),
        ]
    return rows, plays


def choose_moments(seed: int, mean_gap: float, until: float) -> list[float]:
    """Return the moments of the kills by the first seed from this one that has enough of them."""
    for candidate in itertools.count(seed):
        moments = list(itertools.takewhile(lambda at: at < until, itertools.accumulate(draw_gaps(candidate, mean_gap))))
        if len(moments) >= MIN_KILLS:
            return moments
    raise AssertionError("unreachable: some seed has enough kills")


def replay_played(costs: Costs, every: int, played: Played) -> float:
    """Return the goodput that the replay tells for the kills of a real training."""
    gaps = [after - before for before, after in itertools.pairwise((0.0, *played.kills))]
    return replay(costs, 10**9, every, gaps, until=played.wall_seconds).goodput


def list_costs(measured: Calibration) -> list[Result]:
    """Return what was measured."""
    costs = measured.costs
    return [
        Result("step_seconds", costs.step, "s"),
        Result("stall_seconds", costs.stall, "s"),
        Result("slowdown_seconds", measured.slowdown, "s"),
        Result("save_seconds", costs.save, "s"),
        Result("restart_seconds", costs.restart, "s"),
        Result("start_seconds", costs.start, "s"),
    ]


if __name__ == "__main__":
    sys.exit(main())
