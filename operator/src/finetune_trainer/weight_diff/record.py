"""The record of a weight diff, `weight-diff.json`: what it was made from, and how to undo it.

- `version`: 2; `stretchElements`: elements of a tensor that are coded together.
- `base`, `tuned`: `name` of the folder and `digest` of its tensors, whatever files they are spread over.
- `tensors`, by name: `dtype`, `shape` and `sha256` of the tuned bytes; `base` with the same of the base's, absent for a
  tensor that only the tuned model has; `file`, `offset` and `frames`, the compressed length of each stretch.
- `shards`, by the tuned model's file name: the text of its safetensors header.
- `companions`, by relative path: `size` and `sha256` of the other files of the tuned model.
- `files`, by name: `size` and `sha256` of the compressed files of this folder.

A compressed file is a row of Zstandard frames; each holds `bits.encode` of one stretch of `tensors.STRETCH_ELEMENTS`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import TYPE_CHECKING, Any

from finetune_trainer.weight_diff.tensors import STRETCH_ELEMENTS, invalid

if TYPE_CHECKING:
    from collections.abc import Iterable

NAME = "weight-diff.json"
COMPANIONS = "companions"
"""Folder of the tuned model's other files."""
VERSION = 2


@dataclasses.dataclass(frozen=True)
class Side:
    """One tensor as one model has it."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclasses.dataclass(frozen=True)
class TensorDiff:
    """The difference of one tensor, and where it lies."""

    tuned: Side
    base: Side | None
    file: str
    offset: int
    frames: tuple[int, ...]

    def to_entry(self) -> dict[str, Any]:
        """Return the tensor's entry in the record."""
        entry: dict[str, Any] = dataclasses.asdict(self.tuned)
        if self.base is not None:
            entry["base"] = dataclasses.asdict(self.base)
        return entry | {"file": self.file, "offset": self.offset, "frames": list(self.frames)}


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """Size and digest of a file."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Record:
    """What `weight-diff.json` says."""

    base_name: str
    base_digest: str
    tuned_name: str
    tuned_digest: str
    tensors: dict[str, TensorDiff]
    shards: dict[str, str]
    companions: dict[str, FileFacts]
    files: dict[str, FileFacts]

    def to_json(self) -> dict[str, Any]:
        """Return the record as it is written."""
        return {
            "version": VERSION,
            "stretchElements": STRETCH_ELEMENTS,
            "base": {"name": self.base_name, "digest": self.base_digest},
            "tuned": {"name": self.tuned_name, "digest": self.tuned_digest},
            "tensors": {name: tensor.to_entry() for name, tensor in self.tensors.items()},
            "shards": self.shards,
            "companions": {name: dataclasses.asdict(facts) for name, facts in self.companions.items()},
            "files": {name: dataclasses.asdict(facts) for name, facts in self.files.items()},
        }


def make_digest(sides: Iterable[tuple[str, Side]]) -> str:
    """Return the digest of a model's tensors: their names, types, shapes and bytes."""
    lines = (f"{name} {side.dtype} {list(side.shape)} {side.sha256}\n" for name, side in sorted(sides))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_record(folder: pathlib.Path) -> Record:
    """Read the record of a diff. Raises TrainerError naming `--diff`."""
    try:
        data = json.loads((folder / NAME).read_text(encoding="utf-8"))
        if data["version"] != VERSION or data["stretchElements"] != STRETCH_ELEMENTS:
            hint = "Use the version of finetune-trainer that made it."
            raise invalid("--diff", f"{folder / NAME} is of another version ({data['version']})", hint)
        _check_names([*data["shards"], *data["companions"], *data["files"]])
        return Record(
            base_name=data["base"]["name"],
            base_digest=data["base"]["digest"],
            tuned_name=data["tuned"]["name"],
            tuned_digest=data["tuned"]["digest"],
            tensors={name: _read_tensor(entry) for name, entry in data["tensors"].items()},
            shards=dict(data["shards"]),
            companions={name: FileFacts(**entry) for name, entry in data["companions"].items()},
            files={name: FileFacts(**entry) for name, entry in data["files"].items()},
        )
    except FileNotFoundError as error:
        raise invalid("--diff", f"{folder} holds no {NAME}", "Name a folder that weight-diff make wrote.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise invalid("--diff", f"{folder / NAME} is damaged: {error}", "Copy the diff again.") from error


def _check_names(names: list[str]) -> None:
    """A diff comes from elsewhere: it must not name files outside the folders it is read from and written to."""
    for name in names:
        path = pathlib.PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(f"it names the file {name!r}")


def _read_tensor(entry: dict[str, Any]) -> TensorDiff:
    base = _read_side(entry["base"]) if "base" in entry else None
    _check_names([entry["file"]])
    return TensorDiff(_read_side(entry), base, entry["file"], int(entry["offset"]), tuple(entry["frames"]))


def _read_side(entry: dict[str, Any]) -> Side:
    return Side(str(entry["dtype"]), tuple(int(length) for length in entry["shape"]), str(entry["sha256"]))
