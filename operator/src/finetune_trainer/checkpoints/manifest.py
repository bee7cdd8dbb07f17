"""The commit record of a checkpoint: every file with size and digest, written last and made durable.

A checkpoint exists when its manifest does. Two levels of verification: quick (the manifest's own checksum, every file
with its size; what resume runs) and full (digests too). No rename is relied on: object-store mounts have none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune_trainer.checkpoints.layout import MANIFEST, parse_step

VERSION = 2
"""2 adds the shapes of the weights, the position in the data and the files of random state to 1."""


class ManifestError(ValueError):
    """The manifest is absent or cannot be believed; the message says why."""


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Weight:
    """One tensor of the model, whole."""

    shape: tuple[int, ...]
    dtype: str
    """Name without `torch.`: bfloat16."""

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What was saved, and by whom."""

    step: int
    world_size: int
    zero_stage: int
    dtype: str
    attempt: int
    created_at: str
    files: Mapping[str, FileEntry]
    """By path relative to the checkpoint, with forward slashes."""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Evaluation metrics at this step; retention of the best reads them."""
    weights: Mapping[str, Weight] = dataclasses.field(default_factory=dict)
    """The weights that can be gathered from the shards, by name; of the adapter alone in LoRA."""
    data_position: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Where reading the data goes on: `epoch`, and `rows` read since the start of the run."""
    random_states: Sequence[str] = ()
    """Files with the states of the random generators, one per rank."""
    rows_per_step: int = 0
    """Rows of one optimizer step over all ranks; with the step it says which rows have been trained on."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Facts for people: versions, base model, data digest."""

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.size for entry in self.files.values())


def to_text(manifest: Manifest) -> str:
    """Return the manifest as JSON that carries its own checksum."""
    body = {"version": VERSION, **dataclasses.asdict(manifest)}
    return json.dumps({**body, "checksum": _checksum(body)}, sort_keys=True, indent=1) + "\n"


def parse(text: str) -> Manifest:
    """Parse what `to_text` wrote. Raises ManifestError."""
    try:
        body = json.loads(text)
        checksum = body.pop("checksum")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ManifestError("the manifest is not whole") from error
    if checksum != _checksum(body):
        raise ManifestError("the manifest's checksum does not match its content")
    if body.pop("version") not in (1, VERSION):
        raise ManifestError("the manifest has another version; read it with the release that wrote it")
    files = {name: FileEntry(**entry) for name, entry in body.pop("files").items()}
    weights = {name: Weight(tuple(entry["shape"]), entry["dtype"]) for name, entry in body.pop("weights", {}).items()}
    return Manifest(files=files, weights=weights, **body)


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(checkpoint: pathlib.Path) -> Manifest:
    """Read the manifest of a checkpoint folder. Raises ManifestError."""
    try:
        return parse((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ManifestError(f"no {MANIFEST}: the save did not finish") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{MANIFEST} cannot be read: {error}") from error


def write_manifest(checkpoint: pathlib.Path, manifest: Manifest) -> None:
    """Commit a checkpoint whose files are already durable."""
    path = checkpoint / MANIFEST
    with path.open("w", encoding="utf-8") as file:
        file.write(to_text(manifest))
        file.flush()
        os.fsync(file.fileno())
    for folder in (checkpoint, checkpoint.parent):
        sync_folder(folder)


def list_files(checkpoint: pathlib.Path) -> list[str]:
    """List the files of a checkpoint but its manifest, as relative paths."""
    files = (path for path in checkpoint.rglob("*") if path.is_file())
    return sorted(name for name in (path.relative_to(checkpoint).as_posix() for path in files) if name != MANIFEST)


def seal_file(path: pathlib.Path) -> FileEntry:
    """Make one file durable and return its size and digest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(os.fstat(file.fileno()).st_size, digest)


def seal_files(checkpoint: pathlib.Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Seal some files of a checkpoint, and the folders below it that hold them."""
    sealed = {name: seal_file(checkpoint / name) for name in names}
    for folder in {(checkpoint / name).parent for name in sealed}:
        sync_folder(folder)
    return sealed


def sync_folder(folder: pathlib.Path) -> None:
    """Make a folder's entries durable, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network and object-store mounts refuse fsync of folders; the manifest's checksum guards those.
        pass
    finally:
        os.close(descriptor)


def verify_checkpoint(checkpoint: pathlib.Path, full: bool = False) -> list[str]:
    """Return what is wrong with a checkpoint folder; empty when it is complete."""
    try:
        manifest = read_manifest(checkpoint)
    except ManifestError as error:
        return [str(error)]
    problems = []
    if manifest.step != parse_step(checkpoint.name):
        problems.append(f"the manifest is of step {manifest.step}, the folder is {checkpoint.name}")
    return problems + verify_files(checkpoint, manifest.files, full)


def verify_files(checkpoint: pathlib.Path, files: Mapping[str, FileEntry], full: bool) -> list[str]:
    """Return what is wrong with some files of a checkpoint."""
    problems = ((name, _file_problem(checkpoint / name, entry, full)) for name, entry in files.items())
    return [f"{name}: {problem}" for name, problem in problems if problem]


def _file_problem(path: pathlib.Path, entry: FileEntry, full: bool) -> str:
    try:
        size = path.stat().st_size
        if size != entry.size:
            return f"has {size} bytes, not {entry.size}"
        if full and seal_file(path).sha256 != entry.sha256:
            return "its content is not what was saved (SHA-256 differs)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error}"
    return ""
