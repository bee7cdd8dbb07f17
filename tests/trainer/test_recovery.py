"""Trainings that are struck again and again, each time at another point, go on by themselves and end the same.

A short run of what `make bench-recovery` does a thousand times.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import pytest

from tests.bench.recovery_arms import OurTrainer
from tests.bench.recovery_campaign import SETTINGS, Campaign
from tests.bench.recovery_faults import EVERY_STEPS, Fault
from tests.bench.recovery_record import ENGINE, Record
from tests.bench.recovery_training import Pace, play

LAST_STEP = 9
KILLS = [Fault("pod", "save", 1, 0.0), Fault("writer", "step", 1, 0.5, rank=1)]
ENGINE_SEED = 43
"""Its first run strikes pods, a supervisor, a rank and a writer, all of them inside saves."""
TARGETS = {"all", "rank", "supervisor", "writer"}
MAX_RUNS = 6
"""On a busy machine a save may be over before its fault strikes; so many runs make up for those."""


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    """What killed supervisors leave behind goes with the test."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


def test_a_training_whose_processes_are_killed_ends_as_one_that_was_left_alone(make_run):
    arm, settings = OurTrainer(), (*SETTINGS, "training.packing=true", f"training.max_steps={LAST_STEP}")
    alone = play(arm, make_run("llama", "alone", *settings), [], Pace(), last_step=LAST_STEP)

    struck = play(arm, make_run("llama", "struck", *settings), KILLS, Pace(), last_step=LAST_STEP)

    assert [hit.struck for hit in struck.hits] == ["all", "writer"]
    for hit in struck.hits:
        assert hit.has_resumed, hit.error
        assert not hit.has_lost_checkpoint, hit
        # The interval before a save in flight, and the one beside it.
        assert hit.lost_steps <= 2 * EVERY_STEPS
    assert struck.is_finished
    assert struck.weights == alone.weights


def test_the_save_engine_loses_no_byte_to_kills_and_full_disks(tmp_path):
    record = Record(tmp_path / "record.jsonl")
    campaign = Campaign(ENGINE_SEED, record, tmp_path, 0.0)

    play_until(lambda: campaign.play_kills(ENGINE), lambda: set(record.list_struck(ENGINE)) >= TARGETS)
    play_until(lambda: campaign.play_full_disks(ENGINE), lambda: record.sum_up(ENGINE, "disks").faults >= 3)

    for kind in ("kills", "disks"):
        sums = record.sum_up(ENGINE, kind)
        assert not sums.has_losses, (sums, record.list_errors(ENGINE))
        assert sums.lost_intervals_max <= 2


def play_until(play_run: Callable[[], object], has_struck: Callable[[], bool]) -> None:
    for _ in range(MAX_RUNS):
        play_run()
        if has_struck():
            return
    pytest.fail(f"{MAX_RUNS} runs had too few faults to say anything")
