"""The process beside a rank that writes its share of each checkpoint, so that training waits for a copy in memory only.

A rank forks its writer before it has threads, a process group or an accelerator. The two share one buffer (a memfd):
the rank copies whole files into it, as they will lie on the volume, and sends orders; the writer knows none of the
training stack. Orders are answered one by one, in order. After one that failed, all others fail alike: the attempt ends
with that error. Peak extra memory of a rank: the buffer, as large as the rank's share of a checkpoint where the memory
allows it, and a few MiB for the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import multiprocessing
import os
import pathlib
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn, Protocol

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.checkpoints import attempt, commit, disk
from finetune_trainer.checkpoints.files import DirectFile, round_up
from finetune_trainer.checkpoints.manifest import FileEntry, sync_folder
from finetune_trainer.errors import TrainerError, as_trainer_error
from finetune_trainer.processes import die_with

_MADV_POPULATE_WRITE = 23
"""Linux 5.14: map a range at once, in place of a fault for each of its pages."""
_NICENESS = 5
"""Where cores are scarce, training goes first."""


@dataclasses.dataclass(frozen=True)
class Extent:
    """Consecutive bytes of one file, in the buffer."""

    name: str
    """Path relative to the checkpoint."""
    start: int
    length: int
    is_last: bool


class Order(Protocol):
    """Something for the writer to do."""

    def carry_out(self, session: Session) -> Any:
        """Do it in the writer's process, and return the answer."""


class Session:
    """What the writer remembers between orders: the buffer, and the files of the save it is at."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._buffer: mmap.mmap | None = None
        self.open: DirectFile | None = None
        self.sealed: dict[str, FileEntry] = {}

    def map_buffer(self, num_bytes: int) -> mmap.mmap:
        """Return the shared buffer, which the rank may have made larger."""
        if self._buffer is None or len(self._buffer) < num_bytes:
            self._buffer = mmap.mmap(self._memory, num_bytes)
        return self._buffer


@dataclasses.dataclass(frozen=True)
class Reserve:
    """Have the memory of the buffer ready before the first save needs it."""

    num_bytes: int

    def carry_out(self, session: Session) -> None:
        """Make the kernel find and clear the pages."""
        with contextlib.suppress(OSError):
            session.map_buffer(self.num_bytes).madvise(_MADV_POPULATE_WRITE)


@dataclasses.dataclass(frozen=True)
class Write:
    """Write what lies in the buffer."""

    folder: pathlib.Path
    fence: attempt.Fence
    buffer_bytes: int
    extents: Sequence[Extent]

    def carry_out(self, session: Session) -> None:
        """Append the extents to their files; a file is durable with its last one."""
        buffer = memoryview(session.map_buffer(self.buffer_bytes))
        try:
            for extent in self.extents:
                if session.open is None:
                    # A newer attempt may be writing a folder of the same name.
                    self.fence.require_newest()
                    session.open = DirectFile(self.folder / extent.name)
                session.open.append(buffer, extent.start, extent.length)
                if extent.is_last:
                    session.sealed[extent.name] = session.open.seal()
                    session.open = None
        except OSError as error:
            raise disk.explain_write_error(error, self.folder) from error


@dataclasses.dataclass(frozen=True)
class Seal:
    """End this rank's share of a save: note its files beside them, for the one that commits."""

    folder: pathlib.Path
    rank: int
    attempt: int

    def carry_out(self, session: Session) -> None:
        """Make the folders durable, then write the note."""
        try:
            for folder in sorted({(self.folder / name).parent for name in session.sealed}, reverse=True):
                sync_folder(folder)
            commit.write_part(self.folder, commit.Part(self.rank, self.attempt, session.sealed))
        except OSError as error:
            raise disk.explain_write_error(error, self.folder) from error
        session.sealed = {}


@dataclasses.dataclass(frozen=True)
class Commit:
    """Commit the save of all ranks; ordered by rank 0 alone."""

    plan: commit.CommitPlan

    def carry_out(self, session: Session) -> commit.Receipt:
        """Wait for the parts of all ranks, write the manifest, and rotate."""
        return commit.commit_checkpoint(self.plan)


