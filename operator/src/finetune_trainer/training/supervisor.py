"""Runs the ranks of one pod: forks them from a process that has the stack imported, and says how they ended.

The first failing rank's error becomes the report. A crashed single-node attempt may be restarted here a bounded number
of times, which saves the pod's start and the imports. SIGTERM goes on to the ranks, which save and stop.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from finetune_contract import environment
from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import Topology
from finetune_trainer.distributed import IN_POD_RESTARTS
from finetune_trainer.errors import StopRequested, TrainerError, as_trainer_error
from finetune_trainer.reporting import emit_warning
from finetune_trainer.training import failures, scratch, stacks
from finetune_trainer.training.heartbeat import Heartbeats, Pulse, set_pulse
from finetune_trainer.training.host_memory import HostMemory
from finetune_trainer.training.watch import Watch

Work = Callable[[], tuple[int, dict[str, Any]]]
"""What each rank does: returns its exit code and results."""

RESTARTABLE = frozenset(
    {Reason.KILLED, Reason.RANK_FAILED, Reason.NCCL_ERROR, Reason.NCCL_TIMEOUT, Reason.USER_CODE_ERROR}
)
"""Failures after which the same settings may work."""

_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class ProgressDeadline:
    """When ranks that make no step are ended, and where their stacks go."""

    seconds: float = 0.0
    """0: never."""
    stacks: pathlib.Path | None = None
    """File for the whole stacks; None: they are only printed."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the ranks of this pod ended."""

    exit_code: int
    """OK or SUSPENDED."""
    results: dict[str, Any]
    num_restarts: int


def run_ranks(
    work: Work, topology: Topology, training: Any, deadline: ProgressDeadline = ProgressDeadline()
) -> Outcome:
    """Run `work` in every rank of this pod. Raises TrainerError with the error of the rank that failed first."""
    allowed = topology.in_pod_restarts if topology.nodes == 1 else 0
    for num_restarts in range(allowed + 1):
        launch = _Launch(work, topology, deadline)
        failure = launch.run(training, num_restarts)
        if failure is None:
            stopped = any(end.exit_code == ExitCode.SUSPENDED for end in launch.ends)
            return Outcome(ExitCode.SUSPENDED if stopped else ExitCode.OK, launch.results, num_restarts)
        failure.details["in_pod_restarts"] = num_restarts
        if launch.is_stopping or failure.reason not in RESTARTABLE or num_restarts == allowed:
            raise failure
        emit_warning("ranks restart in this pod", after=failure.message, restart=num_restarts + 1, allowed=allowed)
    raise AssertionError("unreachable: the last launch returns or raises")


class _Launch:
    """One start of every rank of this pod, and how they ended."""

    def __init__(self, work: Work, topology: Topology, deadline: ProgressDeadline) -> None:
        self._work = work
        self._topology = topology
        self._deadline = deadline
        self._first_rank = int(os.environ.get(environment.NODE_RANK) or 0) * topology.processes_per_node
        self._heartbeats = Heartbeats(topology.processes_per_node)
        self._hang: stacks.Hang | None = None
        self._folder = pathlib.Path()
        self.is_stopping = False
        self.ends: list[failures.RankEnd] = []
        self.results: dict[str, Any] = {}

    def run(self, training: Any, num_restarts: int) -> TrainerError | None:
        """Run the ranks to their end; return the error of the one that failed first, if any did."""
        memory = HostMemory()
        num_kills = memory.count_kills()
        scratch.remove_abandoned()
        with scratch.scratch_folder() as self._folder:
            watch = self._fork_all({IN_POD_RESTARTS: str(num_restarts)})
            watch.run()
            self.is_stopping = watch.is_stopping
            was_full = num_kills is not None and (memory.count_kills() or 0) > num_kills
            self.ends = [
                dataclasses.replace(
                    _read_end(self._folder, watch, rank),
                    is_out_of_memory=was_full,
                    memory_limit_bytes=memory.read_limit(),
                )
                for rank in watch.ranks
            ]
            self.results = _read_results(self._folder, self._first_rank)
        if self._hang is not None:
            return self._explain_hang(self._hang)
        first = failures.choose_first(self.ends)
        if first is None:
            return None
        failure = failures.build_failure(first, training)
        failure.details["failed_at"] = round(time.time() - (time.monotonic() - first.ended_at), 3)
        return failure

    def _fork_all(self, common: Mapping[str, str]) -> Watch:
        host, port = _choose_rendezvous(self._topology)
        watch = Watch(self._due if self._deadline.seconds else None, self._note_hang)
        # The signal waits until the child has its own handler: none is lost between fork and installation. Another
        # thread of this process may be given it all the same, so the handler is there first.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        watch.take_signals()
        try:
            for local in range(self._topology.processes_per_node):
                variables = {
                    **common,
                    "RANK": str(self._first_rank + local),
                    "LOCAL_RANK": str(local),
                    "WORLD_SIZE": str(self._topology.nodes * self._topology.processes_per_node),
                    "LOCAL_WORLD_SIZE": str(self._topology.processes_per_node),
                    "MASTER_ADDR": host,
                    "MASTER_PORT": str(port),
                    **({"GLOO_SOCKET_IFNAME": "lo"} if host == "127.0.0.1" else {}),
                }
                self._fork(variables, watch)
        except BaseException:
            watch.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return watch

    def _fork(self, variables: dict[str, str], watch: Watch) -> None:
        reader, writer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        supervisor = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            set_pulse(Pulse(self._heartbeats, int(variables["LOCAL_RANK"])))
            _run_child(self._work, variables, self._folder, (writer, supervisor))
        os.close(writer)
        watch.add(int(variables["RANK"]), pid, reader)

    def _due(self, ranks: Iterable[int]) -> float:
        return self._heartbeats.due(self._deadline.seconds, (rank - self._first_rank for rank in ranks))

    def _note_hang(self, pids: dict[int, int]) -> None:
        self._hang = stacks.Hang(self._deadline.seconds, stacks.collect_stacks(self._folder, pids))
        for stack in self._hang.stacks:
            emit_warning("rank makes no step", rank=stack.rank, at=stack.place)
            print(stack.text, file=sys.stderr, flush=True)

    def _explain_hang(self, hang: stacks.Hang) -> TrainerError:
        where = "the log has every rank's stack"
        if self._deadline.stacks is not None:
            hang.write(self._deadline.stacks)
            where = f"{self._deadline.stacks} has every rank's stack"
        failure = TrainerError(
            Reason.NO_PROGRESS,
            ExitCode.NO_PROGRESS,
            hang.message,
            f"The attempt is repeated; {where}. Raise spec.failurePolicy.progressDeadlineSeconds if steps take longer.",
            {**hang.details, "failed_at": round(time.time(), 3)},
        )
        failure.rank = hang.culprit
        return failure


