"""What the end of a rank means: one class, one line, one remedy. Pure; used by the supervisor.

Ranks die in company: when one fails, the others break off with errors about their peers. `choose_first` finds the one
that began it. The classes, with what follows from each, are listed in operator/docs/failures.md.
"""

from __future__ import annotations

import dataclasses
import re
import signal
from collections.abc import Sequence

from finetune_contract.reports import LAST_LINES, ExitCode, Reason
from finetune_contract.run_config import TrainingConfig
from finetune_trainer.errors import TrainerError, redact
from finetune_trainer.training.host_memory import suggest_memory

NUM_TAIL_LINES = 20
"""Last lines of the failing rank's output that are kept."""
LINE_CHARACTERS = 300
"""Length to which each of them is cut."""
TAIL_CHARACTERS = 1800
"""Length of all of them in the report."""


@dataclasses.dataclass(frozen=True)
class RankEnd:
    """How one rank ended."""

    rank: int
    exit_code: int
    """As of `waitpid`: negative is the number of the signal."""
    ended_at: float
    """Monotonic clock: when the rank noted its error, or when it was reaped."""
    error: TrainerError | None = None
    """The error that the rank itself classified."""
    text: str = ""
    """Type and text of the exception; empty where there is none."""
    tail: str = ""
    """Last lines of output."""
    is_out_of_memory: bool = False
    """The kernel killed a process of this pod for memory."""
    memory_limit_bytes: int = 0
    """Memory limit of the pod; 0: none, or unknown."""

    @property
    def evidence(self) -> str:
        """What there is to tell the cause from: the exception, else the last lines of output.

        Those of a rank that was killed from outside say nothing about why.
        """
        was_killed = self.exit_code < 0 and self.exit_code != -signal.SIGABRT
        return self.text or ("" if was_killed else self.tail)


