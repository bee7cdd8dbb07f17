"""Ranks that make no step: real processes, which are asked for their stacks and ended."""

import math
import os
import threading
import time

import pytest

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import LONGEST_PAUSE_SECONDS, Topology, TrainingConfig
from finetune_contract.stacks import choose_culprit, describe_stacks
from finetune_trainer.errors import TrainerError
from finetune_trainer.training.heartbeat import Doing, Heartbeats, read_pulse
from finetune_trainer.training.stacks import Hang, Stack
from finetune_trainer.training.supervisor import ProgressDeadline, run_ranks

TWO = Topology(processes_per_node=2)


def _step_until_told(path):
    while not path.exists():
        read_pulse().beat(Doing.STEPPING)
        time.sleep(0.02)


def _sleep_before_the_collective():
    threading.Event().wait()


def test_a_rank_that_stands_still_is_shown_with_its_frame_and_ended(tmp_path):
    def work():
        read_pulse().beat(Doing.STEPPING)
        if os.environ["RANK"] == "1":
            _sleep_before_the_collective()
        _step_until_told(tmp_path / "never")

    stacks = tmp_path / "reports" / "stacks.txt"
    with pytest.raises(TrainerError) as caught:
        run_ranks(work, TWO, TrainingConfig(), ProgressDeadline(1.0, stacks))

    failure = caught.value
    assert (failure.reason, failure.exit_code) == (Reason.NO_PROGRESS, ExitCode.NO_PROGRESS)
    assert "no step for 1 s (spec.failurePolicy.progressDeadlineSeconds)" in failure.message
    assert set(failure.details["stacks"]) == {"0", "1"}
    assert "threading.py" in failure.details["stacks"]["1"]["at"]
    text = stacks.read_text()
    assert "_sleep_before_the_collective" in text.partition("rank 1\n")[2]
    assert str(stacks) in failure.hint


def test_signs_of_life_keep_a_slow_rank_alive(tmp_path):
    def work():
        if os.environ["RANK"] == "0":
            ends = time.monotonic() + 2.5
            while time.monotonic() < ends:
                read_pulse().beat(Doing.STEPPING)
                time.sleep(0.02)
            return 0, {"done": True}
        # Still starting: a first compilation may take longer than any deadline.
        time.sleep(2.5)
        return 0, {}

    assert run_ranks(work, TWO, TrainingConfig(), ProgressDeadline(1.0)).results == {"done": True}


def test_a_rank_that_fails_by_itself_is_no_hang(tmp_path):
    def work():
        read_pulse().beat(Doing.STEPPING)
        if os.environ["RANK"] == "1":
            raise KeyError("the cause")
        _sleep_before_the_collective()

    with pytest.raises(TrainerError, match="the cause"):
        run_ranks(work, TWO, TrainingConfig(), ProgressDeadline(600))


def test_nothing_is_due_before_the_first_step():
    heartbeats = Heartbeats(2)
    assert heartbeats.due(10, [0, 1]) == math.inf
    heartbeats.beat(0, Doing.STARTING)
    assert heartbeats.due(10, [0, 1]) == math.inf


def test_the_rank_that_was_silent_longest_sets_the_deadline():
    heartbeats = Heartbeats(2)
    before = time.monotonic()
    heartbeats.beat(0, Doing.STEPPING)
    after = time.monotonic()
    heartbeats.beat(1, Doing.STEPPING)
    assert before + 10 <= heartbeats.due(10, [0, 1]) <= after + 10
    assert heartbeats.due(10, [1]) >= after + 10


def test_a_rank_that_saves_gives_all_the_time_of_a_collective():
    heartbeats = Heartbeats(2)
    heartbeats.beat(0, Doing.STEPPING)
    heartbeats.beat(1, Doing.PAUSING)
    assert heartbeats.due(10, [0, 1]) >= time.monotonic() + LONGEST_PAUSE_SECONDS - 1
    assert heartbeats.due(2 * LONGEST_PAUSE_SECONDS, [0, 1]) >= time.monotonic() + 2 * LONGEST_PAUSE_SECONDS - 1


WAITING = """Thread 0x00007f10 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 324 in wait
Current thread 0x00007f20 (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 4810 in barrier
  File "/x/torch/distributed/c10d_logger.py", line 81 in wrapper
  File "/x/finetune_trainer/distributed.py", line 79 in any
"""
READING = """Current thread 0x00007f20 (most recent call first):
  File "/x/user/data.py", line 7 in read_shard
  File "/x/user/train.py", line 3 in main
"""


def test_a_rank_that_waits_is_told_from_the_one_it_waits_for():
    hang = Hang(600, (Stack(0, WAITING), Stack(1, READING), Stack(2, WAITING)))
    assert hang.culprit == 1
    assert hang.message.endswith(
        "rank 1 stands at data.py:7 in read_shard; ranks 0, 2 wait for the others at distributed.py:79 in any"
    )


def test_where_all_ranks_work_the_one_apart_is_the_culprit():
    place, other = {"at": "a.py:1 in f", "waits": False}, {"at": "b.py:2 in g", "waits": False}
    assert choose_culprit({"0": place, "1": other, "2": place}) == "1"
    assert choose_culprit({"0": place, "1": place}) is None
    assert choose_culprit({"0": place, "1": other}) is None
    assert choose_culprit({"0": place}) == "0"
    assert "rank 0 stands at a.py:1" in describe_stacks({"0": place, "1": other})


def test_a_rank_that_does_not_answer_says_so():
    hang = Hang(600, (Stack(0, WAITING), Stack(1, "no answer: process state D, in the kernel at nfs_wait_bit")))
    assert hang.culprit == 1
    assert "process state D, in the kernel at nfs_wait_bit" in hang.message


def test_the_stacks_of_many_ranks_fit_and_keep_the_one_that_differs():
    stacks = tuple(Stack(rank, READING if rank == 63 else WAITING) for rank in range(64))
    hang = Hang(600, stacks)
    assert hang.culprit == 63
    assert len(hang.to_details()) == 16
    assert "rank 63 stands at data.py:7" in hang.message
