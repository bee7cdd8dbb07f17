"""The replay of trainings under kills agrees with what can be worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.goodput_replay import Costs, choose_interval, draw_gaps, replay, replay_many

SYNC = Costs(step=1.0, stall=0.5, save=0.5, restart=3.0, start=3.0)


def test_without_kills_goodput_is_one_less_the_share_of_saves():
    costs = Costs(step=1.0, stall=0.25, save=0.25, restart=9.0, start=0.0)
    outcome = replay(costs, 100, 5, ())
    # Twenty saves, the last step's among them.
    assert outcome.wall_seconds == 100 + 20 * 0.25
    assert outcome.goodput == pytest.approx(1 - 0.05 / 1.05)
    assert (outcome.num_kills, outcome.steps_lost) == (0, 0)


def test_the_end_of_training_is_saved_and_waited_for():
    costs = Costs(step=1.0, stall=0.25, save=4.0, restart=9.0, start=2.0)
    assert replay(costs, 7, 800, ()).wall_seconds == 2 + 7 + 4


def test_a_kill_takes_back_the_steps_after_the_newest_commit_and_costs_a_restart():
    # Start 3, five steps and a save until 8.5, then three more steps are done at 11.7.
    outcome = replay(SYNC, 10, 5, (11.7,))
    assert (outcome.num_kills, outcome.steps_lost) == (1, 3)
    # It goes on at step 5 after 3 s: five steps and the last save.
    assert outcome.wall_seconds == pytest.approx(11.7 + 3 + 5 + 0.5)


def test_a_save_that_was_not_committed_when_the_kill_came_does_not_count():
    costs = Costs(step=1.0, stall=0.1, save=2.5, restart=1.0, start=0.0)
    # The save at step 5 is committed at 7.5.
    assert replay(costs, 10, 5, (7.4,)).steps_lost == 7
    assert replay(costs, 10, 5, (7.6,)).steps_lost == 2


def test_a_save_waits_for_the_one_in_flight():
    costs = Costs(step=1.0, stall=0.1, save=2.5, restart=1.0, start=0.0)
    # Saves at 1, at 3.5 (waiting for the first), and the last at 6 (waiting for the second).
    assert replay(costs, 3, 1, ()).wall_seconds == pytest.approx(8.5)


def test_a_kill_during_a_restart_begins_it_again():
    outcome = replay(SYNC, 10, 5, (4.0, 2.0, 2.0))
    # Killed at 4, at 6 and at 8; each time before the restart was over but for the first step, which was lost.
    assert (outcome.num_kills, outcome.steps_lost) == (3, 1)
    assert outcome.wall_seconds == pytest.approx(8 + 3 + 10 + 2 * 0.5)


def test_a_cut_counts_the_steps_that_are_done():
    assert replay(SYNC, 100, 50, (), until=13.9).productive_seconds == 10
    assert replay(SYNC, 100, 50, (10.5,), until=15.6).productive_seconds == 2


def expect_wall(costs, total, every, mean):
    """Daly's expectation for kills at any moment, restarts included; whole segments, saves in the foreground."""
    segment = every * costs.step + costs.save
    first = mean * (math.exp((costs.start + segment) / mean) - 1)
    others = mean * math.exp(costs.restart / mean) * (math.exp(segment / mean) - 1)
    return first + (total // every - 1) * others


@pytest.mark.parametrize(("every", "mean"), [(5, 200.0), (20, 60.0), (50, 40.0)])
def test_many_replays_agree_with_dalys_expectation(every, mean):
    campaign = replay_many(SYNC, (200, every), mean, range(2000))
    assert 200 / campaign.goodput == pytest.approx(expect_wall(SYNC, 200, every, mean), rel=0.03)


@pytest.mark.parametrize("stall", [0.05, 0.5, 2.0])
def test_youngs_interval_is_close_to_the_best(stall):
    costs = Costs(step=1.0, stall=stall, save=stall, restart=3.0, start=3.0)
    goodput = {
        every: replay_many(costs, (600, every), 300.0, range(150)).goodput for every in (1, 2, 3, 5, 8, 13, 20, 35, 60)
    }
    chosen = replay_many(costs, (600, choose_interval(costs, 300.0)), 300.0, range(150)).goodput
    assert chosen > max(goodput.values()) - 0.01
    assert chosen > min(goodput.values()) + 0.02


def test_gaps_are_exponential_and_repeat_with_their_seed():
    gaps = list(itertools.islice(draw_gaps(1, 40.0), 20000))
    assert sum(gaps) / len(gaps) == pytest.approx(40, rel=0.03)
    # Half of them are shorter than ln 2 times the mean.
    assert sorted(gaps)[len(gaps) // 2] == pytest.approx(40 * math.log(2), rel=0.05)
    assert gaps[:5] == list(itertools.islice(draw_gaps(1, 40.0), 5))


@given(
    st.tuples(st.floats(0.1, 5), st.floats(0, 3), st.floats(0, 6)),
    st.tuples(st.integers(1, 60), st.integers(1, 30)),
    st.lists(st.floats(0, 100), max_size=8),
)
def test_time_is_never_made(times, course, gaps):
    step, stall, more = times
    costs = Costs(step=step, stall=stall, save=stall + more, restart=2.0, start=2.0)
    outcome = replay(costs, *course, gaps)
    assert outcome.productive_seconds == pytest.approx(course[0] * step)
    assert outcome.wall_seconds >= outcome.productive_seconds + outcome.steps_lost * step - 1e-6
    assert outcome.num_kills <= len(gaps)
