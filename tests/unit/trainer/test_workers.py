"""Tasks are spread over processes, and nothing of that is seen in the results."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterable

import pytest

from finetune_trainer.data import workers
from finetune_trainer.data.workers import Workers
from finetune_trainer.errors import TrainerError
from tests.support.waiting import eventually


@dataclasses.dataclass(frozen=True)
class Task:
    number: int
    num_bytes: int = 1
    text: bytes = b""


class Handler:
    """Multiplies; asks the parent about every third number; some numbers are fatal."""

    def draft(self, task: Task) -> tuple[int, int | None]:
        if task.number == 77:
            raise ValueError("77 is too much")
        if task.number == 99:
            os.kill(os.getpid(), signal.SIGKILL)
        return task.number * 10, task.number if task.number % 3 == 0 else None

    def finish(self, draft: int, answers: int | None) -> tuple[int, int | None, int]:
        return draft, answers, os.getpid()


class Parent:
    """Answers with how often it was asked before."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def answer(self, question: int) -> int:
        self.asked.append(question)
        return len(self.asked) - 1


def run(tasks: list[Task], number: int) -> list[tuple[int, int | None, int]]:
    parent = Parent()
    with Workers(Handler(), number) as pool:
        found = [result for task, result in pool.map(iter(tasks), parent.answer) if task.number >= 0]
    assert parent.asked == sorted(parent.asked)
    return found


@pytest.mark.parametrize("number", [1, 2, 5])
def test_results_and_answers_come_in_order_for_any_number_of_workers(number):
    tasks = [Task(index) for index in range(60)]
    alone = run(tasks, 0)
    found = run(tasks, number)
    assert [result[:2] for result in found] == [result[:2] for result in alone]
    assert len({pid for *_, pid in found}) == number
    assert os.getpid() not in {pid for *_, pid in found}


def test_tasks_and_results_may_be_larger_than_a_pipe(tmp_path):
    class Echo:
        def draft(self, task: Task) -> tuple[bytes, None]:
            return task.text, None

        def finish(self, draft: bytes, _answers: None) -> bytes:
            return draft

    texts = [bytes([index]) * 3_000_000 for index in range(8)]
    tasks = [Task(index, len(text), text) for index, text in enumerate(texts)]
    with Workers(Echo(), 2) as pool:
        assert [result for _, result in pool.map(tasks, lambda _: None)] == texts


def note_numbers(found: list[int], results: Iterable[tuple[Task, object]]) -> None:
    for task, _ in results:
        found.append(task.number)


@pytest.mark.parametrize("number", [0, 2])
def test_an_error_comes_after_the_results_before_it(number):
    found = []
    with Workers(Handler(), number) as pool, pytest.raises(ValueError, match="77 is too much"):
        note_numbers(found, pool.map((Task(index) for index in range(70, 90)), lambda _: 0))
    assert found == list(range(70, 77))


@pytest.mark.parametrize("number", [0, 2])
def test_an_error_of_the_input_comes_after_the_results_before_it(number):
    def list_tasks():
        yield from (Task(index) for index in range(7))
        raise ValueError("no more")

    found = []
    with Workers(Handler(), number) as pool, pytest.raises(ValueError, match="no more"):
        note_numbers(found, pool.map(list_tasks(), lambda _: 0))
    assert found == list(range(7))


def test_a_worker_that_is_killed_ends_the_run_with_what_to_do():
    with Workers(Handler(), 2) as pool, pytest.raises(TrainerError, match="killed") as caught:
        list(pool.map([Task(98), Task(99), Task(100)], lambda _: 0))
    assert "memory" in caught.value.hint


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    program = (
        "import os, pathlib, signal, sys, time\n"
        "from finetune_trainer.data.workers import Workers\n"
        "class Handler:\n"
        "    def draft(self, task): return task, None\n"
        "workers = Workers(Handler(), 3)\n"
        "pids = [str(worker._process.pid) for worker in workers._workers]\n"
        "pathlib.Path(sys.argv[1]).write_text(' '.join(pids))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "pids")], check=False)
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 3
    eventually(lambda: not any(is_running(pid) for pid in pids), within=10, every=0.02)


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 64), ("250000 100000", 3), ("50000 100000", 1), ("", 64)])
def test_a_pods_cpu_limit_counts_as_its_cores(tmp_path, monkeypatch, quota, cores):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(workers, "_CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert workers.count_cores() == cores


def is_running(pid: str) -> bool:
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
