"""Files on this machine: plain paths, and pvc:// paths below the workspace."""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING

from finetune_trainer.storage.base import Listing, RemoteFile, make_listing_revision

if TYPE_CHECKING:
    from collections.abc import Iterator

    from finetune_trainer.storage.access import Access
    from finetune_trainer.storage.location import Location

_CHUNK = 1 << 20


def resolve_path(location: Location, access: Access, workspace_root: pathlib.Path) -> pathlib.Path:
    """Return the path that a pvc:// URL or a plain path means; pvc:// never leaves the workspace."""
    if location.scheme != "pvc":
        return pathlib.Path(location.path)
    root = workspace_root.resolve()
    path = (root / location.path.lstrip("/")).resolve()
    if not path.is_relative_to(root):
        raise access.invalid(location.text, "leaves the workspace", "Write a path below the workspace, without `..`.")
    return path


class LocalStore:
    """A file or a folder."""

    def __init__(self, location: Location, revision: str, access: Access, workspace_root: pathlib.Path) -> None:
        self._location = location
        self._revision = revision
        self._access = access
        self.path = resolve_path(location, access, workspace_root)

    def list_files(self) -> Listing:
        if self.path.is_file():
            files = [self._describe(self.path, self.path.name)]
        elif self.path.is_dir():
            found = sorted(path for path in self.path.rglob("*") if path.is_file())
            files = [self._describe(path, path.relative_to(self.path).as_posix()) for path in found]
        else:
            raise self._access.not_found(self._location.text)
        return Listing(make_listing_revision(files), tuple(files))

    def stream(self, file: RemoteFile, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        left = length
        with open(file.key, "rb") as source:
            source.seek(start)
            while left is None or left > 0:
                chunk = source.read(_CHUNK if left is None else min(_CHUNK, left))
                if not chunk:
                    return
                left = None if left is None else left - len(chunk)
                yield chunk

    def link_file(self, file: RemoteFile, path: pathlib.Path) -> bool:
        """Give a file of the workspace a second name, which costs no room; False where that cannot be."""
        if self._location.scheme != "pvc":
            return False
        try:
            path.unlink(missing_ok=True)
            os.link(file.key, path)
        except OSError:
            return False
        return True

    @staticmethod
    def _describe(path: pathlib.Path, name: str) -> RemoteFile:
        status = path.stat()
        return RemoteFile(name, status.st_size, str(status.st_mtime_ns), key=str(path))
