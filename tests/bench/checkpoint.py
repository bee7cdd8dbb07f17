"""What a save costs training: time of steps with saves minus without, over the saves, beside `torch.save` and fsync.

The state is real: fp32 weights and the moments of an AdamW that steps, with the gradients left out. It goes through the
trainer's keeper, buffer and writer. A rank is pinned to one core; its writer may use the others. Extra memory of a
rank: its buffer, as large as its share of the state.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")

from finetune_contract.run_config import DatasetConfig, RunConfig, Source
from tests.bench.results import Result, write_results

GIB = 1 << 30
_BYTES_PER_WEIGHT = 12


@dataclasses.dataclass(frozen=True)
class Case:
    """One state, on so many ranks."""

    state_bytes: int
    num_ranks: int
    num_saves: int
    steps_per_save: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """Stalls in seconds, and what a save took until it was committed."""

    stall: float
    baseline: float
    commit: float


def measure(case: Case, folder: pathlib.Path) -> Measured:
    """Run one case in forked ranks, and return the figures of rank 0, which waits for the others at each save."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    reader, writer = os.pipe()
    pids = []
    for rank in range(case.num_ranks):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.environ.update(
                    RANK=str(rank), WORLD_SIZE=str(case.num_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
                )
                found = _measure_rank(case, folder, rank)
                if rank == 0:
                    os.write(writer, f"{found.stall} {found.baseline} {found.commit}".encode())
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    os.close(writer)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(codes):
        raise SystemExit(f"ranks ended with {codes}")
    return Measured(*map(float, os.read(reader, 1000).split()))


def _measure_rank(case: Case, folder: pathlib.Path, rank: int) -> Measured:
    from finetune_trainer.checkpoints.writer import Writer

    writer = Writer.start()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    import torch

    torch.set_num_threads(1)
    if case.num_ranks > 1:
        torch.distributed.init_process_group("gloo")
    from finetune_trainer.distributed import ControlGroup
    from finetune_trainer.training.keeper import CheckpointKeeper

    run = RunConfig(Source(""), DatasetConfig(()), workspace=str(folder))
    keeper = CheckpointKeeper(run, ControlGroup(), 1, writer=writer)
    keeper.start()
    weight = torch.nn.Parameter(torch.randn(case.state_bytes // _BYTES_PER_WEIGHT // case.num_ranks))
    weight.grad = torch.full_like(weight, 1e-3)
    optimizer = torch.optim.AdamW([weight], lr=1e-4)
    state = _State(keeper, weight, optimizer, folder / f"baseline-{rank}.pt")
    keeper.reserve(case.state_bytes // case.num_ranks)
    state.step()
    without = _time_steps(case, state, lambda _: None)
    ours = _time_steps(case, state, state.save)
    commit = keeper.last_save_seconds
    baseline = _time_steps(case, state, state.save_with_torch)
    return Measured((ours - without) / case.num_saves, (baseline - without) / case.num_saves, commit)


@dataclasses.dataclass
class _State:
    keeper: Any
    weight: Any
    optimizer: Any
    baseline_path: pathlib.Path
    num_steps: int = 0

    def step(self) -> None:
        self.optimizer.step()
        self.num_steps += 1
        self.keeper.look()

    def _to_save(self) -> dict[str, Any]:
        return {"weight": self.weight.data, "optimizer": self.optimizer.state_dict()}

    def save(self, _index: int) -> None:
        from finetune_trainer.training.snapshot import draw_state

        self.keeper.before_save()
        image = draw_state(f"global_step{self.num_steps}/shard_{self.keeper.group.rank}.pt", self._to_save())
        self.keeper.save(self.num_steps, [image], {})

    def save_with_torch(self, _index: int) -> None:
        import torch

        with self.baseline_path.open("wb") as file:
            torch.save(self._to_save(), file)
            file.flush()
            os.fsync(file.fileno())
        self.keeper.group.barrier()


def _time_steps(case: Case, state: _State, save: Callable[[int], None]) -> float:
    """Return the time of all steps, a save after every so many; the last save is waited for outside the time."""
    state.keeper.group.barrier()
    started = time.monotonic()
    for index in range(case.num_saves):
        save(index)
        for _ in range(case.steps_per_save):
            state.step()
    seconds = time.monotonic() - started
    state.keeper.settle()
    return seconds


def main() -> None:
    """Measure three cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.25, help="size of the largest state")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="steps after each save")
    options = parser.parse_args()
    size = int(options.gib * GIB)
    cases = {
        "stall_seconds": Case(size, 1, options.saves, options.steps),
        "stall_seconds_quarter_state": Case(size // 4, 1, options.saves, 4 * options.steps),
        "stall_seconds_two_ranks": Case(size, 2, options.saves, 2 * options.steps),
    }
    results = []
    for metric, case in cases.items():
        folder = pathlib.Path(tempfile.mkdtemp(prefix="bench-checkpoint-"))
        try:
            found = measure(case, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        results.append(Result(metric, found.stall, "s", "torch.save + fsync", found.baseline))
        results.append(Result(metric.replace("stall", "commit"), found.commit, "s"))
    memory = Result("buffer_bytes", size, "B")
    write_results("checkpoint", [*results, memory], options=vars(options))


if __name__ == "__main__":
    main()
