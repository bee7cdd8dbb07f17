"""Which rank's error is reported, as what, and with which remedy."""

import dataclasses
import signal

import pytest

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import TrainingConfig
from finetune_trainer.errors import TrainerError, as_trainer_error
from finetune_trainer.training.failures import RankEnd, build_failure, choose_first

TRAINING = TrainingConfig(per_device_batch_size=8, gradient_accumulation_steps=4)

PEER = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:20011"


def test_the_rank_that_began_it_is_reported_not_those_that_lost_it():
    ends = [
        RankEnd(0, 1, ended_at=1.0, text=PEER),
        RankEnd(1, 1, ended_at=2.0, text="ValueError: bad row"),
        RankEnd(2, 1, ended_at=1.5, text=PEER),
    ]

    assert choose_first(ends).rank == 1


def test_a_killed_rank_began_it_although_the_others_noted_their_errors_first():
    ends = [RankEnd(0, 1, 1.0, text=PEER), RankEnd(1, -signal.SIGKILL, 3.0)]

    assert choose_first(ends).rank == 1


def test_of_several_own_errors_the_earliest_is_reported():
    ends = [RankEnd(0, 1, 2.0, text="KeyError: 'b'"), RankEnd(1, 1, 1.0, text="KeyError: 'a'")]

    assert choose_first(ends).rank == 1


def test_ranks_that_ended_well_or_stopped_on_request_are_no_failure():
    assert choose_first([RankEnd(0, 0, 1.0), RankEnd(1, ExitCode.SUSPENDED, 1.0)]) is None


@pytest.mark.parametrize(
    ("text", "exit_code", "reason", "code"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", 1, Reason.OUT_OF_MEMORY, 79),
        ("torch.distributed.DistBackendError: NCCL error: unhandled system error", 1, Reason.NCCL_ERROR, 82),
        ("OSError: [Errno 28] No space left on device: '/workspace/x'", 1, Reason.STORAGE_FULL, 73),
        ("RuntimeError: PytorchStreamWriter failed writing file data/0: file write failed", 1, Reason.STORAGE_FULL, 73),
        ("SafetensorError: I/O error: No space left on device (os error 28)", 1, Reason.STORAGE_FULL, 73),
        ("", -signal.SIGKILL, Reason.KILLED, 137),
        ("", -signal.SIGSEGV, Reason.KILLED, 139),
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", 1, Reason.XID_ERROR, 81),
        ("RuntimeError: CUDA error: unspecified launch failure", 1, Reason.XID_ERROR, 81),
        ("RuntimeError: GPU has fallen off the bus", 1, Reason.XID_ERROR, 81),
        ("NVRM: Xid (PCI:0000:c1:00): 79, pid=1234, GPU has fallen off the bus.", 1, Reason.XID_ERROR, 81),
        ("NVRM: Xid (PCI:0000:c1:00): 94, Contained ECC", 1, Reason.XID_ERROR, 81),
        ("DistBackendError: NCCL error: unhandled cuda error, uncorrectable ECC error", 1, Reason.XID_ERROR, 81),
        ("NVRM: Xid (PCI:0000:c1:00): 31, MMU Fault: illegal address", 1, Reason.USER_CODE_ERROR, 1),
        ("RuntimeError: CUDA error: device-side assert triggered", 1, Reason.USER_CODE_ERROR, 1),
        ("DistBackendError: Watchdog caught collective operation timeout: ALLREDUCE", 1, Reason.NCCL_TIMEOUT, 82),
        ("RuntimeError: [gloo/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv", 1, Reason.NCCL_TIMEOUT, 82),
        ("OSError: [Errno 28] No space left on device: '/dev/shm/torch_1'", 1, Reason.STORAGE_FULL, 73),
        ("DeepSpeedConfigError: unknown key", 1, Reason.INVALID_CONFIG, 78),
        (PEER, 1, Reason.RANK_FAILED, 85),
        ("ZeroDivisionError: division by zero", 1, Reason.USER_CODE_ERROR, 1),
    ],
)
def test_each_end_has_its_class(text, exit_code, reason, code):
    failure = build_failure(RankEnd(3, exit_code, 1.0, text=text, tail="last words"), TRAINING)

    assert (failure.reason, failure.exit_code, failure.rank) == (reason, code, 3)
    assert failure.details["last_lines"] == "last words"
    assert "rank 3" in failure.message


def test_an_error_that_the_rank_classified_itself_is_kept():
    own = TrainerError(Reason.NON_FINITE_LOSS, ExitCode.USER_CODE, "the loss became nan at step 7")

    assert build_failure(RankEnd(0, 1, 1.0, error=own, text="x"), TRAINING).message == "the loss became nan at step 7"


