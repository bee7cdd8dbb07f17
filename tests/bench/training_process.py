"""A training as a process of its own: started fresh or forked from one with the stack imported, watched, and killed.

`import_stack()` once, then `start_training` as often as wanted; each start is one life of a training on a workspace. A
kill takes supervisor, ranks and whatever they started at once, as the death of a pod does.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from finetune_trainer.report.history import START
from tests.support.training_runs import Run
from tests.support.waiting import eventually

_PR_SET_PDEATHSIG = 1
_END_SECONDS = 30.0
"""How long a killed process may take to be gone; a write to a slow disk ends first."""


def import_stack() -> None:
    """Make this process one that trainings are forked from; it must have no threads."""
    from finetune_trainer.training.stack import import_stack as import_it

    here = str(pathlib.Path(sys.executable).parent)
    os.environ["PATH"] = here + os.pathsep + os.environ["PATH"]
    import_it()


class TrainingProcess:
    """One life of a training: the supervisor, and with it the ranks and their helpers."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.is_fresh = False
        """Whether it imports the stack itself."""
        self.started_at = time.monotonic()
        self._exit_code: int | None = None

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self._exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._exit_code = os.waitstatus_to_exitcode(status)
        return self._exit_code

    def wait(self, within: float) -> int:
        """Return the exit code. Raises AssertionError when it still runs after `within` seconds."""
        eventually(lambda: self.exit_code is not None, within=within, every=0.01, otherwise=f"process {self.pid} runs")
        assert self._exit_code is not None
        return self._exit_code

    def list_ranks(self) -> list[int]:
        """Return the process ids of the ranks, in their order; fewer while they start or end."""
        return _list_children(self.pid)

    def list_helpers(self) -> list[int]:
        """Return the process ids of what the ranks started."""
        return [pid for rank in self.list_ranks() for pid in _list_descendants(rank)]

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold all of it still for the block, so that a kill strikes the moment that was looked for."""
        self._send_all(signal.SIGSTOP)
        try:
            yield
        finally:
            self._send_all(signal.SIGCONT)

    def kill(self) -> None:
        """Kill everything at once, and return when nothing of it can write any more."""
        everything = [self.pid, *_list_descendants(self.pid)]
        self._send_all(signal.SIGKILL)
        for pid in everything:
            # The number of a process that has been reaped may be another's by now.
            if pid != self.pid or self._exit_code is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        wait_until_gone(everything)
        self.wait(_END_SECONDS)

    def _send_all(self, number: signal.Signals) -> None:
        # The group's number may be another's once its processes have been reaped.
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)


def wait_until_gone(pids: Collection[int]) -> None:
    """Wait until none of these processes can write any more. Raises AssertionError when one does not end."""
    eventually(
        lambda: not any(map(_is_alive, pids)),
        within=_END_SECONDS,
        every=0.002,
        otherwise=lambda: f"{[pid for pid in pids if _is_alive(pid)]} still run",
    )


def start_forked(work: Callable[[], int], log: pathlib.Path) -> TrainingProcess:
    """Run `work` in a forked process group, which dies with this process; it returns the exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                _write_output_to(log)
                code = work()
        except BaseException:
            with contextlib.suppress(Exception):
                traceback.print_exc()
        finally:
            # On a full disk even this fails; but nothing of the parent's may ever run here.
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    with contextlib.suppress(OSError):
        # Also here: a kill must not come before the group exists.
        os.setpgid(pid, pid)
    return TrainingProcess(pid)


def start_fresh(words: Sequence[str], log: pathlib.Path) -> TrainingProcess:
    """Run a Python command line (`-m module ...`) in a process group of its own, imports and all."""
    process = start_forked(lambda: os.execv(sys.executable, [sys.executable, *words]), log)
    process.is_fresh = True
    return process


def start_training(run: Run, *settings: str, is_fresh: bool = False) -> TrainingProcess:
    """Start `finetune-trainer train` on a workspace; its output goes to `trainer.log` there."""
    log = run.root / "trainer.log"
    if is_fresh:
        return start_fresh(["-m", "finetune_trainer", *run.words("train", *settings)], log)
    return start_forked(lambda: run.call("train", *settings), log)


class StepLog:
    """The newest step that a training has reported to `reports/metrics.jsonl`, read as the file grows.

    With `training.logging_steps=1` that is every step, written before a save at the same step begins.
    """

    def __init__(self, root: pathlib.Path) -> None:
        self._path = root / "reports" / "metrics.jsonl"
        self._offset = 0
        self._rest = b""
        self.newest = 0
        """The last step read, not the highest: after a resume the numbers start again below."""

    def read(self) -> list[int]:
        """Return the steps reported since the last call."""
        return [entry["step"] for entry in self.read_entries()]

    def read_entries(self) -> list[dict[str, Any]]:
        """Return the lines written since the last call: steps, and commits of checkpoints."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        # A start tells where training goes on; nobody has trained that step again.
        entries = [entry for entry in map(_parse_line, lines) if entry is not None and entry.get("event") != START]
        self.newest = entries[-1]["step"] if entries else self.newest
        return entries


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """Return one line; None where a kill or a full disk has cut it short, with another behind it."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _write_output_to(log: pathlib.Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    # Whatever stood in for the standard streams in the parent is not this process's.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def _list_children(pid: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
            children += [int(child) for child in (task / "children").read_text().split()]
    return sorted(children)


def _list_descendants(pid: int) -> list[int]:
    found: list[int] = []
    for child in _list_children(pid):
        found += [child, *_list_descendants(child)]
    return found


def _is_alive(pid: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"
