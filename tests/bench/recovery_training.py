"""Plays one run of a recovery campaign: a training that faults strike one after the other, restarted until it ends."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from typing import Any

from finetune_trainer.checkpoints.layout import list_folders
from tests.bench.recovery_arms import Arm
from tests.bench.recovery_faults import Fault
from tests.bench.small_volume import SmallVolume
from tests.bench.training_process import StepLog, TrainingProcess, wait_until_gone
from tests.support.training_runs import Run
from tests.support.waiting import eventually

HANG_SECONDS = 300.0
"""A training that reports nothing for so long hangs; DeepSpeed may compile for minutes at the first start of all."""

MAX_HANDS = 3
"""So often in a row somebody helps a stuck training before its run is given up."""

IN_SAVE_SECONDS = 0.5
"""For so long a disk keeps what the fault left of it; if the save fitted after all, the next one finds nothing."""

POLL_SECONDS = 0.001

NOTHING = "nothing"
"""In place of a fault's target: the training ended by itself."""


@dataclasses.dataclass
class Pace:
    """Usual times, measured in the run without faults; moments are shares of them."""

    start: float = 3.0
    step: float = 0.1
    save: float = 0.05
    imports: float = 15.0
    """What a fresh start takes longer than a forked one."""


@dataclasses.dataclass
class Hit:
    """One fault that struck, and what came of it."""

    fault: Fault
    reached: int | None
    """Last step reported in the life that was struck; None: it had not reported any."""
    complete_before: int
    """Newest complete checkpoint when the fault struck; 0: none."""
    struck: str
    """What was killed: all, supervisor, rank or writer; disk: nothing was."""
    was_inside: bool
    """Whether a save had begun that was not complete when it struck."""
    problems: list[str]
    """What was wrong with the newest complete checkpoint afterwards, every byte looked at."""
    has_resumed: bool | None = None
    """Whether training went on without anybody's help; None: not known yet."""
    resumed_from: int | None = None
    exit_code: int | None = None
    error: str = ""

    @property
    def lost_steps(self) -> int:
        """Steps that had to be done again."""
        if self.reached is None or self.resumed_from is None:
            return 0
        return max(0, self.reached - self.resumed_from)

    @property
    def has_lost_checkpoint(self) -> bool:
        """Whether a complete checkpoint was damaged or passed over."""
        passed_over = self.resumed_from is not None and self.resumed_from < self.complete_before
        return bool(self.problems) or passed_over

    def to_json(self) -> dict[str, Any]:
        """Return the record of this fault for the campaign's file."""
        derived = {"lost_steps": self.lost_steps, "has_lost_checkpoint": self.has_lost_checkpoint}
        return {**dataclasses.asdict(self), **derived}


class Life:
    """One life of a training, from a start to the fault that ends it or to its own end."""

    def __init__(self, arm: Arm, run: Run, log: StepLog, is_fresh: bool) -> None:
        self.arm, self.run, self._log = arm, run, log
        log.read()
        self.steps: list[int] = []
        """Steps reported in this life."""
        self.saves: dict[int, list[float]] = {}
        """When each save of this life was first seen to have begun, and to be complete."""
        self.process = arm.start(run, is_fresh)
        self.seconds_to_first_step = 0.0
        self.last_heard_at = time.monotonic()
        self._due_at: float | None = None

    def run_until(self, fault: Fault | None, pace: Pace) -> bool:
        """Watch until the moment of `fault` has come; False when the training ended before, or hangs."""
        self._due_at = None
        while self.process.exit_code is None:
            self._look()
            if fault is not None and self._is_due(fault, pace):
                return True
            if time.monotonic() - self.last_heard_at > HANG_SECONDS:
                self.process.kill()
                break
            time.sleep(POLL_SECONDS)
        self._look()
        return False

    def read_rest(self) -> None:
        """Read what was reported until now."""
        self._look()

    def begin_again(self) -> None:
        """Forget this life's steps and saves: its ranks were started again."""
        self.steps, self.saves = [], {}

    def newest_complete(self) -> int:
        """Return the step of the newest complete checkpoint; 0: none."""
        return max((step for step in self._list_steps() if self.arm.is_complete(self.run, step)), default=0)

    def find_open_save(self) -> int | None:
        """Return the step of a save of this life that has begun and is not complete."""
        newest = max(self._list_steps(), default=0)
        is_mine = bool(self.steps) and newest >= self.steps[0]
        return newest if is_mine and newest > self.newest_complete() else None

    def _list_steps(self) -> list[int]:
        return [folder.step for folder in list_folders(self.run.workspace.checkpoints)]

    def _look(self) -> None:
        new = self._log.read()
        now = time.monotonic()
        if new:
            self.last_heard_at = now
            self.seconds_to_first_step = self.seconds_to_first_step or now - self.process.started_at
            self.steps += new
        if not self.steps:
            return
        for step in self._list_steps():
            # What lay there before belongs to an earlier life.
            if step >= self.steps[0]:
                times = self.saves.setdefault(step, [now])
                if len(times) == 1 and self.arm.is_complete(self.run, step):
                    times.append(now)

    def _is_due(self, fault: Fault, pace: Pace) -> bool:
        now = time.monotonic()
        if fault.moment == "start":
            usual = pace.start + (pace.imports if self.process.is_fresh else 0.0)
            return now - self.process.started_at >= fault.share * usual
        if fault.moment == "last-byte":
            return len(self.saves) >= fault.count and self._has_all_bytes()
        if self._due_at is None:
            usual = pace.save if fault.moment == "save" else pace.step
            if len(self.saves if fault.moment == "save" else self.steps) >= fault.count:
                # A disk's share says how much is left of it, not when.
                self._due_at = now + (0.0 if fault.target == "disk" else fault.share * usual)
        return self._due_at is not None and now >= self._due_at

    def _has_all_bytes(self) -> bool:
        """Whether the open save has every file that the last complete one has, none of them shorter than a half."""
        step, before = self.find_open_save(), self.newest_complete()
        if step is None or not before:
            return False
        root = self.run.workspace.checkpoints
        sizes = _list_sizes(root / f"checkpoint-{step}", step)
        wanted = _list_sizes(root / f"checkpoint-{before}", before)
        shards = [name for name in wanted if name.endswith(".pt")]
        return all(name in sizes for name in wanted if "manifest" not in name) and all(
            sizes[name] >= wanted[name] for name in shards
        )


