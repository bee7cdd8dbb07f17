"""Commits, rotates and fences the checkpoints of one attempt; the Trainer only writes the files.

Every rank holds one keeper and calls it at the same points. Rank 0 decides and does the I/O that must be done once; a
save is a checkpoint from the moment its manifest is durable.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import RunConfig
from finetune_contract.workspace import Workspace
from finetune_trainer.checkpoints import attempt, disk, layout, retention
from finetune_trainer.checkpoints.manifest import (
    FileEntry,
    Manifest,
    list_files,
    read_manifest,
    seal_files,
    write_manifest,
)
from finetune_trainer.checkpoints.resume import (
    Verdict,
    choose_resume,
    move_to_quarantine,
    observe_checkpoints,
    quarantine,
)
from finetune_trainer.distributed import ControlGroup
from finetune_trainer.errors import TrainerError, is_disk_full
from finetune_trainer.reporting import emit, emit_warning, now_text


@dataclasses.dataclass
class CheckpointKeeper:
    """The checkpoint contract, as the ranks of one attempt carry it out."""

    run: RunConfig
    group: ControlGroup
    attempt: int
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Facts that go into every manifest."""
    resumed_from: int | None = None
    latest_complete: int | None = None
    """Newest step committed or resumed from in this attempt."""
    kept: list[int] = dataclasses.field(default_factory=list)
    best: int | None = None
    last_seconds: float = 0.0
    """How long training stood still for the last save."""
    last_save_seconds: float = 0.0
    """From the start of the last save until it was committed."""
    last_bytes: int = 0
    """Size of `latest_complete`; rank 0 only, like the time."""
    last_committed_at: str = ""
    """When `latest_complete` was committed, RFC 3339."""
    first_estimate_bytes: int = 0
    """Expected size of a checkpoint while there is none to measure."""
    _started: float = 0.0

    @property
    def root(self) -> pathlib.Path:
        """The folder that holds the checkpoints."""
        return Workspace(pathlib.Path(self.run.workspace)).checkpoints

    def start(self) -> pathlib.Path | None:
        """Claim the workspace and return the checkpoint to resume from; the same on every rank."""
        chosen = self.group.decide(self._start_once)
        if chosen is None:
            return None
        self.resumed_from = self.latest_complete = chosen
        return self.root / layout.checkpoint_name(chosen)

    def _start_once(self) -> int | None:
        attempt.claim_workspace(self._attempt_file(), self.attempt)
        verdicts = observe_checkpoints(self.root)
        for verdict in quarantine(self.root, verdicts):
            emit_warning(
                "checkpoint moved to quarantine", checkpoint=verdict.folder.path.name, problem=verdict.problems[0]
            )
        chosen = choose_resume(verdicts) if self.run.checkpoint.resume != "Never" else None
        if self.run.checkpoint.resume == "Never":
            self._set_aside(verdicts)
        if chosen is None:
            return None
        self._require_same_world(chosen)
        self.resumed_from = chosen.step
        manifest = read_manifest(chosen.path)
        self.last_bytes, self.last_committed_at = manifest.num_bytes, manifest.created_at
        self._observe_kept()
        emit("resuming", checkpoint=chosen.path.name)
        return chosen.step

    def _set_aside(self, verdicts: list[Verdict]) -> None:
        """Move the checkpoints of earlier runs aside, so that new ones never mix with them."""
        for verdict in verdicts:
            if verdict.is_complete:
                move_to_quarantine(self.root, verdict.folder)

    def _require_same_world(self, folder: layout.Folder) -> None:
        manifest = read_manifest(folder.path)
        if manifest.world_size == self.group.size and manifest.zero_stage == self.run.training.zero_stage:
            return
        raise TrainerError(
            Reason.INVALID_CONFIG,
            ExitCode.CONFIG,
            f"{folder.path.name} was saved by {manifest.world_size} processes with ZeRO-{manifest.zero_stage}; this "
            f"attempt has {self.group.size} with ZeRO-{self.run.training.zero_stage}",
            f"Set spec.resources so that nodes x processesPerNode is {manifest.world_size} and "
            f"spec.training.deepspeed.zeroStage to {manifest.zero_stage}, or spec.checkpoint.resume to Never.",
        )

    def before_save(self) -> None:
        """Check the fence and the free space; raises the same TrainerError on every rank."""
        self._started = time.monotonic()
        self.group.decide(self._before_save_once)

    def _before_save_once(self) -> None:
        self._require_newest()
        self.root.mkdir(parents=True, exist_ok=True)
        needed = disk.read_last_bytes(self.root) or self.first_estimate_bytes
        if disk.read_free_bytes(self.root) < needed * disk.SLACK:
            self._make_room(needed)
        disk.require_room(self.root, needed)

    def _make_room(self, needed_bytes: int) -> None:
        """Delete before the save what would go after it, garbage first; the newest complete one always stays."""
        if self.latest_complete is not None:
            retention.delete_quarantine_before(self.root, self.latest_complete, self._require_newest)
        missing = needed_bytes * disk.SLACK - disk.read_free_bytes(self.root)
        self._delete(retention.select_before_save(self._list_committed(), self._limits(), self._protected(), missing))

    def commit(self, step: int, metrics: Mapping[str, float]) -> None:
        """Make the files of a save durable, write the manifest last, then rotate."""
        folder = self.root / layout.checkpoint_name(step)
        self.group.barrier()
        names = self.group.decide(lambda: list_files(folder))
        # The ranks share the reading: one process hashes about 1 GB/s.
        share = seal_files(folder, names[self.group.rank :: self.group.size])
        sealed = self.group.gather(share)
        files = {name: entry for part in sealed for name, entry in part.items()}
        self.kept, self.best = self.group.decide(lambda: self._commit_once(folder, step, files, metrics))
        self.latest_complete = step
        self.last_seconds = self.last_save_seconds = time.monotonic() - self._started

    def abandon(self, step: int, error: Exception) -> None:
        """After a save that failed: on a full volume, remove what was written and raise the error with the numbers.

        Libraries say it in many ways, some without the system's error; so the volume itself is asked.
        """
        free = disk.read_free_bytes(self.root)
        if isinstance(error, TrainerError) or (free > disk.FULL_BYTES and not is_disk_full(error)):
            return
        folder = self.root / layout.checkpoint_name(step)
        if not (folder / layout.MANIFEST).exists():
            retention.delete_checkpoint(folder)
        raise disk.build_full_error(f"while {folder.name} was written", free) from error

    def _commit_once(
        self, folder: pathlib.Path, step: int, files: Mapping[str, FileEntry], metrics: Mapping[str, float]
    ) -> tuple[list[int], int | None]:
        self._require_newest()
        manifest = Manifest(
            step=step,
            world_size=self.group.size,
            zero_stage=self.run.training.zero_stage,
            dtype=self.run.training.precision,
            attempt=self.attempt,
            created_at=now_text(),
            files=files,
            metrics=metrics,
            extra=self.extra,
        )
        write_manifest(folder, manifest)
        self.last_bytes, self.last_committed_at = manifest.num_bytes, manifest.created_at
        emit("checkpoint committed", checkpoint=folder.name, size=disk.format_bytes(manifest.num_bytes))
        self._delete(retention.select_surplus(self._list_committed(), self._limits(), self._protected()))
        retention.delete_quarantine_before(self.root, step, self._require_newest)
        self._observe_kept()
        return self.kept, self.best

    def _delete(self, steps: Iterable[int]) -> None:
        for folder in retention.delete_steps(self.root, steps, self._require_newest):
            emit_warning("checkpoint not deleted, trying again after the next save", checkpoint=folder.path.name)

    def _limits(self) -> retention.Limits:
        checkpoint = self.run.checkpoint
        return retention.Limits(checkpoint.keep_latest, checkpoint.keep_best, checkpoint.best_mode)

    def _protected(self) -> tuple[int, ...]:
        return () if self.resumed_from is None else (self.resumed_from,)

    def _require_newest(self) -> None:
        attempt.require_newest(self._attempt_file(), self.attempt)

    def _observe_kept(self) -> None:
        committed = self._list_committed()
        self.kept = [one.step for one in committed]
        ranked = retention.rank_best(committed, self.run.checkpoint.best_mode)
        self.best = ranked[0] if ranked else None

    def _list_committed(self) -> list[retention.Committed]:
        return retention.list_committed(self.root, self.run.checkpoint.best_metric)

    def _attempt_file(self) -> pathlib.Path:
        return Workspace(pathlib.Path(self.run.workspace)).attempt_file