def _choose_rendezvous(topology: Topology) -> tuple[str, int]:
    if topology.nodes == 1:
        # One pod needs no name service, and a free port lets several runs share a machine.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return "127.0.0.1", int(probe.getsockname()[1])
    _wait_for_name(topology.rendezvous_host)
    return topology.rendezvous_host, topology.rendezvous_port


def _wait_for_name(host: str, timeout_seconds: float = 600.0) -> None:
    """Wait until the pod with index 0 has a name; its record appears only after the pod has an address."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                raise TrainerError(
                    Reason.RANK_FAILED,
                    ExitCode.UNAVAILABLE,
                    f"{host} has had no address for {timeout_seconds:.0f} s: {error}",
                    "Look at the pod with index 0, and at the cluster's name service.",
                ) from error
            time.sleep(1)


def _run_child(work: Work, variables: dict[str, str], folder: pathlib.Path, wiring: tuple[int, int]) -> NoReturn:
    """Be a rank. Leaves with `os._exit`: the supervisor's clean-up and exit handlers are not the rank's."""
    code, rank = 1, int(variables["RANK"])
    try:
        writer, supervisor = wiring
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(1)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.close(writer)
        # Whatever stood in for the standard streams in the supervisor is not this process's.
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        os.environ.update(variables, TOKENIZERS_PARALLELISM="false")
        stacks.answer_signals(folder, rank)
        signal.signal(signal.SIGTERM, _raise_stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        code, results = work()
        _write(folder, rank, {"results": results})
    except StopRequested:
        code = ExitCode.SUSPENDED
    except BaseException as error:
        code = _note_error(folder, rank, error)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _raise_stop(_number: int, _frame: Any) -> None:
    raise StopRequested


def _note_error(folder: pathlib.Path, rank: int, error: BaseException) -> int:
    ended_at = time.monotonic()
    failure = as_trainer_error(error)
    if failure is not error:
        traceback.print_exception(error)
    fields = {
        "reason": failure.reason,
        "exit_code": int(failure.exit_code),
        "message": failure.message,
        "hint": failure.hint,
        "details": failure.details,
    }
    text = f"{type(error).__module__}.{type(error).__name__}: {error}"
    with contextlib.suppress(OSError):
        _write(folder, rank, {"error": fields, "text": text, "ended_at": ended_at})
    return int(failure.exit_code) or 1


def _write(folder: pathlib.Path, rank: int, note: dict[str, Any]) -> None:
    path = folder / f"rank-{rank}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(note, default=str))
    partial.replace(path)


def _read_note(folder: pathlib.Path, rank: int) -> dict[str, Any]:
    try:
        note = json.loads((folder / f"rank-{rank}.json").read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _read_end(folder: pathlib.Path, watch: Watch, rank: int) -> failures.RankEnd:
    note, reaped = _read_note(folder, rank), watch.ranks[rank]
    fields = note.get("error")
    error = None
    if fields:
        error = TrainerError(
            Reason(fields["reason"]),
            fields["exit_code"],
            fields["message"],
            fields["hint"],
            fields["details"],
        )
    return failures.RankEnd(
        rank,
        reaped.exit_code,
        note.get("ended_at", reaped.ended_at),
        error,
        note.get("text", ""),
        "\n".join(reaped.lines),
    )


def _read_results(folder: pathlib.Path, rank: int) -> dict[str, Any]:
    results = _read_note(folder, rank).get("results", {})
    return dict(results)
