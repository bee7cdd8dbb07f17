"""A recovery campaign's schedule comes from its seed, strikes what it is to strike, and its record goes on."""

from __future__ import annotations

import json

import pytest

from tests.bench.recovery_faults import FAULTS_PER_RUN, plan_full_disks, plan_kills
from tests.bench.recovery_record import OURS, Record
from tests.bench.training_process import StepLog

RUNS = range(200)


def test_a_run_of_a_seed_is_always_the_same():
    assert plan_kills(7, 3) == plan_kills(7, 3)
    assert plan_kills(7, 3) != plan_kills(8, 3)
    assert plan_full_disks(7, 3) == plan_full_disks(7, 3)


def test_kills_strike_every_process_and_mostly_saves():
    faults = [fault for run in RUNS for fault in plan_kills(7, run)]
    assert {fault.target for fault in faults} == {"pod", "supervisor", "rank", "writer"}
    assert {fault.moment for fault in faults} == {"start", "step", "save", "last-byte"}
    # Not each is in time: the aim is 0.3 of those that struck.
    assert sum(fault.moment in ("save", "last-byte") for fault in faults) > 0.5 * len(faults)


def test_at_least_five_of_the_first_fifty_kills_strike_fresh_processes():
    first = [fault for run in RUNS for fault in plan_kills(7, run)][:50]
    assert 5 <= sum(fault.is_fresh for fault in first) <= 10
    assert not any(fault.is_fresh for run in RUNS for fault in plan_kills(7, run, may_be_fresh=False))


def test_disks_run_full_before_and_inside_saves():
    faults = [fault for run in RUNS for fault in plan_full_disks(7, run)]
    assert {(fault.target, fault.moment) for fault in faults} == {("disk", "step"), ("disk", "save")}


def _fault(**changes):
    usual = {
        "fault": {"is_fresh": False},
        "struck": "all",
        "was_inside": True,
        "has_resumed": True,
        "has_lost_checkpoint": False,
        "lost_intervals": 1.0,
    }
    return {**usual, **changes}


END = {"is_finished": True, "has_diverged": False, "num_hands": 0}


def test_a_record_goes_on_where_a_killed_benchmark_left_it(tmp_path):
    path = tmp_path / "record.jsonl"
    Record(path).add_run(OURS, "kills", 0, [_fault()] * FAULTS_PER_RUN, **END)
    with path.open("a") as file:
        file.write('{"arm": "ours", "kind": "ki')

    record = Record(path)
    record.add_run(OURS, "kills", record.choose_run(OURS, "kills"), [_fault(lost_intervals=0.5)], **END)

    again = Record(path).sum_up(OURS, "kills")
    assert (again.runs, again.faults, again.lost_intervals_max) == (2, FAULTS_PER_RUN + 1, 1.0)
    assert not again.has_losses


@pytest.mark.parametrize(
    ("fault", "end"),
    [
        ({"has_resumed": False}, {}),
        ({"has_resumed": None}, {}),
        ({"has_lost_checkpoint": True}, {}),
        ({}, {"has_diverged": True}),
        ({}, {"is_finished": False}),
    ],
)
def test_every_kind_of_loss_counts(tmp_path, fault, end):
    record = Record(tmp_path / "record.jsonl")
    record.add_run(OURS, "kills", 0, [_fault(**fault)], **{**END, **end})
    assert record.sum_up(OURS, "kills").has_losses


def test_a_line_that_a_full_disk_has_cut_hides_no_other(tmp_path):
    log = StepLog(tmp_path)
    (tmp_path / "reports").mkdir()
    lines = [json.dumps({"step": 1}), json.dumps({"step": 2})[:5] + json.dumps({"step": 3}), json.dumps({"step": 4})]
    (tmp_path / "reports" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert log.read() == [1, 4]
