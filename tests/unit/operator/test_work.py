"""What restarts lose and what goodput is made of, told by what pods post and report at their end."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_contract.reports import Metric, Phase, ProgressReport
from finetune_operator.api.v1alpha1 import FineTuneJobStatus
from finetune_operator.gauges import build_gauges
from finetune_operator.lifecycle import next_step
from finetune_operator.metrics import GAUGES
from finetune_operator.observed import Progress
from finetune_operator.record import Record, read_record, to_text
from finetune_operator.status import build_status
from finetune_operator.steps import Situation, Wait, WriteRecord
from finetune_operator.work import Work, end_work, settle_work
from tests.support.operator_parts import (
    NOW,
    make_attempt,
    make_exit,
    make_observed,
    make_pod,
    make_record,
    make_report,
    make_test_plan,
    make_training_job,
    seconds,
)

PLAN = make_test_plan()
TRAINING = Wait(Situation("Training", "Running", "training"))


def make_posts(attempt=1, after=200.0, **metrics):
    """What an attempt has posted last, so many seconds after NOW."""
    named = {Metric[name.upper()]: float(value) for name, value in metrics.items()}
    return Progress(ProgressReport(50, None, named, ""), NOW + seconds(after), None, NOW, attempt)


def make_world(*attempts, progress=None, details=None, code=0, **fields):
    """A world in which the newest attempt trains, or has ended with a code and a report."""
    newest = attempts[-1]
    job = make_training_job(PLAN, newest.number, is_failed=code != 0, ended_at=NOW + seconds(200) if code else None)
    report = make_report("train", code, "RankFailed", "boom", details=details) if details is not None else None
    pod = make_pod(job, exit=make_exit(code, report=report, after=200) if code else None)
    record = make_record(Phase.INSPECT, Phase.PREPARE, attempts=attempts, claim_uid="claim", **fields)
    return make_observed(PLAN, record, jobs=(job,), pods=(pod,), progress=progress)


def write(world, after=200):
    """Return the record that the next step writes."""
    step = next_step(PLAN, world, NOW + seconds(after))
    assert isinstance(step, WriteRecord), step
    # It must survive the ConfigMap.
    assert read_record(step.record.to_json()) == step.record
    return step.record


def killed_at_90():
    """An attempt that saved at 80 and was killed after step 90, 2 s a step."""
    posts = make_posts(step=90, latest_checkpoint=80, productive_seconds=180, save_seconds=1.5)
    return write(make_world(make_attempt(PLAN), progress=posts, code=137))


def test_an_attempt_that_ends_leaves_its_time_and_its_work_behind():
    record = killed_at_90()
    assert (record.training_seconds, record.productive_seconds, record.steps_lost) == (200, 180, 0)
    (attempt,) = record.attempts
    assert (attempt.reached_step, attempt.last_step, attempt.save_seconds) == (90, 80, 1.5)


def test_what_a_restart_lost_is_known_when_the_next_attempt_says_where_it_goes_on():
    before = killed_at_90()
    posts = make_posts(2, step=81, resumed_from=80, productive_seconds=162)
    record = write(make_world(*before.attempts, make_attempt(PLAN, 2), progress=posts, productive_seconds=180.0))

    assert (record.attempts[0].steps_lost, record.attempts[0].seconds_lost) == (10, 20)
    assert (record.steps_lost, record.seconds_lost, record.productive_seconds) == (10, 20, 160)
    # It is counted once.
    again = make_world(*record.attempts, progress=posts, steps_lost=10)
    assert isinstance(next_step(PLAN, again, NOW + seconds(200)), Wait)


def test_an_attempt_that_falls_back_past_damaged_checkpoints_loses_more():
    posts = make_posts(2, step=41, resumed_from=40, productive_seconds=82)
    record = write(make_world(*killed_at_90().attempts, make_attempt(PLAN, 2), progress=posts))
    assert record.attempts[0].steps_lost == 50


def test_an_attempt_that_begins_again_from_the_base_model_lost_everything():
    posts = make_posts(2, step=0, productive_seconds=0)
    record = write(make_world(*killed_at_90().attempts, make_attempt(PLAN, 2), progress=posts))
    assert (record.attempts[0].steps_lost, record.attempts[0].seconds_lost) == (90, 180)


def test_a_trainer_that_does_not_say_where_it_resumed_settles_nothing():
    posts = make_posts(2, step=0)
    world = make_world(*killed_at_90().attempts, make_attempt(PLAN, 2), progress=posts)
    assert isinstance(next_step(PLAN, world, NOW), Wait)


def test_a_report_at_the_end_knows_better_than_the_last_post():
    posts = make_posts(step=88, latest_checkpoint=80, productive_seconds=176)
    details = {"step": 90, "productive_seconds": 180.0, "steps_lost": 3, "latest_complete": 80}
    record = write(make_world(make_attempt(PLAN), progress=posts, details=details, code=1))
    # Three steps were lost by a restart inside the pod.
    assert (record.attempts[0].reached_step, record.steps_lost, record.seconds_lost) == (90, 3, 6)


def test_an_attempt_that_was_never_heard_of_leaves_the_loss_to_the_one_before():
    before = killed_at_90()
    silent = write(make_world(*before.attempts, make_attempt(PLAN, 2), code=137, productive_seconds=180.0))
    posts = make_posts(3, step=81, resumed_from=80, productive_seconds=162)
    record = write(make_world(*silent.attempts, make_attempt(PLAN, 3), progress=posts))
    assert [each.steps_lost for each in record.attempts] == [10, 0, 0]


def test_a_job_that_gives_up_has_lost_what_was_not_saved():
    plan = make_test_plan(failurePolicy={"maxRestarts": 0})
    posts = make_posts(step=90, latest_checkpoint=80, productive_seconds=180)
    world = make_world(make_attempt(PLAN), progress=posts, details={"step": 90}, code=1)
    step = next_step(plan, world, NOW + seconds(200))
    assert step.record.terminal is not None
    assert (step.record.steps_lost, step.record.productive_seconds) == (10, 160)


@pytest.mark.parametrize(
    ("productive", "allocated", "goodput"), [(0, 0, None), (0, 10, 0), (96, 100, 0.96), (101, 100, 1)]
)
def test_goodput_is_productive_over_allocated_time(productive, allocated, goodput):
    assert Work(productive, allocated).goodput == goodput


def build(world, previous=None):
    return build_status(PLAN, world, TRAINING, previous or FineTuneJobStatus(), NOW + seconds(300))


def test_goodput_counts_the_time_of_every_attempt_up_to_the_last_post():
    record = killed_at_90()
    # Between two attempts nothing is allocated: the second starts 60 s later.
    second = make_attempt(PLAN, 2, start_time=to_text(NOW + seconds(260)))
    posts = make_posts(2, after=300, step=90, resumed_from=80, productive_seconds=180)
    fields = {"training_seconds": record.training_seconds, "steps_lost": 10, "seconds_lost": 20.0}
    status = build(make_world(*record.attempts, second, progress=posts, **fields))

    progress = status.progress
    assert (progress.productive_seconds, progress.allocated_seconds, progress.goodput) == (180, 240, 0.75)
    assert (progress.steps_lost, progress.seconds_lost) == (10, 20)
    # An operator that has just started has heard no post yet.
    assert build(make_world(*record.attempts, second, **fields), status).progress == progress


def test_goodput_stays_when_the_training_is_over():
    attempt = make_attempt(PLAN, end_time=to_text(NOW + seconds(200)))
    fields = {"training_seconds": 200.0, "productive_seconds": 190.0}
    world = make_world(attempt, progress=make_posts(step=100, productive_seconds=189), **fields)
    assert build(world).progress.goodput == 0.95
    assert build(dataclasses.replace(world, progress=None), build(world)).progress.goodput == 0.95


def test_an_attempt_tells_what_it_lost_and_how_long_its_save_took():
    record = settle_work(killed_at_90(), 2, 80)
    world = make_world(*record.attempts, make_attempt(PLAN, 2))
    first, second = build(world).attempts
    assert (first.steps_lost, first.seconds_lost, first.save_seconds) == (10, 20, 1.5)
    assert (second.steps_lost, second.save_seconds) == (None, None)


def test_the_newest_checkpoint_has_a_time_a_size_and_two_durations():
    metrics = {"checkpoint_time": NOW.timestamp(), "checkpoint_bytes": 4096}
    posts = make_posts(latest_checkpoint=80, num_checkpoints=2, checkpoint_seconds=0.25, save_seconds=7.5, **metrics)
    world = make_world(make_attempt(PLAN), progress=posts)
    status = build(world)
    assert status.checkpoints.to_dict() == {
        "latestComplete": 80,
        "time": "2026-01-01T12:00:00Z",
        "bytes": 4096,
        "saveSeconds": 7.5,
        "stallSeconds": 0.25,
        "count": 2,
    }
    gauges = build_gauges(status, world.record, NOW + seconds(30))
    assert gauges["checkpoint_age_seconds"] == 30
    assert gauges["checkpoint_timestamp_seconds"] == NOW.timestamp()
    assert (gauges["checkpoint_stall_seconds"], gauges["checkpoint_save_seconds"]) == (0.25, 7.5)
    assert set(gauges) <= set(GAUGES)


def test_the_time_and_size_of_another_checkpoint_are_not_kept():
    old = build(make_world(make_attempt(PLAN), progress=make_posts(latest_checkpoint=80, checkpoint_bytes=4096)))
    ended = make_attempt(PLAN, end_time=to_text(NOW), last_step=90)
    assert build(make_world(ended), old).checkpoints.to_dict() == {"latestComplete": 90}


@given(
    st.lists(
        st.tuples(st.integers(0, 60), st.integers(0, 3), st.integers(0, 20), st.booleans()), min_size=1, max_size=9
    ),
    st.sampled_from([0.5, 2.0, 60.0]),
)
def test_over_any_history_made_steps_are_kept_or_lost(history, step_seconds):
    """Each life makes some steps, loses some inside its pod, falls back some, and may end without a report."""
    record, start, num_made = Record(), 0, 0
    for number, (steps, in_pod, back, is_told) in enumerate(history, 1):
        reached = start + steps
        # What was lost inside the pod was made, and made again.
        num_made += steps + min(in_pod, steps)
        facts = {"productive_seconds": reached * step_seconds, "steps_lost": min(in_pod, steps)}
        attempt = make_attempt(PLAN, number, end_time=to_text(NOW), resumed_from_step=start)
        record = record.with_attempt(attempt)
        told = ({"step": reached, **facts}, {}) if is_told else ({}, {Metric.STEP: reached, **facts})
        record = end_work(record, attempt, *told)
        start = max(0, reached - back)
    record = settle_work(record, len(history) + 1, start)

    assert num_made == start + record.steps_lost
    assert record.steps_lost == sum(each.steps_lost for each in record.attempts)
    assert record.productive_seconds == pytest.approx(start * step_seconds)
    assert record.seconds_lost == pytest.approx(record.steps_lost * step_seconds, abs=0.1)
