"""Files and folders of a weight diff as they are written: hashed on the way, durable, visible only when whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from typing import TYPE_CHECKING

from finetune_trainer.checkpoints.manifest import sync_folder
from finetune_trainer.weight_diff.record import FileFacts
from finetune_trainer.weight_diff.tensors import invalid

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterator


@contextlib.contextmanager
def fresh_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a folder beside `out` that takes its name at the end; nothing stays after an error.

    Raises TrainerError when `out` exists already: nothing is overwritten.
    """
    if out.exists() or out.is_symlink():
        raise invalid("--out", f"{out} exists", "Name a folder that does not exist yet.")
    beside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        sync_folder(beside)
        beside.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


class HashedFile:
    """A new file, hashed while it is written."""

    def __init__(self, path: pathlib.Path) -> None:
        self.name = path.name
        self.size = 0
        self._file = open(path, "xb")  # noqa: SIM115 - closed by close()
        self._digest = hashlib.sha256()

    def append(self, data: bytes) -> int:
        """Append and return the number of bytes."""
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)
        return len(data)

    def close(self) -> FileFacts:
        """Make the file durable and return its size and digest."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileFacts(self.size, self._digest.hexdigest())


def copy_file(source: pathlib.Path, target: pathlib.Path) -> FileFacts:
    """Copy one file durably and return what was copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    out = HashedFile(target)
    with open(source, "rb") as file:
        while chunk := file.read(1 << 20):
            out.append(chunk)
    return out.close()
