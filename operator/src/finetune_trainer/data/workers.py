"""Work spread over processes, with results in the order of the tasks: the same for any number of workers.

A handler does a task in one or two steps. `draft` may leave questions that only the parent can answer, because the
answers depend on all earlier tasks; the parent answers them task after task, and `finish` makes the result. Workers are
forked, so that they share what the handler holds, and end with the parent.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import pickle
import queue
import signal
import threading
import traceback
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    import types
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

MAX_BYTES_PER_WORKER = 4 << 20
"""Tasks in flight hold at most this much for each worker, or one task: a parsed row can take 25 times its bytes."""

_TASKS_PER_WORKER = 2
"""One is worked on while the next is on its way."""
_CPU_QUOTA = pathlib.Path("/sys/fs/cgroup/cpu.max")


class Sized(Protocol):
    """A task that knows how much memory it holds."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the task's data."""


T = TypeVar("T", bound=Sized)
R = TypeVar("R")


class Handler(Protocol):
    """What is done with a task; it has to be the same in every process."""

    def draft(self, task: Any) -> tuple[Any, Any]:
        """Return a draft, and questions about it or None."""

    def finish(self, draft: Any, answers: Any) -> Any:
        """Return the result; `answers` is None where there were no questions."""


def count_cores() -> int:
    """Return how many processors this process may keep busy: its affinity, and a pod's limit."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = _CPU_QUOTA.read_text(encoding="ascii").split()
        cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


@dataclasses.dataclass
class _Job(Generic[T]):
    """A task on its way through a worker."""

    task: T
    worker: _Worker
    kind: str = ""
    """questions, result or error, once something came back."""
    value: Any = None


class Workers(Generic[T, R]):
    """Processes that do tasks; with `number` 0 the calling process does them itself. Use as a context manager."""

    def __init__(self, handler: Handler, number: int) -> None:
        self._handler = handler
        self._workers: list[_Worker] = []
        for _ in range(number):
            self._workers.append(_Worker(handler, [worker.connection for worker in self._workers]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.stop()

    def map(self, tasks: Iterable[T], answer: Callable[[Any], Any]) -> Iterator[tuple[T, R]]:
        """Yield each task with its result, in order; `answer` is asked in order too.

        An error, be it of a task or of the iteration over them, is raised after the results of all earlier tasks.
        """
        if not self._workers:
            for task in tasks:
                draft, questions = self._handler.draft(task)
                yield task, self._handler.finish(draft, None if questions is None else answer(questions))
        else:
            yield from self._map_over_processes(iter(tasks), answer)

    def _map_over_processes(self, tasks: Iterator[T], answer: Callable[[Any], Any]) -> Iterator[tuple[T, R]]:
        source = _Source(tasks)
        jobs: collections.deque[_Job[T]] = collections.deque()
        while True:
            while self._has_room(jobs) and (new := source.take()) is not None:
                jobs.append(self._deal(new))
            if not jobs:
                break
            job = jobs[0]
            if not job.kind:
                self._receive()
            elif job.kind == "questions":
                job.kind = ""
                job.worker.send(("answers", answer(job.value)), job)
            elif job.kind == "error":
                raise job.value
            else:
                yield job.task, jobs.popleft().value
        if source.error is not None:
            raise source.error

    def _has_room(self, jobs: collections.deque[_Job[T]]) -> bool:
        if not jobs:
            return True
        if len(jobs) >= (_TASKS_PER_WORKER + 1) * len(self._workers):
            return False
        if min(worker.num_tasks for worker in self._workers) >= _TASKS_PER_WORKER:
            return False
        return sum(job.task.num_bytes for job in jobs) < MAX_BYTES_PER_WORKER * len(self._workers)

    def _deal(self, task: T) -> _Job[T]:
        worker = min(self._workers, key=lambda one: one.num_tasks)
        job = _Job(task, worker)
        worker.num_tasks += 1
        worker.send(("task", task), job)
        return job

    def _receive(self) -> None:
        """Wait until a worker has something to say, and note it."""
        waiting: dict[Any, _Worker] = {worker.connection: worker for worker in self._workers if worker.jobs}
        for connection in multiprocessing.connection.wait(list(waiting)):
            waiting[connection].receive()


class _Source(Generic[T]):
    """Takes tasks until there are no more, or an error comes."""

    def __init__(self, tasks: Iterator[T]) -> None:
        self._tasks: Iterator[T] | None = tasks
        self.error: Exception | None = None

    def take(self) -> T | None:
        if self._tasks is None:
            return None
        try:
            task = next(self._tasks, None)
        except Exception as error:
            self.error, task = error, None
        if task is None:
            self._tasks = None
        return task


class _Worker:
    """One process, as the parent sees it. It answers in the order in which it was sent something."""

    def __init__(self, handler: Handler, others: list[Connection[Any, Any]]) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_serve, args=(theirs, handler, [*others, self.connection]), daemon=True
        )
        self._process.start()
        theirs.close()
        self.num_tasks = 0
        """Tasks that were sent and have no result yet."""
        self.jobs: collections.deque[_Job[Any]] = collections.deque()
        """Those that something is to come back for, in order."""

    def send(self, message: tuple[str, Any], job: _Job[Any]) -> None:
        self.jobs.append(job)
        try:
            self.connection.send(message)
        except OSError:
            raise self._explain_death() from None

    def receive(self) -> None:
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            raise self._explain_death() from None
        job = self.jobs.popleft()
        job.kind, job.value = kind, value
        self.num_tasks -= kind != "questions"

    def stop(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.join()

    def _explain_death(self) -> Exception:
        self._process.join(timeout=5)
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            return TrainerError(
                Reason.HOST_OUT_OF_MEMORY,
                ExitCode.HOST_OUT_OF_MEMORY,
                "a process that prepares rows was killed, most likely for memory",
                "Raise spec.prepare.pod.resources.limits.memory, or lower its cpu limit: each core runs a process.",
            )
        return RuntimeError(f"a process that prepares rows ended with exit code {code}")


def _serve(connection: Connection[Any, Any], handler: Handler, others: list[Connection[Any, Any]]) -> None:
    """Work until the parent is gone."""
    for other in others:
        # Else the parent's end would stay open in here, and its death unnoticed.
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Each core has a process already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    inbox: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
    # Read ahead: a worker that is about to send must never keep the parent from sending.
    threading.Thread(target=_read_ahead, args=(connection, inbox), daemon=True).start()
    drafts: collections.deque[Any] = collections.deque()
    while (message := inbox.get()) is not None:
        reply = _do(handler, message, drafts)
        try:
            connection.send(reply)
        except OSError:
            return


def _read_ahead(connection: Connection[Any, Any], inbox: queue.SimpleQueue[tuple[str, Any] | None]) -> None:
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        inbox.put(None)


def _do(handler: Handler, message: tuple[str, Any], drafts: collections.deque[Any]) -> tuple[str, Any]:
    kind, value = message
    try:
        if kind == "answers":
            return "result", handler.finish(drafts.popleft(), value)
        draft, questions = handler.draft(value)
        if questions is None:
            return "result", handler.finish(draft, None)
        drafts.append(draft)
    except Exception as error:
        return "error", _make_portable(error)
    return "questions", questions


def _make_portable(error: Exception) -> Exception:
    """Return an exception that survives the way to the parent, with the place where it arose."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - bytes of our own
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