def _list_sizes(folder: Any, step: int) -> dict[str, int]:
    """Return the sizes of the files of a checkpoint; the step in their names is left out."""
    sizes = {}
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                sizes[str(path.relative_to(folder)).replace(f"global_step{step}", "global_step")] = path.stat().st_size
        except FileNotFoundError:
            continue
    return sizes


@dataclasses.dataclass
class Story:
    """What happened in one run."""

    hits: list[Hit]
    is_finished: bool
    weights: dict[str, str]
    """Digests of what the training ended with; empty when it did not end."""
    num_hands: int
    life: Life
    """The last life."""


def play(
    arm: Arm, run: Run, faults: list[Fault], pace: Pace, volume: SmallVolume | None = None, *, last_step: int
) -> Story:
    """Strike `faults` one after the other, restart after each at once, and let the training end."""
    player = _Player(arm, run, list(faults), pace, volume)
    try:
        while not player.has_ended:
            player.live()
    finally:
        player.stop()
    return player.tell(last_step)


class _Player:
    """A run as it goes: the faults still to come, those that struck, and the life it is at."""

    def __init__(self, arm: Arm, run: Run, faults: list[Fault], pace: Pace, volume: SmallVolume | None) -> None:
        self._arm, self._run, self._pace, self._volume = arm, run, pace, volume
        self._waiting = faults
        self._log = StepLog(run.root)
        self._hits: list[Hit] = []
        self._life: Life | None = None
        self._num_hands = self._hands_in_a_row = 0
        self.has_ended = False

    def live(self) -> None:
        """Go on to the next fault, or to the end of the life."""
        fault = self._waiting[0] if self._waiting else None
        life = self._life or Life(self._arm, self._run, self._log, fault is not None and fault.is_fresh)
        self._life = life
        has_come = life.run_until(fault, self._pace)
        if life.steps:
            _settle(self._hits, life.steps[0] - 1)
            self._hands_in_a_row = 0
        if has_come and fault is not None:
            self._hits.append(_strike(life, fault, self._volume))
            self._waiting.pop(0)
            self._life = None if life.process.exit_code is not None else life
        elif life.process.exit_code == 0:
            self.has_ended = True
        else:
            self._help(life)

    def _help(self, life: Life) -> None:
        """Have somebody help, or give the run up."""
        _fail(self._hits, life)
        self._num_hands, self._hands_in_a_row = self._num_hands + 1, self._hands_in_a_row + 1
        if self._hands_in_a_row > MAX_HANDS or not self._arm.lend_a_hand(self._run):
            self.has_ended = True
        else:
            self._life = None

    def stop(self) -> None:
        """Leave no process behind."""
        if self._life is not None and self._life.process.exit_code is None:
            self._life.process.kill()

    def tell(self, last_step: int) -> Story:
        """Return what happened, once it has ended."""
        assert self._life is not None
        is_finished = self._life.process.exit_code == 0
        if is_finished:
            _settle(self._hits, last_step)
        weights = self._arm.read_weights(self._run, last_step) if is_finished else {}
        return Story(self._hits, is_finished, weights, self._num_hands, self._life)


