"""Room for the next checkpoint, checked before it is written: a full disk must never surprise a save.

Called by rank 0 with the size that the ranks have counted, and by the writers when a write fails all the same.
"""

from __future__ import annotations

import pathlib
import shutil

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.checkpoints.layout import list_folders
from finetune_trainer.checkpoints.manifest import ManifestError, read_manifest
from finetune_trainer.errors import TrainerError, is_disk_full

SLACK = 1.02
"""What a checkpoint takes on the volume beyond the bytes of its files: blocks, folders, the manifest."""


def read_last_bytes(root: pathlib.Path) -> int:
    """Return the size of the newest committed checkpoint; 0 when there is none."""
    for folder in reversed(list_folders(root)):
        try:
            return read_manifest(folder.path).num_bytes
        except ManifestError:
            continue
    return 0


def read_free_bytes(root: pathlib.Path) -> int:
    """Return how much an unprivileged process may still write."""
    return shutil.disk_usage(root).free


def require_room(root: pathlib.Path, needed_bytes: int, what: str = "the next checkpoint") -> None:
    """Raise TrainerError (StorageFull) with both numbers when what is about to be written does not fit."""
    free = read_free_bytes(root)
    if free >= needed_bytes * SLACK:
        return
    raise TrainerError(
        Reason.STORAGE_FULL,
        ExitCode.STORAGE_FULL,
        f"{what} needs {format_bytes(needed_bytes)}, the workspace has {format_bytes(free)} free; "
        "the checkpoints before it are whole",
        "Raise spec.workspace.size, or lower spec.checkpoint.retention.latest.",
        {"needed_bytes": needed_bytes, "free_bytes": free},
    )


def build_full_error(when: str, free_bytes: int) -> TrainerError:
    """Return the error for a volume that filled up although there was room when it was checked."""
    return TrainerError(
        Reason.STORAGE_FULL,
        ExitCode.STORAGE_FULL,
        f"the workspace filled up {when}: {format_bytes(free_bytes)} were left; the checkpoints before it are whole",
        "Raise spec.workspace.size, or lower spec.checkpoint.retention.latest.",
        {"free_bytes": free_bytes},
    )


def explain_write_error(error: OSError, folder: pathlib.Path) -> TrainerError:
    """Return what a failed write into a checkpoint folder means, with the numbers where the volume is full."""
    if is_disk_full(error):
        return build_full_error(f"while {folder.name} was written", read_free_bytes(folder.parent))
    return TrainerError(
        Reason.RANK_FAILED,
        ExitCode.UNAVAILABLE,
        f"{folder.name} could not be written: {error}",
        "Look at the volume of the workspace; the checkpoints before it are whole.",
    )


def format_bytes(number: float) -> str:
    """Return a size as people write it in a manifest."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} TiB"
