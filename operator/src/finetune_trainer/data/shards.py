"""The output files while they grow, shard by shard: what a restart finds of them, it carries on.

A shard is a stretch of all output files that was made durable together. The state written after it says how long each
file was, what had been read and counted, and for which data set; what a killed run wrote after its last shard is cut
off. A state that does not fit what is on the disk counts for nothing, and the work begins anew.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import shutil
from typing import TYPE_CHECKING, Any

from finetune_trainer.data import output
from finetune_trainer.data.report import Tally
from finetune_trainer.data.row_work import Position
from finetune_trainer.reporting import write_json

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Mapping, Sequence

SHARD_BYTES = 64 << 20
"""Input that is lost at most when a run is killed."""

STATE = ".shards.json"
DUPLICATES = ".duplicates"
"""Folder of the index of duplicates."""

_START = Position(0, 0, 0, 0)


@dataclasses.dataclass
class Progress:
    """Everything a preparation knows of the rows behind it."""

    tally: Tally
    position: Position = _START
    formats: list[str] = dataclasses.field(default_factory=list)
    """Format of each source whose rows have begun; `auto` until its first row is seen."""
    lowest_share: float = 2.0
    """The smallest holdout share of a kept row; its prompt is held out when chance holds out nothing."""
    num_tokens: int = 0
    num_shards: int = 0

    def to_state(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "tally": self.tally.to_state(),
            "position": dataclasses.asdict(self.position),
            "formats": list(self.formats),
            "lowestShare": self.lowest_share,
            "tokens": self.num_tokens,
            "shards": self.num_shards,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        """Return what `to_state` described. Raises KeyError, TypeError, ValueError for anything else."""
        return cls(
            Tally.from_state(state["tally"]),
            Position(**state["position"]),
            list(state["formats"]),
            float(state["lowestShare"]),
            int(state["tokens"]),
            int(state["shards"]),
        )


class Shards:
    """The state of one data set's output in its folder; `digest` names the data set."""

    def __init__(self, folder: pathlib.Path, digest: str) -> None:
        self._folder = folder
        self._digest = digest
        # The disk is waited for beside the work on the next shard.
        self._disk = concurrent.futures.ThreadPoolExecutor(1, "shards")
        self._last: concurrent.futures.Future[None] | None = None

    def restore(self, names: Sequence[str]) -> tuple[Progress, dict[str, output.LinesFile]] | None:
        """Return what the last finished shard says, with the files cut to it; None: there is nothing to carry on."""
        try:
            state = json.loads((self._folder / STATE).read_text(encoding="utf-8"))
            if state["digest"] != self._digest:
                return None
            progress = Progress.from_state(state["progress"])
            entries = {name: state["files"][name] for name in names}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        files: dict[str, output.LinesFile] = {}
        for name, entry in entries.items():
            file = output.LinesFile.carry_on(self._folder / name, entry)
            if file is None:
                for other in files.values():
                    other.close()
                return None
            files[name] = file
        return progress, files

    def finish(self, progress: Progress, files: Mapping[str, output.LinesFile]) -> None:
        """Begin to make all that was written durable and to note how far it goes; one shard after the other."""
        self.wait()
        progress.num_shards += 1
        for file in files.values():
            file.flush()
        entries = {name: file.to_entry() for name, file in files.items()}
        state = {"digest": self._digest, "files": entries, "progress": progress.to_state()}
        self._last = self._disk.submit(self._write, state, list(files.values()))

    def _write(self, state: dict[str, Any], files: Sequence[output.LinesFile]) -> None:
        for file in files:
            file.sync()
        write_json(self._folder / STATE, state)

    def wait(self) -> None:
        """Return when the last shard is on the disk. Raises OSError."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()

    def close(self) -> None:
        """Let the disk's thread end; what it still does is done first."""
        self._disk.shutdown()

    def drop(self) -> None:
        """Forget the shards, and what killed runs have left half-written: the data set is complete, or begun anew."""
        for leftover in (self._folder / STATE, *self._folder.glob(".*.json.*.partial"), *self._folder.glob("*.new")):
            leftover.unlink(missing_ok=True)
        shutil.rmtree(self._folder / DUPLICATES, ignore_errors=True)
