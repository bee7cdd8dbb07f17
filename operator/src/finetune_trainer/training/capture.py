"""What a save is made of: the states that DeepSpeed would write, and the small files of the Trainer, all in memory.

The Trainer and DeepSpeed save as they always do; their states go to a checkpoint engine that keeps references, and
their small files to a folder of this machine. Nothing of it touches the workspace.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from finetune_trainer.checkpoints.layout import checkpoint_name
from finetune_trainer.training.scratch import scratch_folder
from finetune_trainer.training.snapshot import Image, draw_folder, draw_state


class Capture(CheckpointEngine):  # type: ignore[misc]
    """A checkpoint engine of DeepSpeed that keeps what it is given."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__()
        self.name = "capture"
        self.folder = folder
        """Where the Trainer writes, in place of the folder of the checkpoint."""
        self.states: dict[str, Any] = {}
        """What DeepSpeed saves, by path relative to the checkpoint."""

    def create(self, info: Any) -> None:
        """Begin a checkpoint: nothing to do."""

    def save(self, state_dict: Any, path: str) -> None:
        """Keep a state. It is the live one: it must be copied before the next step."""
        self.states[pathlib.Path(path).relative_to(self.folder).as_posix()] = state_dict

    def load(self, path: str, map_location: Any = None) -> Any:
        """Not for reading."""
        raise NotImplementedError

    def commit(self, info: Any) -> bool:
        """End a checkpoint: that is the keeper's to do."""
        return True

    def preserves_storage_sharing(self) -> bool:
        """Whether DeepSpeed should copy tensors that share memory before it saves them."""
        return False

    def draw_images(self) -> list[Image]:
        """Return the files, tensors not yet copied; those with tensors first."""
        return [draw_state(name, state) for name, state in self.states.items()] + draw_folder(self.folder)


@contextlib.contextmanager
def capturing(engine: Any, step: int) -> Iterator[Capture]:
    """Have what is saved inside the block kept."""
    with scratch_folder() as root:
        stock, capture = engine.checkpoint_engine, Capture(root / checkpoint_name(step))
        capture.folder.mkdir()
        engine.checkpoint_engine = capture
        try:
            yield capture
        finally:
            engine.checkpoint_engine = stock
