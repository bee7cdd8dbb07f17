"""Temporary folders that outlive no one: those of killed processes go when the next training starts.

A process holds a lock on its folder as long as it lives, and so do the processes it has forked; the kernel gives the
lock back whatever ends them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

_PREFIX = "finetune-scratch-"


@contextlib.contextmanager
def scratch_folder() -> Iterator[pathlib.Path]:
    """Give a new folder for the time of the block."""
    folder, lock = _make_locked()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make_locked() -> tuple[pathlib.Path, int]:
    while True:
        folder = pathlib.Path(tempfile.mkdtemp(prefix=_PREFIX))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Before it was locked, a process that cleans up may have taken it for an abandoned one.
            if folder.exists():
                return folder, lock
            os.close(lock)


def remove_abandoned() -> None:
    """Remove the folders whose processes have gone. Never raises."""
    for folder in pathlib.Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