_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|\bpeer\b|\bsocket|store.*(timed out|timeout)|heartbeat|"
    r"ProcessGroup|DistNetworkError|DistBackendError|RemoteError|remote process exited",
    re.IGNORECASE,
)
_CUDA_MEMORY = re.compile(r"OutOfMemoryError|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
_HARDWARE = re.compile(
    r"uncorrectable (ECC|NVLink)|ECC error|fallen off the bus|unspecified launch failure|hardware stack error|"
    r"no CUDA-capable device is detected|CUDA-capable device\(s\) is/are busy or unavailable|"
    r"CUDA_ERROR_(ECC_UNCORRECTABLE|NVLINK_UNCORRECTABLE|HARDWARE_STACK_ERROR|LAUNCH_FAILED|NO_DEVICE)|"
    r"GPU is lost|CUDA error: unknown error",
    re.IGNORECASE,
)
_XID = re.compile(r"\bXid\b(?:[^:\n]*\([^)\n]*\))?\D{0,16}(\d+)")
_XID_OF_PROGRAMS = frozenset({13, 31, 43, 45, 68})
"""Xids that a program causes with a wrong address or by being ended; NVIDIA lists every other as the device's."""
_DEVICE_ASSERT = re.compile(r"device-side assert", re.IGNORECASE)
_TIMEOUT = re.compile(
    r"Watchdog caught collective operation timeout|NCCL.{0,60}timed? ?out|Timed out waiting \d+ ?ms for (recv|send)|"
    r"Application timeout caused pair closure",
    re.IGNORECASE,
)
_NCCL = re.compile(r"\bNCCL\b|ncclUnhandled|ncclSystemError|ncclInternalError|ncclRemoteError|NET/IB|NET/Socket")
_DISK = re.compile(
    r"No space left on device|Errno 28|os error 28|Disk quota exceeded|"
    r"PytorchStreamWriter failed|inline_container.*(write|unexpected pos)",
    re.IGNORECASE,
)
_DEEPSPEED_CONFIG = re.compile(
    r"DeepSpeedConfigError|DeepSpeedConfigModel|correct the following DeepSpeed config values|"
    r"Check batch related parameters|pydantic.*validation error",
    re.IGNORECASE,
)


def choose_first(ends: Sequence[RankEnd]) -> RankEnd | None:
    """Return the failed rank that began it: the earliest whose error is not about its peers."""
    failed = [end for end in ends if end.exit_code not in (ExitCode.OK, ExitCode.SUSPENDED)]
    return min(failed, key=lambda end: (_is_about_peers(end), end.ended_at), default=None)


def _is_about_peers(end: RankEnd) -> bool:
    if end.error is not None and end.error.reason is not Reason.USER_CODE_ERROR:
        return False
    # NCCL's watchdog aborts the process that waits: its last lines say so.
    is_error = end.exit_code > 0 or end.exit_code == -signal.SIGABRT
    text = end.evidence
    is_own = _CUDA_MEMORY.search(text) or _is_hardware(end)
    return is_error and bool(_PEER.search(text) or _TIMEOUT.search(text)) and not is_own


def _is_hardware(end: RankEnd) -> bool:
    """Do the exception or the last lines speak of a broken device? The driver's own lines end up in either."""
    text = f"{end.text}\n{end.tail}"
    xids = {int(found) for found in _XID.findall(text)}
    return bool(_HARDWARE.search(text)) or bool(xids - _XID_OF_PROGRAMS)


def build_failure(end: RankEnd, training: TrainingConfig) -> TrainerError:
    """Return the error to report for the rank that began it."""
    error = _classify(end, training)
    error.rank = end.rank
    if end.tail:
        error.details[LAST_LINES] = redact(end.tail)[-TAIL_CHARACTERS:]
    return error


def _classify(end: RankEnd, training: TrainingConfig) -> TrainerError:
    message, text = f"rank {end.rank}: {_last_line(end.evidence)}", end.evidence
    if _CUDA_MEMORY.search(text):
        return out_of_memory(message, training)
    if end.error is not None and end.error.reason is not Reason.USER_CODE_ERROR:
        return end.error
    if _DISK.search(text):
        hint = "Raise spec.workspace.size, or lower spec.checkpoint.retention.latest."
        if "/dev/shm" in text:
            hint = "Raise spec.resources.sharedMemory."
        return TrainerError(Reason.STORAGE_FULL, ExitCode.STORAGE_FULL, message, hint)
    if end.is_out_of_memory:
        return _host_out_of_memory(end)
    if _is_hardware(end):
        line = _find_line(end, _HARDWARE) or _find_line(end, _XID) or _last_line(text)
        hint = "The device or its driver failed: the attempt is repeated on another node. Have this one looked at."
        return TrainerError(Reason.XID_ERROR, ExitCode.XID, f"rank {end.rank}: {line}", hint)
    if _TIMEOUT.search(text):
        hint = (
            "A rank did not reach a collective in time; spec.failurePolicy.progressDeadlineSeconds shows where each "
            "rank stands. The attempt is repeated."
        )
        line = _find_line(end, _TIMEOUT) or _last_line(text)
        return TrainerError(Reason.NCCL_TIMEOUT, ExitCode.COLLECTIVE, f"rank {end.rank}: {line}", hint)
    if _NCCL.search(text):
        hint = "Look at the network between the nodes and at the GPUs' health; the attempt is repeated."
        line = _find_line(end, _NCCL) or _last_line(text)
        return TrainerError(Reason.NCCL_ERROR, ExitCode.COLLECTIVE, f"rank {end.rank}: {line}", hint)
    if end.exit_code < 0:
        return _killed(end)
    if _DEEPSPEED_CONFIG.search(text):
        hint = "Change spec.training.deepspeed.config: remove the key that is named, or write `auto`."
        return TrainerError(Reason.INVALID_CONFIG, ExitCode.CONFIG, message, hint)
    if _is_about_peers(end):
        hint = "A rank of another pod went away first: its report says why. The attempt is repeated."
        lost = f"rank {end.rank} lost its peers: {_last_line(text)}"
        return TrainerError(Reason.RANK_FAILED, ExitCode.PEERS_LOST, lost, hint)
    hint = ""
    if _DEVICE_ASSERT.search(text):
        hint = (
            "An index is outside its tensor, most often a token or label outside the vocabulary: set "
            "CUDA_LAUNCH_BLOCKING to 1 in spec.training.pod.env to see the line."
        )
    return TrainerError(Reason.USER_CODE_ERROR, ExitCode.USER_CODE, message, hint)


def out_of_memory(message: str, training: TrainingConfig) -> TrainerError:
    """Return the error for a full accelerator, with the batch to try that keeps the global batch."""
    batch, steps = training.per_device_batch_size, max(training.gradient_accumulation_steps, 1)
    if batch > 1:
        # The nearest divisor below half keeps batch x accumulation the same.
        smaller = max(size for size in range(1, batch // 2 + 1) if (batch * steps) % size == 0)
        hint = (
            f"Set spec.training.perDeviceBatchSize to {smaller} and spec.training.gradientAccumulationSteps to "
            f"{batch * steps // smaller}: the same rows per step."
        )
    elif not training.gradient_checkpointing:
        hint = "Set spec.training.gradientCheckpointing to true."
    else:
        hint = (
            "The batch is already 1: set spec.training.deepspeed.offload to all, lower spec.training.maxLength, "
            "or use more GPUs."
        )
    return TrainerError(Reason.OUT_OF_MEMORY, ExitCode.OUT_OF_MEMORY, message, hint)


def _host_out_of_memory(end: RankEnd) -> TrainerError:
    message = f"rank {end.rank}: the kernel killed it for memory"
    if end.exit_code != -signal.SIGKILL:
        message = f"rank {end.rank}: the kernel killed a process of this pod for memory: {_last_line(end.evidence)}"
    hint = "Set spec.resources.memory, so that the pod is placed where there is room: the node itself ran out."
    if end.memory_limit_bytes:
        message += f"; the limit is {end.memory_limit_bytes / 2**30:.1f} GiB"
        hint = f"Set spec.resources.memory to {suggest_memory(end.memory_limit_bytes)}."
    return TrainerError(Reason.HOST_OUT_OF_MEMORY, ExitCode.HOST_OUT_OF_MEMORY, message, hint)


_SIGNAL_HINTS = {
    signal.SIGKILL: "Somebody killed it: see the events of the pod and its node. The attempt is repeated.",
    signal.SIGBUS: "Shared memory may be full: raise spec.resources.sharedMemory. The attempt is repeated.",
    signal.SIGSEGV: "A native library crashed: its last lines may say where. The attempt is repeated.",
}


def _killed(end: RankEnd) -> TrainerError:
    try:
        number = signal.Signals(-end.exit_code)
        name, hint = number.name, _SIGNAL_HINTS.get(number, "")
    except ValueError:
        name, hint = f"signal {-end.exit_code}", ""
    message = f"rank {end.rank} was killed by {name}"
    if end.tail:
        message += f": {_last_line(end.tail)}"
    # As a shell does it, so that rules on exit codes read as everywhere else: 137 is SIGKILL.
    return TrainerError(Reason.KILLED, 128 - end.exit_code, message, hint)


def _find_line(end: RankEnd, pattern: re.Pattern[str]) -> str:
    """Return the last line that the pattern matches: a driver's line may be followed by many of Python's."""
    lines = [line.strip() for line in f"{end.tail}\n{end.text}".splitlines() if pattern.search(line)]
    return lines[-1][:600] if lines else ""


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:600] if lines else "no output"
