"""Files of a checkpoint as the writer makes them: past the page cache where the volume can, hashed on the way.

Nothing here knows what is in a file. Bytes come from a buffer that is aligned to pages. A piece is hashed in a thread
while it is written: neither holds the interpreter, so a file takes as long as the slower of the two.
"""

from __future__ import annotations

import concurrent.futures
import errno
import fcntl
import hashlib
import os
import pathlib

from finetune_trainer.checkpoints.manifest import FileEntry

PAGE = 4096
"""Alignment of what is written past the page cache: in memory, in the file, and in length."""
_CHUNK = 8 << 20


def round_up(num_bytes: int) -> int:
    """Return the number of bytes in whole pages."""
    return -(-num_bytes // PAGE) * PAGE


class DirectFile:
    """A new file that is written from its start to its end, in whole pages but for the last bytes."""

    def __init__(self, path: pathlib.Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self.path = path
        try:
            # Copies through the page cache take the memory bandwidth and the cores that training needs.
            self._descriptor = os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, flags, 0o644)
        self._digest = hashlib.sha256()
        self._hashing = concurrent.futures.ThreadPoolExecutor(1)
        self._size = 0

    def append(self, buffer: memoryview, start: int, length: int) -> None:
        """Append `length` bytes of the buffer from `start` on, which is a multiple of a page.

        What lies behind them up to the next page is written too, and cut off at the end: so `length` is no multiple of
        a page in the last call only.
        """
        for at in range(start, start + length, _CHUNK):
            size = min(_CHUNK, start + length - at)
            hashed = self._hashing.submit(self._digest.update, buffer[at : at + size])
            self._write(buffer[at : at + round_up(size)])
            hashed.result()
        self._size += length

    def _write(self, data: memoryview) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except OSError as error:
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                    error.filename = str(self.path)
                    raise
                # A volume with other demands on alignment, or one that says only now that it cannot.
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)

    def seal(self) -> FileEntry:
        """Make the file durable, close it, and return its size and digest."""
        try:
            os.ftruncate(self._descriptor, self._size)
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
            self._hashing.shutdown()
        return FileEntry(self._size, self._digest.hexdigest())