def _settle(hits: list[Hit], resumed_from: int) -> None:
    """Note where training went on after the faults that are not yet settled."""
    for hit in hits:
        if hit.resumed_from is None and hit.fault.target != NOTHING:
            hit.has_resumed = hit.has_resumed is None
            hit.resumed_from = resumed_from


def _fail(hits: list[Hit], life: Life) -> None:
    """Note that a life ended although no fault struck it."""
    tail = (life.run.root / "trainer.log").read_text(errors="replace").strip().splitlines()[-3:]
    error = " / ".join(tail)[-600:]
    if life.steps:
        # Nothing had struck since it last trained: that is the worst of all.
        hits.append(Hit(Fault(NOTHING, "step", 0, 0.0), None, 0, NOTHING, False, [], False, error=error))
    for hit in hits:
        if hit.has_resumed is None:
            hit.has_resumed, hit.error = False, error


def _strike(life: Life, fault: Fault, volume: SmallVolume | None) -> Hit:
    process = life.process
    with process.hold():
        complete = life.newest_complete()
        was_inside = life.find_open_save() is not None
        ranks, helpers = process.list_ranks(), process.list_helpers()
        struck, victim = _choose_victim(fault, process, ranks, helpers)
        if struck == "disk":
            assert volume is not None
            _fill(life, fault, volume)
        elif struck == "all":
            process.kill()
            # Nobody writes any more: what is incomplete now was being written.
            was_inside = life.find_open_save() is not None
        else:
            os.kill(victim, signal.SIGKILL)
    if struck == "disk":
        assert volume is not None
        _await_end(life, fault, volume)
    elif struck == "supervisor":
        # What it leaves behind must end by itself: it would write into the workspace of the next pod.
        wait_until_gone([process.pid, *ranks, *helpers])
        process.wait(HANG_SECONDS)
    elif struck != "all":
        _await_restart(life, struck, ranks)
    life.read_rest()
    reached = life.steps[-1] if life.steps else None
    hit = Hit(fault, reached, complete, struck, was_inside, _find_problems(life, complete), exit_code=process.exit_code)
    life.begin_again()
    return hit


def _find_problems(life: Life, complete: int) -> list[str]:
    """Return what is wrong with the newest complete checkpoint, which must be no older than the one there was."""
    newest = life.newest_complete()
    if newest < complete:
        return [f"checkpoint-{complete} was complete, and is not any more"]
    return life.arm.list_problems(life.run, newest) if newest else []


def _choose_victim(fault: Fault, process: TrainingProcess, ranks: list[int], helpers: list[int]) -> tuple[str, int]:
    """Return what a fault strikes, and its process: a trainer without writers is struck at a rank."""
    if fault.target == "disk":
        return "disk", 0
    if fault.target == "writer" and helpers:
        return "writer", helpers[fault.rank % len(helpers)]
    if fault.target in ("rank", "writer") and ranks:
        return "rank", ranks[fault.rank % len(ranks)]
    return ("supervisor", process.pid) if fault.target == "supervisor" else ("all", process.pid)


def _fill(life: Life, fault: Fault, volume: SmallVolume) -> None:
    """Let the volume run full; a save that has begun still finds room for a share of a checkpoint."""
    checkpoint = max(_count_bytes(life, life.newest_complete()), 1 << 20)
    volume.leave_free(int(fault.share * checkpoint) if fault.moment == "save" else 0)


def _await_end(life: Life, fault: Fault, volume: SmallVolume) -> None:
    """Let whatever is freed be taken too, until the training has stopped by itself; then give the room back."""
    began = time.monotonic()
    while life.process.exit_code is None:
        if fault.moment == "step" or time.monotonic() - began > IN_SAVE_SECONDS:
            volume.leave_free(0)
        if time.monotonic() - began > HANG_SECONDS:
            life.process.kill()
        time.sleep(POLL_SECONDS)
    volume.give_back()


def _count_bytes(life: Life, step: int) -> int:
    return sum(_list_sizes(life.run.workspace.checkpoints / f"checkpoint-{step}", step).values())


def _await_restart(life: Life, struck: str, ranks: list[int]) -> None:
    """Wait until the ranks have been started again, or the pod has ended."""
    eventually(
        lambda: life.process.exit_code is not None or _have_new(ranks, life.process.list_ranks()),
        within=HANG_SECONDS,
        every=POLL_SECONDS,
        otherwise=f"a {struck} was killed, and nothing came of it",
    )


def _have_new(before: list[int], now: list[int]) -> bool:
    """Whether other ranks run; none at all says that the pod is about to end."""
    return bool(now) and not set(before) & set(now)
