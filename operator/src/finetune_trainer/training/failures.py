"""What the end of a rank means: one class, one line, one remedy. Pure; used by the supervisor.

Ranks die in company: when one fails, the others break off with errors about their peers. `choose_first` finds the one
that began it.
"""

from __future__ import annotations

import dataclasses
import re
import signal
from collections.abc import Sequence

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import TrainingConfig
from finetune_trainer.errors import TrainerError

NUM_TAIL_LINES = 12
"""Last lines of the failing rank's output that go into the report."""


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
    """Type and text of the exception, or the last lines of output where there is none."""
    tail: str = ""
    """Last lines of output."""


_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|peer|socket|store.*(timed out|timeout)|heartbeat|"
    r"ProcessGroup|DistNetworkError|DistBackendError|RemoteError",
    re.IGNORECASE,
)
_CUDA_MEMORY = re.compile(r"OutOfMemoryError|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
_NCCL = re.compile(r"\bNCCL\b|ncclUnhandled|ncclSystemError|ncclInternalError|Watchdog caught collective")
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
    return end.exit_code > 0 and bool(_PEER.search(end.text)) and not _CUDA_MEMORY.search(end.text)


def build_failure(end: RankEnd, training: TrainingConfig) -> TrainerError:
    """Return the error to report for the rank that began it."""
    error = _classify(end, training)
    error.rank = end.rank
    if end.tail:
        error.details["last_lines"] = end.tail[-1500:]
    return error


def _classify(end: RankEnd, training: TrainingConfig) -> TrainerError:
    where, line = f"rank {end.rank}", _last_line(end.text or end.tail)
    if _CUDA_MEMORY.search(end.text):
        return out_of_memory(f"{where}: {line}", training)
    if end.error is not None and end.error.reason is not Reason.USER_CODE_ERROR:
        return end.error
    if _DISK.search(end.text):
        hint = "Raise spec.workspace.size, or lower spec.checkpoint.retention.latest."
        return TrainerError(Reason.STORAGE_FULL, ExitCode.STORAGE_FULL, f"{where}: {line}", hint)
    if end.exit_code < 0:
        return _killed(end)
    if _NCCL.search(end.text):
        hint = "Look at the network between the nodes and at the GPUs' health; the attempt is repeated."
        return TrainerError(Reason.NCCL_ERROR, ExitCode.UNAVAILABLE, f"{where}: {line}", hint)
    if _DEEPSPEED_CONFIG.search(end.text):
        hint = "Change spec.training.deepspeed.config: remove the key that is named, or write `auto`."
        return TrainerError(Reason.INVALID_CONFIG, ExitCode.CONFIG, f"{where}: {line}", hint)
    if _is_about_peers(end):
        hint = "A rank of another pod went away first: its report says why. The attempt is repeated."
        return TrainerError(Reason.RANK_FAILED, ExitCode.UNAVAILABLE, f"{where} lost its peers: {line}", hint)
    return TrainerError(Reason.USER_CODE_ERROR, ExitCode.USER_CODE, f"{where}: {line}")


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


def _killed(end: RankEnd) -> TrainerError:
    try:
        name = signal.Signals(-end.exit_code).name
    except ValueError:
        name = f"signal {-end.exit_code}"
    hint = ""
    if -end.exit_code == signal.SIGKILL:
        hint = "If the kernel ran out of memory, raise spec.resources.memory; otherwise the attempt is repeated."
    message = f"rank {end.rank} was killed by {name}"
    if end.tail:
        message += f": {_last_line(end.tail)}"
    return TrainerError(Reason.KILLED, ExitCode.USER_CODE, message, hint)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:600] if lines else "no output"
