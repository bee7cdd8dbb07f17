"""The request to stop: when it ends a rank at once, and when there is time to save."""

from __future__ import annotations

import os
import signal

import pytest

from finetune_trainer.errors import StopRequested
from finetune_trainer.training.notice import StopFlag


@pytest.fixture
def make_flag(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)

    def make(notice="", save=""):
        monkeypatch.setenv("FINETUNE_NOTICE_SECONDS", notice)
        monkeypatch.setenv("FINETUNE_SAVE_SECONDS", save)
        flag = StopFlag()
        flag.install()
        return flag

    yield make
    signal.signal(signal.SIGTERM, before)


def ask_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)


def test_before_training_has_begun_a_stop_ends_the_rank_at_once(make_flag):
    make_flag()
    with pytest.raises(StopRequested):
        ask_to_stop()


def test_while_training_a_stop_is_remembered(make_flag):
    flag = make_flag()
    flag.is_armed = True
    assert not flag.is_set
    ask_to_stop()
    assert flag.is_set


@pytest.mark.parametrize(
    ("notice", "estimate", "measured", "fits"),
    [
        ("30", "", 10.0, True),
        ("30", "", 25.0, False),
        ("30", "10", 0.0, True),
        ("30", "60", 0.0, False),
        ("30", "60", 10.0, True),
        ("", "1e9", 1e9, True),
    ],
)
def test_a_save_is_tried_only_when_it_fits_the_notice(make_flag, notice, estimate, measured, fits):
    flag = make_flag(notice, estimate)
    flag.is_armed = True
    ask_to_stop()
    assert flag.has_time_to_save(measured) is fits


def test_the_notice_runs_from_the_first_request(make_flag, monkeypatch):
    flag = make_flag("30")
    flag.is_armed = True
    now = [100.0]
    monkeypatch.setattr("finetune_trainer.training.notice.time.monotonic", lambda: now[0])
    ask_to_stop()
    now[0] = 115.0
    ask_to_stop()
    assert flag.has_time_to_save(10.0)
    assert not flag.has_time_to_save(11.0)


def test_without_a_request_there_is_all_the_time(make_flag):
    assert make_flag("30").has_time_to_save(1000.0)
