"""A volume that runs full: a tmpfs of a given size that only this process and its children see.

The mount lives in a mount namespace of its own, so it is gone with the last process, whatever ends them. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import shutil
from collections.abc import Iterator

_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_MNT_DETACH = 2
_BALLAST = "ballast"

_libc = ctypes.CDLL(None, use_errno=True)


def leave_mounts_of_host() -> None:
    """Give this process mounts of its own. Raises PermissionError where that is not allowed."""
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _check(_libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "mount --make-rprivate /")


class SmallVolume:
    """One mounted volume, and the neighbour that fills it."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._taken = 0

    def leave_free(self, num_bytes: int) -> None:
        """Let the neighbour take what is free beyond `num_bytes`; called again it takes what has become free."""
        surplus = shutil.disk_usage(self.folder).free - num_bytes
        if surplus <= 0:
            return
        with contextlib.suppress(OSError), (self.folder / _BALLAST).open("ab") as file:
            # Somebody else may have taken it in the meantime: then there is less to take.
            os.posix_fallocate(file.fileno(), self._taken, surplus)
            self._taken += surplus

    def give_back(self) -> None:
        """Free what the neighbour took."""
        (self.folder / _BALLAST).unlink(missing_ok=True)
        self._taken = 0


@contextlib.contextmanager
def mount_small_volume(folder: pathlib.Path, num_bytes: int) -> Iterator[SmallVolume]:
    """Mount a volume of `num_bytes` at `folder`, for the time of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    target, options = os.fsencode(folder), f"size={num_bytes},mode=755".encode()
    _check(_libc.mount(b"tmpfs", target, b"tmpfs", ctypes.c_ulong(0), options), f"mount {folder}")
    try:
        yield SmallVolume(folder)
    finally:
        _check(_libc.umount2(target, _MNT_DETACH), f"umount {folder}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
