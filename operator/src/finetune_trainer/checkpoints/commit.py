"""Makes the files of all ranks a checkpoint: waits for their parts, writes the manifest last, then rotates.

Run by the writer of rank 0, beside the training. The ranks' writers share nothing but the folder: each leaves a note of
the files that it has made durable, so that no collective runs in the background and several nodes need no network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Iterable, Mapping

from finetune_trainer.checkpoints import disk, layout, retention
from finetune_trainer.checkpoints.attempt import Fence
from finetune_trainer.checkpoints.manifest import FileEntry, Manifest, write_manifest
from finetune_trainer.reporting import emit, emit_warning, now_text

_POLL_SECONDS = (0.005, 1.0)
"""Shortest and longest time between two looks for the parts of the other ranks."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What one rank has written of a save."""

    rank: int
    attempt: int
    files: Mapping[str, FileEntry]


@dataclasses.dataclass(frozen=True)
class Shelf:
    """The checkpoints below one root, as one attempt may change them."""

    root: pathlib.Path
    fence: Fence
    limits: retention.Limits
    best_metric: str
    protected: tuple[int, ...] = ()

    def observe(self) -> tuple[list[int], int | None]:
        """Return the steps of the complete checkpoints, and the best of them."""
        committed = self._list_committed()
        ranked = retention.rank_best(committed, self.limits.mode)
        return [one.step for one in committed], ranked[0] if ranked else None

    def make_room(self, needed_bytes: int, latest_complete: int | None) -> None:
        """Delete before a save what would go after it, garbage first; the newest complete one always stays.

        Raises TrainerError (StorageFull) where that does not make the room.
        """
        missing = needed_bytes * disk.SLACK - disk.read_free_bytes(self.root)
        if missing > 0:
            retention.delete_conversion(self.root)
            if latest_complete is not None:
                retention.delete_quarantine_before(self.root, latest_complete, self.fence.require_newest)
            missing = needed_bytes * disk.SLACK - disk.read_free_bytes(self.root)
            self._delete(retention.select_before_save(self._list_committed(), self.limits, self.protected, missing))
        disk.require_room(self.root, needed_bytes)

    def rotate(self, step: int) -> None:
        """Delete what the commit of `step` makes superfluous."""
        retention.delete_conversion(self.root)
        self._delete(retention.select_surplus(self._list_committed(), self.limits, self.protected))
        retention.delete_quarantine_before(self.root, step, self.fence.require_newest)

    def _list_committed(self) -> list[retention.Committed]:
        return retention.list_committed(self.root, self.best_metric)

    def _delete(self, steps: Iterable[int]) -> None:
        for folder in retention.delete_steps(self.root, steps, self.fence.require_newest):
            emit_warning("checkpoint not deleted, trying again after the next save", checkpoint=folder.path.name)


@dataclasses.dataclass(frozen=True)
class CommitPlan:
    """A save whose files are being written."""

    shelf: Shelf
    manifest: Manifest
    """Without its files."""


@dataclasses.dataclass(frozen=True)
class Receipt:
    """What a commit has left on the workspace."""

    num_bytes: int
    committed_at: str
    """RFC 3339."""
    ended_at: float
    """When the commit was durable, by the machine's monotonic clock."""
    kept: list[int]
    best: int | None


def write_part(checkpoint: pathlib.Path, part: Part) -> None:
    """Leave the note of one rank, whose files are durable."""
    path = checkpoint / f"{layout.PART}{part.rank}.json"
    # The closing line tells a reader on another node that the note is whole.
    path.write_text(json.dumps(dataclasses.asdict(part)) + "\n", encoding="utf-8")


def read_part(checkpoint: pathlib.Path, rank: int, attempt: int) -> Part | None:
    """Read the note of one rank; None while it is not there, or not whole, or of another attempt."""
    try:
        text = (checkpoint / f"{layout.PART}{rank}.json").read_text(encoding="utf-8")
    except OSError:
        return None
    if not text.endswith("\n"):
        return None
    note = json.loads(text)
    files = {name: FileEntry(**entry) for name, entry in note["files"].items()}
    return Part(rank, attempt, files) if (note["rank"], note["attempt"]) == (rank, attempt) else None


def _await_parts(checkpoint: pathlib.Path, num_ranks: int, attempt: int) -> list[Part]:
    """Return the parts of all ranks. A rank whose writer fails says so to its attempt, which ends this process."""
    parts: list[Part] = []
    pause, longest = _POLL_SECONDS
    while True:
        # Opening a folder makes network file systems look again.
        os.listdir(checkpoint)
        while len(parts) < num_ranks and (part := read_part(checkpoint, len(parts), attempt)):
            parts.append(part)
        if len(parts) == num_ranks:
            return parts
        time.sleep(pause)
        pause = min(2 * pause, longest)


def commit_checkpoint(plan: CommitPlan) -> Receipt:
    """Commit a save once all ranks have written their parts. Raises TrainerError, and OSError."""
    shelf, manifest = plan.shelf, plan.manifest
    folder = shelf.root / layout.checkpoint_name(manifest.step)
    parts = _await_parts(folder, manifest.world_size, manifest.attempt)
    files = {name: entry for part in parts for name, entry in part.files.items()}
    for part in parts:
        with contextlib.suppress(FileNotFoundError):
            (folder / f"{layout.PART}{part.rank}.json").unlink()
    shelf.fence.require_newest()
    manifest = dataclasses.replace(
        manifest,
        files=files,
        random_states=sorted(name for name in files if name.startswith("rng_state")),
        created_at=now_text(),
    )
    try:
        write_manifest(folder, manifest)
    except OSError as error:
        raise disk.explain_write_error(error, folder) from error
    ended_at = time.monotonic()
    emit("checkpoint committed", checkpoint=folder.name, size=disk.format_bytes(manifest.num_bytes))
    shelf.rotate(manifest.step)
    kept, best = shelf.observe()
    return Receipt(manifest.num_bytes, manifest.created_at, ended_at, kept, best)
