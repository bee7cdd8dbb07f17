"""What the doctor finds in one checkpoint folder: faults with a stable name, and the facts it could read."""

from __future__ import annotations

import dataclasses
import enum
import pathlib
from collections.abc import Mapping


class Fault(enum.StrEnum):
    """Kinds of damage; the names are part of the command's output and stay."""

    BEING_DELETED = "being-deleted"
    """A deletion that was cut short."""
    EMPTY_FOLDER = "empty-folder"
    SAVE_UNFINISHED = "save-unfinished"
    """The save never came to its end: no manifest, or the mark of an interrupted save."""
    MANIFEST_DAMAGED = "manifest-damaged"
    FILE_DAMAGED = "file-damaged"
    """A file is truncated, or its content is not what was saved."""
    FILE_MISSING = "file-missing"
    FILE_EMPTY = "file-empty"
    LATEST_MISSING = "latest-missing"
    LATEST_DANGLING = "latest-dangling"
    """`latest` names a folder that is not there."""
    STATE_MISSING = "trainer-state-missing"
    STATE_DAMAGED = "trainer-state-damaged"
    SHARDS_MISSING = "shards-missing"
    """Some or all ranks' shards are missing, or they are of different numbers of ranks."""
    WEIGHTS_EMPTY = "weights-empty"
    """Weights of shape (0,): placeholders of ZeRO-3 were saved instead of the weights."""
    WEIGHTS_MISSING = "weights-missing"
    OPTIMIZER_MISSING = "optimizer-missing"
    """Weights only: training cannot be resumed from them."""
    STEP_MISMATCH = "step-mismatch"
    """Folder, trainer_state.json, `latest` and the shards do not speak of the same step."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    fault: Fault
    text: str
    """One line that names the file, what is wrong with it, and what that means where it is not plain."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What could be read of a checkpoint, whole or not; None and "" where it could not."""

    num_bytes: int = 0
    state_step: int | None = None
    """Step that trainer_state.json, or the manifest, gives."""
    world_size: int | None = None
    zero_stage: int | None = None
    dtype: str = ""
    created_at: str = ""
    attempt: int | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Evaluation metrics measured at this step."""
    best_step: int | None = None
    """Step that trainer_state.json names the best so far."""
    notes: tuple[str, ...] = ()
    """What a reader should know and what keeps nobody from resuming."""


@dataclasses.dataclass(frozen=True)
class Examined:
    """One checkpoint folder after its examination."""

    path: pathlib.Path
    step: int | None
    """Step of the folder's name, or of its state where the name has none."""
    is_ours: bool
    """Whether our trainer wrote or adopted it: it is judged by its manifest."""
    findings: tuple[Finding, ...]
    facts: Facts

    @property
    def is_complete(self) -> bool:
        """Whether training can be resumed from it."""
        return not self.findings

    @property
    def faults(self) -> frozenset[Fault]:
        """The kinds of damage found."""
        return frozenset(finding.fault for finding in self.findings)
