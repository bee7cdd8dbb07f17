"""Names below the checkpoints folder, and the folders found there.

Used by everything that lists, writes or moves checkpoints. The names are those of the Hugging Face Trainer, so that its
own tools still read our folders. Nothing here looks inside a checkpoint.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re

PREFIX = "checkpoint-"
MANIFEST = "finetune-manifest.json"
"""Written last: a folder without it is no checkpoint."""
DELETING = "finetune-deleting"
"""Lies in a folder from the first to the last moment of its deletion: such a folder is no checkpoint."""
PART = "finetune-part-"
"""Prefix of the notes that the ranks leave for the one that commits; gone before the manifest is written."""
QUARANTINE = "quarantine"
"""Where incomplete and damaged checkpoints wait until a newer one has been verified."""
FOREIGN = "foreign"
"""Where another trainer's checkpoints go when ours first works in a folder; nothing there is ever deleted."""
CONVERTED = "universal"
"""Where a checkpoint is put together anew for another number of ranks, until the next one is committed."""
CONVERSION_MARKER = "conversion.json"
"""Written last: a conversion without it was cut short, and is made again."""

_NAME = re.compile(rf"^{PREFIX}(\d+)$")
_QUARANTINED = re.compile(rf"^{PREFIX}(\d+)\.(\d+)$")


@dataclasses.dataclass(frozen=True, order=True)
class Folder:
    """A folder named like a checkpoint, complete or not."""

    step: int
    path: pathlib.Path


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint of one optimizer step."""
    return f"{PREFIX}{step}"


def parse_step(name: str) -> int | None:
    """Return the step that a folder name stands for; None for other names."""
    match = _NAME.match(name)
    return int(match[1]) if match else None


def list_folders(root: pathlib.Path) -> list[Folder]:
    """List the checkpoint folders below `root`, oldest step first; empty when there is no such place."""
    if not root.is_dir():
        return []
    found = [(parse_step(entry.name), entry) for entry in root.iterdir() if entry.is_dir()]
    return sorted(Folder(step, entry) for step, entry in found if step is not None)


def is_being_deleted(folder: pathlib.Path) -> bool:
    """Whether the deletion of a folder has begun; one cut short is finished by the next."""
    return (folder / DELETING).exists()


def next_quarantine_path(root: pathlib.Path, step: int) -> pathlib.Path:
    """Return a free name in the quarantine for the folder of `step`."""
    quarantine = root / QUARANTINE
    number = 0
    while (path := quarantine / f"{checkpoint_name(step)}.{number}").exists():
        number += 1
    return path


def list_quarantined(root: pathlib.Path) -> list[Folder]:
    """List the folders in quarantine, oldest step first."""
    quarantine = root / QUARANTINE
    if not quarantine.is_dir():
        return []
    found = [(_QUARANTINED.match(entry.name), entry) for entry in quarantine.iterdir()]
    return sorted(Folder(int(match[1]), entry) for match, entry in found if match)
