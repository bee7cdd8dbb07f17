"""Copying a promoted model, or its adapter, to its destinations, each below a folder named by the copy's digest.

The file `COMPLETE` is written last: without it nothing is published. What is there under the same digest is kept when
it is the same, continued when it is part of it, and never overwritten when it is something else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.errors import TrainerError
from finetune_trainer.reporting import emit, write_json
from finetune_trainer.storage.local import resolve_path
from finetune_trainer.storage.location import parse_location
from finetune_trainer.storage.retry import call_with_retries
from finetune_trainer.storage.transfer import hash_file

if TYPE_CHECKING:
    import pathlib

    from finetune_trainer.storage.access import Access

COMPLETE = "COMPLETE"
PROVENANCE = "provenance.json"
"""How a model came about."""
REPORT_PAGE, REPORT_JSON, MODEL_CARD = "report.html", "report.json", "README.md"
"""The run report and the model card, beside the model."""
ACCOUNTS = frozenset((PROVENANCE, REPORT_PAGE, REPORT_JSON, MODEL_CARD))
"""Files that tell how a model came about. Two runs can make the same model, so they are no part of what the digest
names: the account of the run that published first stays."""
WEIGHT_DIFF = "weight-diff"
"""What the difference from the base model is called beside a model."""
CARD_MARK = "<!-- finetune-operator wrote this card. Remove this line to keep it as you have edited it. -->"
"""Stands in every model card of ours: another one on a hub is somebody's own, and is kept."""

Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class LocalFile:
    """One file that is published."""

    path: pathlib.Path
    name: str
    """Path below the folder that it is copied to."""
    size: int
    sha256: str


class Target(Protocol):
    """One destination. Methods raise TrainerError for good, TemporaryError for now."""

    url: str
    """Where the model is found afterwards."""

    def read_complete(self) -> bytes | None:
        """Return the content of COMPLETE, or None."""

    def has_same(self, file: LocalFile) -> bool:
        """Return whether this very file is there already. Raises TrainerError when another one is."""

    def write_file(self, file: LocalFile) -> None:
        """Copy a file and verify what arrived."""

    def write_complete(self, content: bytes) -> None:
        """Write the mark, after everything else."""


def list_model_files(folder: pathlib.Path) -> tuple[LocalFile, ...]:
    """Return the files of a promoted model with their digests."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE)
    return tuple(describe_file(path, path.relative_to(folder).as_posix()) for path in paths)


def describe_file(path: pathlib.Path, name: str) -> LocalFile:
    """Return a file as it is to be published under a name."""
    return LocalFile(path, name, path.stat().st_size, hash_file(path))


def publish_folder(
    destination: str,
    digest: str,
    files: Sequence[LocalFile],
    access: Access,
    *,
    workspace_root: pathlib.Path,
    advance: Advance = lambda _: None,
    part: str = "",
) -> str:
    """Copy a model to one destination and return the URL it has there.

    `part` names what lies beside the model: it has a folder of its own there, and on a hub a tag of its own.
    """
    location = parse_location(destination, access)
    name = f"{digest}-{part}" if part else digest
    if location.scheme == "hf":
        from finetune_trainer.storage.hub_upload import publish_to_hub

        url = publish_to_hub(location, name, files, access, part)
        advance(sum(file.size for file in files))
        return url
    if location.scheme == "s3":
        from finetune_trainer.storage.s3_upload import S3Target

        target: Target = S3Target(location, name, access)
    elif location.scheme in ("pvc", "file"):
        target = FolderTarget(destination, resolve_path(location, access, workspace_root) / name, access, name)
    else:
        raise access.invalid(destination, "nothing can be written there", "Use an s3://, pvc:// or hf:// URL.")
    return _publish(target, name, files, access, advance)


def _publish(target: Target, digest: str, files: Sequence[LocalFile], access: Access, advance: Advance) -> str:
    mark = build_complete(digest, files)
    found = call_with_retries(target.read_complete, access, target.url)
    if found is not None and found != mark:
        raise refuse_other_content(access, f"{target.url}/{COMPLETE}")
    if found is not None:
        emit("the model is there already", destination=target.url)
        advance(sum(file.size for file in files))
        return target.url
    for file in files:
        call_with_retries(lambda file=file: _write_unless_same(target, file), access, f"{target.url}/{file.name}")  # type: ignore[misc]
        advance(file.size)
    call_with_retries(lambda: target.write_complete(mark), access, target.url)
    emit("published", destination=target.url, files=len(files), bytes=sum(file.size for file in files))
    return target.url


def _write_unless_same(target: Target, file: LocalFile) -> None:
    try:
        is_there = target.has_same(file)
    except TrainerError as error:
        if file.name not in ACCOUNTS or error.reason is not Reason.INVALID_CONFIG:
            raise
        is_there = True
    if not is_there:
        target.write_file(file)


def build_complete(digest: str, files: Sequence[LocalFile]) -> bytes:
    """Return the content of COMPLETE: the digest and the size and SHA-256 of every file that it names."""
    named = [file for file in files if file.name not in ACCOUNTS]
    listed = [{"name": file.name, "size": file.size, "sha256": file.sha256} for file in named]
    return (json.dumps({"digest": digest, "files": listed}, indent=1, sort_keys=True) + "\n").encode()


def refuse_other_content(access: Access, where: str) -> TrainerError:
    """Return the error for a place that something else occupies."""
    return TrainerError(
        Reason.INVALID_CONFIG,
        ExitCode.CONFIG,
        f"{access.field}.{access.source_field}: {where} holds other content under the same digest",
        f"Remove it, or name another place in {access.field}.{access.source_field}.",
    )


def damaged(access: Access, where: str, file: LocalFile, found: str) -> TrainerError:
    """Return the error for a file that did not arrive as it left."""
    return TrainerError(
        Reason.DESTINATION_UNAVAILABLE,
        ExitCode.UNAVAILABLE,
        f"{access.field}.{access.source_field}: {where} arrived with SHA-256 {found}, expected {file.sha256}",
        "The copy was removed; it is made anew when the phase runs again.",
    )


class FolderTarget:
    """A folder on the workspace or on this machine."""

    def __init__(self, destination: str, folder: pathlib.Path, access: Access, digest: str) -> None:
        self.url = f"{destination.rstrip('/')}/{digest}"
        self._folder = folder
        self._access = access

    def read_complete(self) -> bytes | None:
        try:
            return (self._folder / COMPLETE).read_bytes()
        except FileNotFoundError:
            return None

    def has_same(self, file: LocalFile) -> bool:
        path = self._folder / file.name
        if not path.exists():
            return False
        if path.stat().st_size == file.size and hash_file(path) == file.sha256:
            return True
        raise refuse_other_content(self._access, f"{self.url}/{file.name}")

    def write_file(self, file: LocalFile) -> None:
        path = self._folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        with open(file.path, "rb") as source, open(partial, "wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())
        found = hash_file(partial)
        if found != file.sha256:
            partial.unlink()
            raise damaged(self._access, f"{self.url}/{file.name}", file, found)
        partial.replace(path)

    def write_complete(self, content: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        value: Any = json.loads(content)
        write_json(self._folder / COMPLETE, value)