@pytest.mark.parametrize(
    ("batch", "accumulation", "expected"), [(8, 4, ("4", "8")), (6, 1, ("3", "2")), (5, 1, ("1", "5"))]
)
def test_out_of_memory_names_the_batch_to_try_with_the_same_rows_per_step(batch, accumulation, expected):
    training = TrainingConfig(per_device_batch_size=batch, gradient_accumulation_steps=accumulation)

    hint = build_failure(RankEnd(0, 1, 1.0, text="torch.OutOfMemoryError: CUDA out of memory"), training).hint

    assert f"perDeviceBatchSize to {expected[0]} " in hint
    assert f"gradientAccumulationSteps to {expected[1]}:" in hint


def test_out_of_memory_names_the_batch_also_when_the_rank_has_classified_it():
    own = as_trainer_error(type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2 GiB"))
    text = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"

    failure = build_failure(RankEnd(2, own.exit_code, 1.0, error=own, text=text), TRAINING)

    assert (failure.reason, failure.rank) == (Reason.OUT_OF_MEMORY, 2)
    assert "perDeviceBatchSize to 4" in failure.hint


def test_out_of_memory_at_batch_one_names_other_ways_out():
    text = "torch.OutOfMemoryError: CUDA out of memory"
    with_checkpointing = TrainingConfig(per_device_batch_size=1)
    without = TrainingConfig(per_device_batch_size=1, gradient_checkpointing=False)

    assert "offload to all" in build_failure(RankEnd(0, 1, 1.0, text=text), with_checkpointing).hint
    assert "gradientCheckpointing to true" in build_failure(RankEnd(0, 1, 1.0, text=text), without).hint


def test_a_rank_that_its_watchdog_aborted_is_told_from_its_last_lines():
    tail = "[rank0]: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, OpType=ALLREDUCE)\nAborted"
    aborted = RankEnd(0, -signal.SIGABRT, 1.0, tail=tail)
    own = RankEnd(1, 1, 2.0, text="ValueError: bad row")

    assert choose_first([aborted, own]).rank == 1
    failure = build_failure(aborted, TRAINING)
    assert (failure.reason, failure.exit_code) == (Reason.NCCL_TIMEOUT, ExitCode.COLLECTIVE)
    assert "Watchdog caught" in failure.message


def test_what_a_killed_rank_logged_is_not_taken_for_the_cause():
    tail = "NCCL version 2.27.3+cuda12.9\nstep 3"

    assert build_failure(RankEnd(0, -signal.SIGKILL, 1.0, tail=tail), TRAINING).reason == Reason.KILLED


def test_the_drivers_own_line_in_the_log_names_the_device():
    tail = "NVRM: Xid (PCI:0000:c1:00): 79, GPU has fallen off the bus.\nTraceback\nRuntimeError: CUDA error"
    failure = build_failure(RankEnd(1, 1, 1.0, text="RuntimeError: CUDA error", tail=tail), TRAINING)

    assert failure.reason == Reason.XID_ERROR
    assert failure.message == "rank 1: NVRM: Xid (PCI:0000:c1:00): 79, GPU has fallen off the bus."


def test_a_broken_device_is_the_cause_also_when_its_rank_speaks_of_its_peers():
    broken = RankEnd(0, 1, 2.0, text="DistBackendError: NCCL error: CUDA error: uncorrectable ECC error")
    lost = RankEnd(1, 1, 1.0, text=PEER)

    assert choose_first([broken, lost]).rank == 0


def test_a_rank_that_the_kernel_killed_for_memory_names_what_to_ask_for():
    end = RankEnd(1, -signal.SIGKILL, 1.0, tail="step 3", is_out_of_memory=True, memory_limit_bytes=64 * 2**30)
    failure = build_failure(end, TRAINING)

    assert (failure.reason, failure.exit_code) == (Reason.HOST_OUT_OF_MEMORY, ExitCode.HOST_OUT_OF_MEMORY)
    assert failure.message == "rank 1: the kernel killed it for memory; the limit is 64.0 GiB"
    assert failure.hint == "Set spec.resources.memory to 96Gi."


def test_memory_that_the_kernel_took_from_a_helper_process_is_told_too():
    end = RankEnd(0, 1, 1.0, text="RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed", tail="")
    failure = build_failure(dataclasses.replace(end, is_out_of_memory=True), TRAINING)

    assert failure.reason == Reason.HOST_OUT_OF_MEMORY
    assert "killed a process of this pod" in failure.message
    assert "the node itself ran out" in failure.hint


def test_secrets_in_the_last_lines_are_removed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret_value")
    failure = build_failure(RankEnd(0, 1, 1.0, text="KeyError: 'x'", tail="token hf_very_secret_value"), TRAINING)

    assert failure.details["last_lines"] == "token ***"
