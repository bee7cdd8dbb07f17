"""Saves, commits, rotates and fences the checkpoints of one attempt; the Trainer only says what is in them.

Every rank holds one keeper and calls it at the same points. A save is copied and handed to the rank's writer, training
goes on, and the save is a checkpoint from the moment its manifest is durable. At most one is in flight; one that fails
ends the attempt with the same error on every rank, at the next step or save.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_contract.reports import Reason
from finetune_contract.run_config import RunConfig
from finetune_contract.workspace import Workspace
from finetune_trainer.checkpoints import layout, retention
from finetune_trainer.checkpoints.attempt import Fence, claim_workspace
from finetune_trainer.checkpoints.commit import CommitPlan, Receipt, Shelf
from finetune_trainer.checkpoints.manifest import Manifest, read_manifest
from finetune_trainer.checkpoints.writer import Commit, Seal, Writer
from finetune_trainer.distributed import ControlGroup
from finetune_trainer.training.host_memory import limit_buffer
from finetune_trainer.training.resuming import choose_checkpoint
from finetune_trainer.training.schedule import count_rows_per_step
from finetune_trainer.training.snapshot import Buffer, Image, copy_images, count_buffer_bytes


@dataclasses.dataclass
class CheckpointKeeper:
    """The checkpoint contract, as the ranks of one attempt carry it out."""

    run: RunConfig
    group: ControlGroup
    attempt: int
    writer: Writer = dataclasses.field(kw_only=True)
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
    _started: float = 0.0
    _in_flight: int | None = None
    """Step of the save that is being written."""
    _buffer: Buffer | None = None

    @property
    def root(self) -> pathlib.Path:
        """The folder that holds the checkpoints."""
        return Workspace(pathlib.Path(self.run.workspace)).checkpoints

    def start(self) -> pathlib.Path | None:
        """Claim the workspace and return the checkpoint to resume from; the same on every rank."""
        self.group.decide(lambda: claim_workspace(self._fence().attempt_file, self.attempt))
        chosen = choose_checkpoint(self.root, self.run.checkpoint.resume, self.group)
        if chosen is None:
            return None
        self.resumed_from = self.latest_complete = chosen.step
        if self.group.rank == 0:
            manifest = read_manifest(chosen.path)
            self.last_bytes, self.last_committed_at = manifest.num_bytes, manifest.created_at
            self.kept, self.best = self._shelf().observe()
        return chosen.path

    def is_saved(self, step: int) -> bool:
        """Whether a step has been saved, or is being saved."""
        return step in (self.latest_complete, self._in_flight)

    def reserve(self, num_bytes: int) -> None:
        """Have this rank's buffer ready for a first save of about this size, while training starts."""
        self.writer.reserve(limit_buffer(num_bytes, 0, self.run.topology.processes_per_node))

    def before_save(self) -> None:
        """Wait for the save before, and check the fence; raises the same TrainerError on every rank."""
        self._started = time.monotonic()
        self.settle()
        self.group.decide(self._fence().require_newest)

    def save(self, step: int, images: Sequence[Image], facts: Mapping[str, Any]) -> None:
        """Copy this rank's files of a save, and have them written and committed while training goes on.

        `facts` are fields of the manifest that differ from save to save: metrics, weights, data_position. Raises the
        same TrainerError on every rank where the workspace has no room for the files of all ranks.
        """
        needed = sum(self.group.gather(sum(image.size for image in images)))
        self.group.decide(lambda: self._make_room(needed))
        folder = self.root / layout.checkpoint_name(step)
        if self._buffer is None:
            self._buffer = Buffer(self.writer)
        wanted = count_buffer_bytes(images)
        self._buffer.grow(limit_buffer(wanted, self.writer.buffer_bytes, self.run.topology.processes_per_node))
        copy_images(images, self._buffer, self.writer, (folder, self._fence()))
        self.writer.submit(Seal(folder, self.group.rank, self.attempt))
        if self.group.rank == 0:
            self.writer.submit(Commit(CommitPlan(self._shelf(), self._build_manifest(step, facts))))
        self._in_flight = step
        self.last_seconds = time.monotonic() - self._started

    def look(self) -> None:
        """Take note, between two steps, of how the save in flight stands; every rank at the same step.

        Raises the same TrainerError on every rank when it has failed on one.
        """
        if self._in_flight is None:
            return
        self.writer.poll()
        has_failed, is_unfinished = self.group.any([self.writer.failure is not None, self.writer.num_outstanding > 0])
        if has_failed:
            self._give_up()
        if not is_unfinished:
            self._note_commit()

    def settle(self) -> None:
        """Wait until no save is in flight. Raises the same TrainerError on every rank when it has failed on one."""
        if self._in_flight is None:
            return
        # The writer of rank 0 commits once all have sealed their parts: where one cannot, that would not end.
        self.writer.wait(num_outstanding=1 if self.group.rank == 0 else 0)
        if self.group.any([self.writer.failure is not None])[0]:
            self._give_up()
        self.writer.wait()
        if self.group.any([self.writer.failure is not None])[0]:
            self._give_up()
        self._note_commit()

    def _note_commit(self) -> None:
        receipt: Receipt = self.group.decide(lambda: self.writer.answer)
        self.latest_complete, self._in_flight = self._in_flight, None
        self.kept, self.best = receipt.kept, receipt.best
        self.last_save_seconds = receipt.ended_at - self._started
        self.last_bytes, self.last_committed_at = receipt.num_bytes, receipt.committed_at

    def _give_up(self) -> None:
        """End the save in flight everywhere, and raise the first rank's error; what was written of it is garbage.

        On a full volume the garbage goes at once: the attempt that goes on needs the room.
        """
        failure = next(one for one in self.group.gather(self.writer.failure) if one is not None)
        self.writer.stop()
        self.group.barrier()
        folder = self.root / layout.checkpoint_name(self._in_flight or 0)
        if self.group.rank == 0 and failure.reason is Reason.STORAGE_FULL and not (folder / layout.MANIFEST).exists():
            retention.delete_checkpoint(folder)
        raise failure

    def _make_room(self, needed_bytes: int) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self._shelf().make_room(needed_bytes, self.latest_complete)

    def _build_manifest(self, step: int, facts: Mapping[str, Any]) -> Manifest:
        return Manifest(
            step=step,
            world_size=self.group.size,
            rows_per_step=count_rows_per_step(self.group.size, self.run.training),
            zero_stage=self.run.training.zero_stage,
            dtype=self.run.training.precision,
            attempt=self.attempt,
            created_at="",
            files={},
            extra=self.extra,
            **facts,
        )

    def _shelf(self) -> Shelf:
        checkpoint = self.run.checkpoint
        limits = retention.Limits(checkpoint.keep_latest, checkpoint.keep_best, checkpoint.best_mode)
        protected = () if self.resumed_from is None else (self.resumed_from,)
        return Shelf(self.root, self._fence(), limits, checkpoint.best_metric, protected)

    def _fence(self) -> Fence:
        return Fence(Workspace(pathlib.Path(self.run.workspace)).attempt_file, self.attempt)
