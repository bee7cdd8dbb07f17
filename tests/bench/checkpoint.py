"""What a save costs training: time of steps with a save minus without, beside `torch.save` and fsync.

The state is real: fp32 weights and the moments of an AdamW that steps, with the gradients left out. It goes through the
trainer's keeper, buffer and writer. A rank is pinned to one core; its writer runs on the others, or on the same one in
the cases named so. Blocks with and without saves take turns, so that what else the machine does meets both alike, and
are as long as the writing beside them. The k-th step after a save counts with its median over all saves: a burst of
other work then falls out. Extra memory of a rank: its buffer, as large as its share of the state. Room on the disk:
twice the state.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")

from finetune_contract.run_config import CheckpointConfig, DatasetConfig, RunConfig, Source
from tests.bench.results import FOLDER, Result, write_results
from tests.bench.scratch import make_scratch
from tests.bench.training_process import start_forked

GIB = 1 << 30
_BYTES_PER_WEIGHT = 12
_CASE_SECONDS = 900.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One state, on so many ranks."""

    state_bytes: int
    num_rounds: int
    num_ranks: int = 1
    is_one_core: bool = False
    """Whether the writer has to share the rank's core."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of rank 0, which waits for the others at each save; medians over the rounds."""

    stall: float
    """What a save adds to the time of the steps: standing still, and the steps beside the writing being slower."""
    baseline: float
    """The same, of `torch.save` and fsync."""
    standstill: float
    """How long training stands still for a save."""
    commit: float
    """From the start of a save until it is committed."""
    first: float
    """How long training stands still for the first save of all."""
    step: float
    num_steps: int
    """Steps after each save."""


