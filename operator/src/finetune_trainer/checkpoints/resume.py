"""Which checkpoint a starting process resumes from: the newest complete one, whatever lies beside it.

Called by rank 0 of an attempt when it starts, not when its Job is made. What is incomplete or damaged is moved to the
quarantine, so that it can be looked at and cannot be chosen or overwritten.
"""

from __future__ import annotations

import dataclasses
import pathlib

from finetune_trainer.checkpoints.layout import (
    FOREIGN,
    MANIFEST,
    Folder,
    is_being_deleted,
    list_folders,
    next_quarantine_path,
)
from finetune_trainer.checkpoints.manifest import verify_checkpoint


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One folder and what is wrong with it."""

    folder: Folder
    problems: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        """Whether it can be resumed from."""
        return not self.problems


def observe_checkpoints(root: pathlib.Path, full: bool = False) -> list[Verdict]:
    """Verify every checkpoint folder below `root`, oldest step first."""
    return [Verdict(folder, tuple(_find_problems(folder, full))) for folder in list_folders(root)]


def _find_problems(folder: Folder, full: bool) -> list[str]:
    if is_being_deleted(folder.path):
        return ["its deletion was cut short; the next one finishes it"]
    return verify_checkpoint(folder.path, full)


def choose_resume(verdicts: list[Verdict]) -> Folder | None:
    """Return the newest complete checkpoint, or None."""
    complete = [verdict.folder for verdict in verdicts if verdict.is_complete]
    return max(complete, default=None)


def quarantine(root: pathlib.Path, verdicts: list[Verdict]) -> list[Verdict]:
    """Move the incomplete and damaged folders aside, and return their verdicts; nothing is deleted."""
    moved = []
    for verdict in verdicts:
        if verdict.is_complete:
            continue
        move_to_quarantine(root, verdict.folder)
        moved.append(verdict)
    return moved


def move_to_quarantine(root: pathlib.Path, folder: Folder) -> None:
    """Move one folder aside, under a name that keeps its step."""
    target = next_quarantine_path(root, folder.step)
    target.parent.mkdir(exist_ok=True)
    folder.path.rename(target)


def set_foreign_aside(root: pathlib.Path) -> list[pathlib.Path]:
    """Move the checkpoints without manifest of a folder that no attempt of ours has worked in, and return them.

    They are another trainer's, and may be whole: in the quarantine they would be deleted with the garbage.
    """
    moved = []
    for folder in list_folders(root):
        if (folder.path / MANIFEST).exists() or is_being_deleted(folder.path):
            continue
        target = root / FOREIGN / folder.path.name
        number = 0
        while target.exists():
            number += 1
            target = root / FOREIGN / f"{folder.path.name}.{number}"
        target.parent.mkdir(exist_ok=True)
        moved.append(folder.path.rename(target))
    return moved
