"""The save engine alone: keeper, writers, supervisor and resume on synthetic state, with neither model nor DeepSpeed.

Each rank's state is a chain: every step changes every byte of it, in place and beside the write of the save before, so
that a torn, stale or foreign byte shows at the next resume and in the digests of the end. A step is reported as a
training reports its own.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from typing import Any

import tests.support.training_runs  # noqa: F401 (sets the environment that torch reads)
from finetune_contract.run_config import CheckpointConfig, DatasetConfig, RunConfig, Source, Topology
from finetune_contract.workspace import Workspace
from finetune_trainer.checkpoints.attempt import read_newest_attempt
from finetune_trainer.checkpoints.writer import Writer
from finetune_trainer.errors import TrainerError
from tests.bench.recovery_faults import EVERY_STEPS, LAST_STEP

NUM_RANKS = 2
NUM_WORDS = 1 << 19
"""Of 8 bytes each, of one rank."""


def train(workspace: Workspace) -> int:
    """Carry the state to the last step in forked ranks of this process, and return the exit code."""
    from finetune_trainer.training.supervisor import run_ranks

    topology = Topology(processes_per_node=NUM_RANKS, in_pod_restarts=2)
    checkpoint = CheckpointConfig(every_steps=EVERY_STEPS, keep_latest=2)
    run = RunConfig(
        Source(""), DatasetConfig(()), workspace=str(workspace.root), topology=topology, checkpoint=checkpoint
    )
    attempt = read_newest_attempt(workspace.attempt_file) + 1
    try:
        return run_ranks(lambda: _run_rank(run, attempt), topology, run.training).exit_code
    except TrainerError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)


def _run_rank(run: RunConfig, attempt: int) -> tuple[int, dict[str, Any]]:
    writer = Writer.start()
    import torch.distributed

    from finetune_trainer.distributed import ControlGroup
    from finetune_trainer.training.keeper import CheckpointKeeper

    torch.distributed.init_process_group("gloo")
    group = ControlGroup()
    keeper = CheckpointKeeper(run, group, attempt, writer=writer)
    found = keeper.start()
    keeper.reserve(8 * NUM_WORDS)
    state = _State(group.rank)
    if found is not None:
        state.resume(found, keeper.resumed_from or 0)
    while state.step < LAST_STEP:
        state.advance()
        group.barrier()
        if group.rank == 0:
            _report(pathlib.Path(run.workspace), state.step)
        keeper.look()
        if state.step % EVERY_STEPS == 0:
            keeper.before_save()
            keeper.save(state.step, state.draw(), {})
    keeper.settle()
    return 0, {}


class _State:
    """One rank's words; `advance` sends each to another of all 2^64, by a step of a full-period generator."""

    def __init__(self, rank: int) -> None:
        import torch

        self._rank = rank
        self.step = 0
        self._words = torch.arange(NUM_WORDS, dtype=torch.int64) * 2654435761 + rank

    def advance(self) -> None:
        self._words.mul_(6364136223846793005).add_(1442695040888963407)
        self.step += 1

    def draw(self) -> list[Any]:
        from finetune_trainer.training.snapshot import draw_bytes, draw_state

        images = [draw_state(self._shard(), {"step": self.step, "words": self._words})]
        if self._rank == 0:
            images.append(draw_bytes("trainer_state.json", json.dumps({"global_step": self.step}).encode()))
        return images

    def resume(self, checkpoint: pathlib.Path, step: int) -> None:
        """Go to a step, and compare the checkpoint with it. Raises RuntimeError where a byte differs."""
        import torch

        while self.step < step:
            self.advance()
        saved = torch.load(checkpoint / self._shard(), weights_only=True)
        if saved["step"] != step or not torch.equal(saved["words"], self._words):
            raise RuntimeError(f"{checkpoint.name} does not hold the state of rank {self._rank} at step {step}")
        self._words = saved["words"]

    def _shard(self) -> str:
        return f"global_step{self.step}/shard_{self._rank}.pt"


def _report(root: pathlib.Path, step: int) -> None:
    path = root / "reports" / "metrics.jsonl"
    path.parent.mkdir(exist_ok=True)
    line = json.dumps({"step": step}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    except OSError:
        # The volume is full: the save must find that out, not the log.
        pass
    finally:
        os.close(descriptor)
