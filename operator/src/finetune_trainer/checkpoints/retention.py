"""Which checkpoints may go. Choosing is pure; deleting is apart from it, and may be killed half-way.

Garbage neither counts towards a limit nor is chosen here: `resume` moves it to the quarantine, which is emptied once a
newer checkpoint has been committed.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Collection, Iterable, Sequence

from finetune_trainer.checkpoints.layout import MANIFEST, Folder, list_folders, list_quarantined
from finetune_trainer.checkpoints.manifest import ManifestError, read_manifest


@dataclasses.dataclass(frozen=True)
class Committed:
    """A complete checkpoint, as retention sees it."""

    step: int
    metric: float | None = None
    """Value of the metric that names the best; None where it was not measured."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How many checkpoints stay."""

    latest: int
    best: int = 0
    mode: str = "min"
    """min: a lower metric is better; max: a higher one."""


def select_surplus(checkpoints: Sequence[Committed], limits: Limits, protected: Collection[int] = ()) -> list[int]:
    """Return the steps to delete, oldest first: never the newest, one of the best asked for, or a protected one."""
    steps = sorted(checkpoint.step for checkpoint in checkpoints)
    kept = set(steps[-max(limits.latest, 1) :]) | set(protected)
    kept |= set(rank_best(checkpoints, limits.mode)[: limits.best])
    return [step for step in steps if step not in kept]


def rank_best(checkpoints: Iterable[Committed], mode: str) -> list[int]:
    """Return the steps of the measured checkpoints, best first; of equal ones the newest first."""
    sign = -1.0 if mode == "max" else 1.0
    measured = [(sign * one.metric, -one.step) for one in checkpoints if one.metric is not None]
    return [-negative for _, negative in sorted(measured)]


def list_committed(root: pathlib.Path, metric: str) -> list[Committed]:
    """List the complete checkpoints below `root` with the metric that names the best."""
    committed = []
    for folder in list_folders(root):
        try:
            manifest = read_manifest(folder.path)
        except ManifestError:
            continue
        committed.append(Committed(folder.step, manifest.metrics.get(metric)))
    return committed


def delete_checkpoint(folder: pathlib.Path) -> bool:
    """Delete a checkpoint, manifest first, so that a deletion cut short leaves no folder that looks complete."""
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except OSError:
        # A file that another reader holds, or a network hiccup, must not end the training; the next turn tries again.
        return False
    return True


def delete_quarantine_before(root: pathlib.Path, step: int) -> list[Folder]:
    """Empty the quarantine of what is older than the committed `step`, or of that step."""
    surplus = [folder for folder in list_quarantined(root) if folder.step <= step]
    return [folder for folder in surplus if delete_checkpoint(folder.path)]