def measure(case: Case, folder: pathlib.Path) -> Measured:
    """Run one case in forked ranks. Raises SystemExit with the log where a rank fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    folder.mkdir(parents=True)
    log, answer = folder / "log", folder / "answer"

    def work(rank: int) -> int:
        os.environ.update(rendezvous, RANK=str(rank), WORLD_SIZE=str(case.num_ranks))
        found = _measure_rank(case, folder, rank)
        if rank == 0:
            answer.write_text(json.dumps(dataclasses.asdict(found)))
        return 0

    processes = [start_forked(lambda rank=rank: work(rank), log) for rank in range(case.num_ranks)]
    try:
        codes = [process.wait(_CASE_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise SystemExit(f"{log.read_text()}\nranks ended with {codes}")
    return Measured(**json.loads(answer.read_text()))


def _measure_rank(case: Case, folder: pathlib.Path, rank: int) -> Measured:
    from finetune_trainer.checkpoints.writer import Writer

    cores = sorted(os.sched_getaffinity(0))
    own = {cores[rank % len(cores)]}
    if case.is_one_core:
        os.sched_setaffinity(0, own)
    writer = Writer.start()
    os.sched_setaffinity(0, own)
    import torch

    torch.set_num_threads(1)
    if case.num_ranks > 1:
        torch.distributed.init_process_group("gloo")
    from finetune_trainer.distributed import ControlGroup
    from finetune_trainer.training.keeper import CheckpointKeeper

    run = RunConfig(Source(""), DatasetConfig(()), workspace=str(folder), checkpoint=CheckpointConfig(keep_latest=1))
    keeper = CheckpointKeeper(run, ControlGroup(), 1, writer=writer)
    keeper.start()
    weight = torch.nn.Parameter(torch.randn(case.state_bytes // _BYTES_PER_WEIGHT // case.num_ranks))
    weight.grad = torch.full_like(weight, 1e-3)
    keeper.reserve(case.state_bytes // case.num_ranks)
    optimizer = torch.optim.AdamW([weight], lr=1e-4, fused=True)
    return _measure_state(case, _State(keeper, weight, optimizer, folder / f"baseline-{rank}.pt"))


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

    def save_not(self) -> None:
        pass

    def save(self) -> None:
        from finetune_trainer.training.snapshot import draw_state

        self.keeper.before_save()
        image = draw_state(f"global_step{self.num_steps}/shard_{self.keeper.group.rank}.pt", self._to_save())
        self.keeper.save(self.num_steps, [image], {})

    def save_with_torch(self) -> None:
        import torch

        with self.baseline_path.open("wb") as file:
            torch.save(self._to_save(), file)
            file.flush()
            os.fsync(file.fileno())
        self.keeper.group.barrier()

    def tidy(self) -> None:
        self.keeper.settle()
        self.baseline_path.unlink(missing_ok=True)
        self.keeper.group.barrier()


def _measure_state(case: Case, state: _State) -> Measured:
    for _ in range(3):
        state.step()
    _time_block(state, state.save, 1)
    first = state.keeper.last_seconds
    num_steps = _count_steps_beside_save(state)
    blocks: dict[str, list[list[float]]] = {"save_not": [], "save": [], "save_with_torch": []}
    standstills, commits = [], []
    for number in range(case.num_rounds):
        names = [*blocks][number % 3 :] + [*blocks][: number % 3]
        for name in names:
            blocks[name].append(_time_block(state, getattr(state, name), num_steps))
        standstills.append(state.keeper.last_seconds)
        commits.append(state.keeper.last_save_seconds)
    step = statistics.median(seconds for block in blocks["save_not"] for seconds in block[1:])
    stall, baseline = (
        sum(statistics.median(times) for times in zip(*blocks[name], strict=True)) - num_steps * step
        for name in ("save", "save_with_torch")
    )
    commit = statistics.median(commits)
    return Measured(stall, baseline, statistics.median(standstills), commit, first, step, num_steps)


def _count_steps_beside_save(state: _State) -> int:
    """Return how many steps cover the writing of a save; the same on every rank."""
    counts = []
    for _ in range(2):
        started = step = state.num_steps
        state.save()
        while state.keeper.latest_complete != step:
            state.step()
        counts.append(state.num_steps - started)
    return max(state.keeper.group.gather(min(counts) * 3 // 2 + 1))


def _time_block(state: _State, save: Callable[[], None], num_steps: int) -> list[float]:
    """Return the times of a save and of each step after it; what is still in flight then is waited for outside them."""
    state.keeper.group.barrier()
    times = []
    for work in [save] + num_steps * [state.step]:
        started = time.monotonic()
        work()
        times.append(time.monotonic() - started)
    state.tidy()
    return times


def _leave(_number: int, _frame: Any) -> NoReturn:
    sys.exit("stopped")


def main() -> None:
    """Measure the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.25, help="size of the largest state")
    parser.add_argument("--rounds", type=int, default=3, help="saves of each kind, per case")
    parser.add_argument("--cases", nargs="*", default=[], help="only these")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _leave)
    size, rounds = int(options.gib * GIB), options.rounds
    cases = {
        "": Case(size, rounds),
        "_one_core": Case(size, rounds, is_one_core=True),
        "_two_ranks": Case(size, rounds, num_ranks=2),
        "_quarter_state": Case(size // 4, rounds),
    }
    results, found = [], {}
    FOLDER.mkdir(parents=True, exist_ok=True)
    with make_scratch(FOLDER, "checkpoint") as folder:
        for suffix, case in cases.items():
            if options.cases and suffix.lstrip("_") not in options.cases:
                continue
            found[suffix] = one = measure(case, folder / f"case{suffix}")
            shutil.rmtree(folder / f"case{suffix}")
            results.append(Result(f"stall_seconds{suffix}", one.stall, "s", "torch.save + fsync", one.baseline))
            results.append(
                Result(f"standstill_seconds{suffix}", one.standstill, "s", "torch.save + fsync", one.baseline)
            )
            results.append(Result(f"first_standstill_seconds{suffix}", one.first, "s"))
            results.append(Result(f"commit_seconds{suffix}", one.commit, "s"))
            print(suffix or "largest", one, flush=True)
    memory = Result("buffer_bytes", size, "B")
    write_results("checkpoint", [*results, memory], options=vars(options))


if __name__ == "__main__":
    main()