class Writer:
    """A rank's side of its writer."""

    def __init__(self, pid: int, memory: int, connection: Connection) -> None:
        self.pid = pid
        self.failure: TrainerError | None = None
        """Why a save failed; set once an answer has been taken."""
        self.num_outstanding = 0
        """Orders without an answer."""
        self.answer: Any = None
        """The last answer."""
        self._memory = memory
        self._connection = connection
        self._buffer: mmap.mmap | None = None

    @classmethod
    def start(cls) -> Writer:
        """Fork the writer. Call it in the main thread, before there are others."""
        connection, other = multiprocessing.Pipe()
        memory = os.memfd_create("finetune-checkpoint", os.MFD_CLOEXEC)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            connection.close()
            _run(other, memory, parent)
        other.close()
        return cls(pid, memory, connection)

    @property
    def buffer_bytes(self) -> int:
        """Size of the buffer, mapped or only reserved."""
        return os.fstat(self._memory).st_size

    def reserve(self, num_bytes: int) -> None:
        """Make the buffer at least this large, without waiting for it."""
        self.submit(Reserve(self._grow(num_bytes)))

    def map_buffer(self, num_bytes: int) -> mmap.mmap:
        """Return the buffer, made larger where it is smaller than this; a new object when it was."""
        size = round_up(max(num_bytes, 1))
        if self._buffer is None or len(self._buffer) < size:
            self._buffer = mmap.mmap(self._memory, self._grow(size))
            with contextlib.suppress(OSError):
                self._buffer.madvise(_MADV_POPULATE_WRITE)
        return self._buffer

    def _grow(self, num_bytes: int) -> int:
        size = max(round_up(num_bytes), self.buffer_bytes)
        os.ftruncate(self._memory, size)
        return size

    def submit(self, order: Order) -> None:
        """Have an order carried out, after those before it."""
        self.num_outstanding += 1
        try:
            self._connection.send(order)
        except OSError:
            self._note_death()

    def poll(self) -> None:
        """Take the answers that are there."""
        while self.num_outstanding and self._connection.poll():
            self._take()

    def wait(self, num_outstanding: int = 0) -> None:
        """Take answers until so many orders are left, or one has failed."""
        while self.num_outstanding > num_outstanding and self.failure is None:
            self._take()

    def _take(self) -> None:
        try:
            self.answer, failure = self._connection.recv()
        except (EOFError, OSError):
            self._note_death()
            return
        self.num_outstanding -= 1
        self.failure = self.failure or failure

    def _note_death(self) -> None:
        self.num_outstanding = 0
        if self.failure is None:
            self.failure = _describe_death(self.stop())

    def stop(self) -> int:
        """End the writer, whatever it is at, and return its exit code; what it had not sealed is garbage."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        try:
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except ChildProcessError:
            return 0


def _describe_death(code: int) -> TrainerError:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return TrainerError(
        Reason.KILLED,
        ExitCode.USER_CODE,
        f"the process that writes checkpoints {how}",
        "If the node was short of memory, raise spec.resources.memory; the job resumes from the checkpoint before.",
    )


def _run(connection: Connection, memory: int, parent: int) -> NoReturn:
    """Be the writer, until the rank has gone."""
    code = 1
    try:
        die_with(parent)
        # A stop is the rank's to act on: it waits for the save in flight.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        os.nice(_NICENESS)
        _serve(connection, memory)
        code = 0
    finally:
        os._exit(code)


def _serve(connection: Connection, memory: int) -> None:
    session = Session(memory)
    failure: TrainerError | None = None
    while True:
        try:
            order = connection.recv()
        except (EOFError, OSError):
            return
        answer = None
        if failure is None:
            answer, failure = _carry_out(order.carry_out, session)
        connection.send((answer, failure))


def _carry_out(work: Callable[[Session], Any], session: Session) -> tuple[Any, TrainerError | None]:
    try:
        return work(session), None
    except Exception as error:
        return None, as_trainer_error(error)
