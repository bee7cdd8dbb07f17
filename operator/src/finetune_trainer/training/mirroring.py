"""The mirror process: copies committed checkpoints to object storage beside training, which never waits for it.

Forked by the supervisor of the pod with index 0 before the ranks. It looks at the checkpoints folder by itself, so that
nothing in the training loop knows of it; whatever goes wrong in it is a warning, a count and another try. A guardian
starts it again when it dies. `mirroring` fetches a lost checkpoint first. No torch here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from finetune_contract.reports import ExitCode
from finetune_contract.run_config import RunConfig
from finetune_contract.workspace import Workspace
from finetune_trainer.checkpoints import attempt, disk, retention
from finetune_trainer.checkpoints.layout import checkpoint_name
from finetune_trainer.checkpoints.manifest import Manifest
from finetune_trainer.checkpoints.mirror import (
    CheckpointGoneError,
    Copy,
    Mirror,
    list_committed,
    read_own,
    restore_newest,
    select_upload,
)
from finetune_trainer.checkpoints.mirror_state import MirrorState, read_mirror_state, write_mirror_state
from finetune_trainer.errors import StopRequested, TrainerError
from finetune_trainer.processes import die_with
from finetune_trainer.reporting import emit, emit_warning
from finetune_trainer.storage.access import TemporaryError
from finetune_trainer.storage.s3_upload import ChangedFileError

POLL_SECONDS = 2.0
"""How often the checkpoints folder is looked at."""
LONGEST_WAIT_SECONDS = 60.0
"""Longest wait between two tries while the mirror does not answer."""
END_SECONDS = 300.0
"""How long the end of training waits for its checkpoint to be mirrored."""
STOP_SECONDS = 10.0
"""How long a stop on request waits; what is left is sent by the next attempt."""
KILL_SECONDS = 3.0
"""From SIGTERM to SIGKILL: time to remove the parts of an unfinished upload."""


class Uploader:
    """Sends what is committed and deletes what retention gives up, one checkpoint at a time."""

    def __init__(self, mirror: Mirror, run: RunConfig, number: int) -> None:
        workspace = Workspace(pathlib.Path(run.workspace))
        checkpoint = run.checkpoint
        self._mirror = mirror
        self._root = workspace.checkpoints
        self._workspace = workspace
        self._metric = checkpoint.best_metric
        self._limits = retention.Limits(checkpoint.keep_latest, checkpoint.keep_best, checkpoint.best_mode)
        self._fence = lambda: attempt.require_newest(workspace.attempt_file, number)
        self._settled: dict[int, Manifest] = {}
        """Local checkpoints when there was nothing left to do."""
        self._damaged: list[Manifest] = []
        self._has_started = False
        self.state = MirrorState()

    def advance(self) -> bool:
        """Do the next thing that is due; return whether more may be due. Raises TemporaryError and TrainerError."""
        if not self._has_started:
            self._mirror.abort_uploads()
            self._has_started = True
        local = read_own(self._root, self._mirror.identity)
        if local == self._settled:
            return False
        copies = self._mirror.list_copies()
        self._note(step=max((copy.step for copy in copies if copy.manifest is not None), default=None))
        step = self._select(local, copies)
        if step is not None:
            self._send(local[step], copies)
            return True
        self._delete_surplus(copies, max(local, default=0))
        self._settled = local
        return False

    def _select(self, local: Mapping[int, Manifest], copies: list[Copy]) -> int | None:
        mirrored = [copy.manifest for copy in copies if copy.manifest is not None]
        sent = {each.step for each in (*mirrored, *self._damaged) if local.get(each.step) == each}
        committed = list_committed(local.values(), self._metric)
        return select_upload(committed, list_committed(mirrored, self._metric), sent, self._limits)

    def _send(self, manifest: Manifest, copies: list[Copy]) -> None:
        name = checkpoint_name(manifest.step)
        started = time.monotonic()
        try:
            for copy in copies:
                if copy.step == manifest.step:
                    # An earlier attempt's save of the same step; until the new one is whole there is none.
                    self._mirror.withdraw(copy, self._fence)
            num_bytes = self._mirror.send(self._root / name, manifest, self._fence)
        except CheckpointGoneError:
            return
        except ChangedFileError as error:
            self._damaged.append(manifest)
            self._note(failures=self.state.failures + 1)
            emit_warning("a checkpoint on the workspace is damaged and is not mirrored", problem=error.message)
            return
        self._note(step=max(manifest.step, self.state.step or 0), num_bytes=num_bytes)
        seconds = round(time.monotonic() - started, 1)
        emit("checkpoint mirrored", checkpoint=name, sent=disk.format_bytes(num_bytes), seconds=seconds)

    def _delete_surplus(self, copies: list[Copy], newest: int) -> None:
        complete = list_committed((copy.manifest for copy in copies if copy.manifest is not None), self._metric)
        if not complete:
            return
        surplus = set(retention.select_surplus(complete, self._limits, (newest,)))
        last = max(each.step for each in complete)
        for copy in copies:
            if copy.step in surplus or (copy.manifest is None and copy.step < last):
                self._mirror.delete(copy, self._fence)

    def note_failure(self, error: Exception, wait_seconds: float) -> None:
        """Tell of a failure, and of the next try."""
        self._note(failures=self.state.failures + 1)
        why = error.message if isinstance(error, TrainerError) else str(error)
        emit_warning("the mirror failed; training goes on", mirror=self._mirror.url, why=why, again_in=wait_seconds)

    def _note(self, step: int | None = None, num_bytes: int = 0, failures: int | None = None) -> None:
        before = dataclasses.replace(self.state)
        self.state.step = self.state.step if step is None else step
        self.state.bytes += num_bytes
        self.state.failures = self.state.failures if failures is None else failures
        if self.state != before:
            write_mirror_state(self._workspace, self.state)


def run_uploader(uploader: Uploader, finish: int) -> None:
    """Send checkpoints until `finish` is readable and everything is sent, or until a newer attempt owns them."""
    wait = POLL_SECONDS
    while True:
        is_last = _is_readable(finish, 0)
        try:
            while uploader.advance():
                wait = POLL_SECONDS
        except (TemporaryError, TrainerError, OSError) as error:
            if isinstance(error, TrainerError) and error.exit_code == ExitCode.FENCED:
                return
            uploader.note_failure(error, wait)
            # A finish must not turn the waits into a storm of tries.
            if is_last:
                time.sleep(wait)
            else:
                _is_readable(finish, wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
            continue
        if is_last:
            return
        _is_readable(finish, POLL_SECONDS)


def _is_readable(descriptor: int, timeout_seconds: float | None) -> bool:
    return bool(select.select([descriptor], [], [], timeout_seconds)[0])


class MirrorProcess:
    """The mirror process, as the supervisor holds it. Use as a context manager: its end ends the process."""

    def __init__(self, work: Callable[[int], None]) -> None:
        reader, self._writer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        supervisor = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._writer)
            _be_guardian(work, reader, supervisor)
        os.close(reader)
        self._status: int | None = None

    def finish(self, patience_seconds: float) -> bool:
        """Let it send the newest checkpoint and end; return whether it did so in time."""
        # A byte and not the end of the pipe: the ranks hold the pipe open as well.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._writer, b"\n")
        self._reap(patience_seconds)
        return self._status == 0

    def close(self) -> None:
        """End it, whatever it is doing."""
        os.close(self._writer)
        for number, seconds in ((signal.SIGTERM, KILL_SECONDS), (signal.SIGKILL, None)):
            if self._status is None:
                os.kill(self.pid, number)
                self._reap(seconds)

    def _reap(self, seconds: float | None) -> None:
        ended = os.pidfd_open(self.pid)
        try:
            if _is_readable(ended, seconds):
                self._status = os.waitpid(self.pid, 0)[1]
        finally:
            os.close(ended)


def _be_guardian(work: Callable[[int], None], finish: int, supervisor: int) -> NoReturn:
    """Start the worker again whenever it dies, until it has ended well."""
    worker = 0

    def end(_number: int, _frame: Any) -> NoReturn:
        if worker:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(worker, signal.SIGTERM)
                os.waitpid(worker, 0)
        os._exit(0)

    _settle(supervisor, end)
    wait = 1.0
    while True:
        guardian = os.getpid()
        worker = os.fork()
        if worker == 0:
            _be_worker(work, finish, guardian)
        _, status = os.waitpid(worker, 0)
        worker = 0
        if status == 0:
            os._exit(0)
        emit_warning("the mirror process died and is started again", status=os.waitstatus_to_exitcode(status))
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)


def _be_worker(work: Callable[[int], None], finish: int, guardian: int) -> NoReturn:
    code = 1
    try:
        _settle(guardian, _raise_stop)
        work(finish)
        code = 0
    except StopRequested:
        code = 0
    except BaseException as error:
        traceback.print_exception(error)
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def _settle(parent: int, on_term: Callable[[int, Any], Any]) -> None:
    """Live and die with the parent, behind the ranks when the processors are busy."""
    die_with(parent)
    signal.signal(signal.SIGTERM, on_term)
    # Ctrl+C reaches the whole group; the supervisor says when this ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(10 - os.nice(0))


def _raise_stop(_number: int, _frame: Any) -> NoReturn:
    raise StopRequested


@contextlib.contextmanager
def mirroring(run: RunConfig, identity: Mapping[str, str], number: int) -> Iterator[MirrorProcess]:
    """Fetch what the workspace has lost, and mirror what is committed until the block ends.

    For the pod with index 0 only. Raises TrainerError when the mirror does not answer and the workspace is empty.
    """
    workspace = Workspace(pathlib.Path(run.workspace))
    attempt.claim_workspace(workspace.attempt_file, number)
    write_mirror_state(workspace, MirrorState())
    restore_newest(Mirror(run, identity), workspace.checkpoints)
    # Each process has a client of its own: connections do not survive a fork.
    process = MirrorProcess(lambda finish: run_uploader(Uploader(Mirror(run, identity), run, number), finish))
    try:
        yield process
    finally:
        process.close()


def finish_mirror(process: MirrorProcess, run: RunConfig, has_stopped: bool) -> dict[str, int | None]:
    """Wait a bounded time for the last checkpoint to be mirrored; return the entry of the exit report."""
    patience = STOP_SECONDS if has_stopped else END_SECONDS
    if not process.finish(patience):
        emit_warning("the last checkpoint has not been mirrored; it is on the workspace", waited_seconds=patience)
    state = read_mirror_state(Workspace(pathlib.Path(run.workspace)))
    return {"mirrored": state.step if state is not None else None}
