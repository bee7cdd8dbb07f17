"""Which checkpoints may go. Choosing is pure; deleting is apart from it, and may be killed half-way.

Garbage neither counts towards a limit nor is chosen here: `resume` moves it to the quarantine, which is emptied once a
newer checkpoint has been verified. One actor deletes: rank 0 of the newest attempt, or `checkpoints prune` by hand.
Callers pass the fence that is looked at before each deletion.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence

from finetune_trainer.checkpoints.layout import (
    CONVERSION_MARKER,
    CONVERTED,
    DELETING,
    MANIFEST,
    Folder,
    checkpoint_name,
    is_being_deleted,
    list_folders,
    list_quarantined,
)
from finetune_trainer.checkpoints.manifest import read_manifest, sync_folder, verify_checkpoint


@dataclasses.dataclass(frozen=True)
class Committed:
    """A complete checkpoint, as retention sees it."""

    step: int
    metric: float | None = None
    """Value of the metric that names the best; None where it was not measured."""
    num_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Limits:
    """How many checkpoints stay."""

    latest: int
    best: int = 0
    mode: str = "min"
    """min: a lower metric is better; max: a higher one."""


def select_surplus(checkpoints: Sequence[Committed], limits: Limits, protected: Collection[int] = ()) -> list[int]:
    """Return the steps to delete, oldest first: never the newest, one of the best, or a protected one.

    The best one stays even where none was asked for: a metric that somebody measured names it.
    """
    steps = sorted(checkpoint.step for checkpoint in checkpoints)
    kept = set(steps[-max(limits.latest, 1) :]) | set(protected)
    kept |= set(rank_best(checkpoints, limits.mode)[: max(limits.best, 1)])
    return [step for step in steps if step not in kept]


def select_before_save(
    checkpoints: Sequence[Committed], limits: Limits, protected: Collection[int], missing_bytes: float
) -> list[int]:
    """Return the steps to delete before a save for which `missing_bytes` of room are missing.

    These are checkpoints that would go after the save: the oldest first, no more than it needs, and none where all of
    them together would not make the room. The newest complete one stays in any case.
    """
    after = dataclasses.replace(limits, latest=max(limits.latest - 1, 1))
    size = {checkpoint.step: checkpoint.num_bytes for checkpoint in checkpoints}
    chosen: list[int] = []
    for step in select_surplus(checkpoints, after, protected):
        if missing_bytes <= 0:
            break
        chosen.append(step)
        missing_bytes -= size[step]
    return chosen if missing_bytes <= 0 else []


def rank_best(checkpoints: Iterable[Committed], mode: str) -> list[int]:
    """Return the steps of the measured checkpoints, best first; of equal ones the newest first."""
    sign = -1.0 if mode == "max" else 1.0
    measured = [(sign * one.metric, -one.step) for one in checkpoints if one.metric is not None]
    return [-negative for _, negative in sorted(measured)]


def list_committed(root: pathlib.Path, metric: str) -> list[Committed]:
    """List the checkpoints below `root` that verify, with the metric that names the best.

    One that has a manifest and lacks a file must not count: it would push the newest complete one out.
    """
    committed = []
    for folder in list_folders(root):
        if is_being_deleted(folder.path) or verify_checkpoint(folder.path):
            continue
        manifest = read_manifest(folder.path)
        committed.append(Committed(folder.step, manifest.metrics.get(metric), manifest.num_bytes))
    return committed


def delete_checkpoint(folder: pathlib.Path) -> bool:
    """Delete a checkpoint; False where something stayed, to be finished by the next deletion.

    A mark goes in first and comes out last, and the manifest goes before any other file: whatever the moment of a
    kill, the rest is never chosen, and is known as what it is. A link to a folder elsewhere is left alone.
    """
    if folder.is_symlink():
        return False
    mark = folder / DELETING
    # A full volume may have no room for the mark; that must not keep it from being emptied.
    with contextlib.suppress(OSError):
        mark.touch()
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        sync_folder(folder)
        _delete_contents(folder, mark)
        mark.unlink(missing_ok=True)
        folder.rmdir()
    except OSError:
        # A file that another reader holds, or a network hiccup, must not end the training; the next turn tries again.
        return False
    return True


def _delete_contents(folder: pathlib.Path, mark: pathlib.Path) -> None:
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in files:
            path = pathlib.Path(parent, name)
            if path != mark:
                path.unlink()
        for name in folders:
            path = pathlib.Path(parent, name)
            # A linked folder is a link: what it leads to is not part of the checkpoint.
            path.unlink() if path.is_symlink() else path.rmdir()


def delete_steps(root: pathlib.Path, steps: Iterable[int], fence: Callable[[], None]) -> list[Folder]:
    """Delete the checkpoints of some steps, and return those that could not be; `fence` raises to stop."""
    return _delete_folders([Folder(step, root / checkpoint_name(step)) for step in steps], fence)


def delete_quarantine_before(root: pathlib.Path, step: int, fence: Callable[[], None] = lambda: None) -> list[Folder]:
    """Empty the quarantine up to `step`, finish deletions that were cut short, and return what could not be deleted.

    Nothing goes unless the checkpoint of `step` verifies: until then a damaged folder may be all that there is.
    """
    if verify_checkpoint(root / checkpoint_name(step)):
        return []
    return _delete_folders(list_superseded(root, step), fence)


def list_superseded(root: pathlib.Path, step: int) -> list[Folder]:
    """List what a whole checkpoint of `step` makes superfluous: garbage up to that step, and half-deleted folders."""
    garbage = [folder for folder in list_quarantined(root) if folder.step <= step]
    return garbage + [folder for folder in list_folders(root) if _is_left_over(folder, step)]


def _is_left_over(folder: Folder, step: int) -> bool:
    """Whether a deletion was cut short here; its last moment leaves an older folder with nothing in it."""
    return is_being_deleted(folder.path) or (folder.step < step and not any(folder.path.iterdir()))


def _delete_folders(folders: Iterable[Folder], fence: Callable[[], None]) -> list[Folder]:
    failed = []
    for folder in folders:
        fence()
        if not delete_checkpoint(folder.path):
            failed.append(folder)
    return failed


def delete_conversion(root: pathlib.Path) -> None:
    """Delete the checkpoint that was put together anew for other ranks, if there is one: it has been loaded."""
    # The marker goes first: what a deletion cut short leaves behind is not taken for a conversion.
    for marker in (root / CONVERTED).glob(f"*/{CONVERSION_MARKER}"):
        marker.unlink(missing_ok=True)
    shutil.rmtree(root / CONVERTED, ignore_errors=True)
