"""What every store offers to those who read from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """One file of a source."""

    name: str
    """Path below the source; the base name when the source is a single file."""
    size: int
    """Bytes; -1 when the server does not say."""
    version: str = ""
    """ETag, object version or blob id; the same text means the same content."""
    sha256: str = ""
    """Known beforehand for some files only."""
    key: str = ""
    """The store's own address of the file."""


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of a source at one moment."""

    revision: str
    """What pins them: a commit, an object version or ETag, or a digest of names, sizes and versions."""
    files: tuple[RemoteFile, ...]


class Store(Protocol):
    """One source that can be read. Methods raise TrainerError for good, TemporaryError for now."""

    def list_files(self) -> Listing:
        """Return the files of the source."""

    def stream(self, file: RemoteFile, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Yield a file's bytes from `start`, all or `length` of them."""


def make_listing_revision(files: Iterable[RemoteFile]) -> str:
    """Return a text that changes when any file does."""
    facts = sorted((file.name, file.size, file.version) for file in files)
    return "listing:" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def read_bytes(store: Store, file: RemoteFile, start: int, length: int) -> bytes:
    """Return a stretch of a file; shorter at its end."""
    return b"".join(store.stream(file, start, length))
