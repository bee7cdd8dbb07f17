"""What `checkpoints prune` deletes: the surplus of retention among whole checkpoints, and garbage where asked to.

The same selection as in training (`retention`), for folders of any trainer. The newest complete checkpoint is read to
its last byte first; without one nothing is deleted.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Collection

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.workspace import Workspace
from finetune_trainer.checkpoints import layout, retention
from finetune_trainer.checkpoints.attempt import read_newest_attempt
from finetune_trainer.checkpoints.doctor import Diagnosis
from finetune_trainer.checkpoints.findings import Examined, Fault
from finetune_trainer.errors import TrainerError


@dataclasses.dataclass(frozen=True)
class PrunePlan:
    """What goes, and what stays."""

    surplus: tuple[pathlib.Path, ...]
    garbage: tuple[pathlib.Path, ...]
    kept: tuple[pathlib.Path, ...]
    freed_bytes: int


def plan_prune(
    diagnosis: Diagnosis, limits: retention.Limits, metric: str, protected: Collection[int], *, with_garbage: bool
) -> PrunePlan:
    """Choose what goes from a diagnosis whose newest complete checkpoint has been confirmed."""
    whole = [one for one in diagnosis.checkpoints if one.is_complete]
    committed = [
        retention.Committed(one.step, one.facts.metrics.get(metric), one.facts.num_bytes)
        for one in whole
        if one.step is not None
    ]
    # The Trainer's own idea of the best stays too: it loads that one at the end of training.
    best = {one.facts.best_step for one in whole if one.facts.best_step is not None}
    steps = set(retention.select_surplus(committed, limits, {*protected, *best}))
    surplus = [one for one in whole if one.step in steps]
    garbage = [
        one for one in diagnosis.checkpoints if _is_garbage(one, diagnosis, protected, with_garbage=with_garbage)
    ]
    quarantined = _list_quarantined(diagnosis, protected) if with_garbage else []
    gone = {one.path for one in (*surplus, *garbage)}
    return PrunePlan(
        surplus=tuple(one.path for one in surplus),
        garbage=(*(one.path for one in garbage), *quarantined),
        kept=tuple(one.path for one in diagnosis.checkpoints if one.path not in gone),
        freed_bytes=sum(one.facts.num_bytes for one in (*surplus, *garbage)) + sum(map(_count_bytes, quarantined)),
    )


def _is_garbage(one: Examined, diagnosis: Diagnosis, protected: Collection[int], *, with_garbage: bool) -> bool:
    """Whether a checkpoint is of no use to anybody: damaged, and older than the newest whole one."""
    newest = diagnosis.chosen
    if one.is_complete or newest is None or newest.step is None or one.step is None or one.step in protected:
        return False
    if Fault.BEING_DELETED in one.faults:
        return True
    return with_garbage and one.step < newest.step


def _list_quarantined(diagnosis: Diagnosis, protected: Collection[int]) -> list[pathlib.Path]:
    newest = diagnosis.chosen
    if newest is None or newest.step is None:
        return []
    found = diagnosis.quarantined
    return [folder.path for folder in found if folder.step <= newest.step and folder.step not in protected]


def _count_bytes(path: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def build_fence(root: pathlib.Path) -> Callable[[], None]:
    """Return a fence that rises when an attempt starts in the folder: from then on that one deletes."""
    file = root / Workspace().attempt_file.name
    before = read_newest_attempt(file)

    def fence() -> None:
        newest = read_newest_attempt(file)
        if newest != before:
            raise TrainerError(
                Reason.FENCED,
                ExitCode.FENCED,
                f"attempt {newest} has started in {root}: it deletes by its own retention, this command stops",
                "Nothing to do, or run the command again once that attempt has ended.",
            )

    return fence


def delete_planned(plan: PrunePlan, fence: Callable[[], None]) -> list[pathlib.Path]:
    """Delete what was planned, oldest first, and return what could not be deleted."""
    failed = []
    for path in (*plan.garbage, *plan.surplus):
        fence()
        if not retention.delete_checkpoint(path):
            failed.append(path)
    return failed


def parse_protected(words: Collection[str]) -> set[int]:
    """Return the steps that `--protect` names, as numbers or as folders. Raises TrainerError."""
    steps = set()
    for word in words:
        step = int(word) if word.isdecimal() else layout.parse_step(pathlib.PurePath(word).name)
        if step is None:
            raise TrainerError(
                Reason.INVALID_CONFIG,
                ExitCode.USAGE,
                f"--protect {word}: neither a step nor a checkpoint",
                "Name a step such as 800, or a folder such as checkpoint-800.",
            )
        steps.add(step)
    return steps
