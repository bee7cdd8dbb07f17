"""What the kernel says about this pod's memory: how many processes it killed for it, and what the limit is.

The kernel may kill one rank and leave its pod alone; from outside that is a SIGKILL like any other. Reads the control
group of this process, version 2 or 1; where neither can be read the answers are unknown. Used by the supervisor.
"""

from __future__ import annotations

import math
import pathlib

_BUFFER_SHARE = 0.8
"""Share of the free memory that buffers for saves may take."""
_LEAST_BUFFER_BYTES = 64 << 20
_UNLIMITED = 1 << 60
"""Control groups of version 1 write a number like this for no limit."""


class HostMemory:
    """The memory of this process's control group."""

    def __init__(
        self,
        root: pathlib.Path = pathlib.Path("/sys/fs/cgroup"),
        own: pathlib.Path = pathlib.Path("/proc/self/cgroup"),
    ) -> None:
        self._folders = _list_folders(root, own)

    def count_kills(self) -> int | None:
        """Return how many processes the kernel has killed for memory; None: unknown."""
        for name in ("memory.events", "memory.oom_control"):
            for line in self._read(name).splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill" and value.strip().isdigit():
                    return int(value)
        return None

    def read_limit(self) -> int:
        """Return the limit in bytes; 0: none, or unknown."""
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = self._read(name).strip()
            if text.isdigit():
                return int(text) if int(text) < _UNLIMITED else 0
        return 0

    def read_available(self) -> int:
        """Return how many bytes this container can still take, page cache given back."""
        available = _read_free()
        limit = self.read_limit()
        if limit:
            used = int((self._read("memory.current") or self._read("memory.usage_in_bytes")).strip() or 0)
            for line in self._read("memory.stat").splitlines():
                key, _, value = line.partition(" ")
                # Shared memory counts as neither.
                used -= int(value) if key in ("active_file", "inactive_file") else 0
            available = min(available, limit - used)
        return max(available, 0)

    def _read(self, name: str) -> str:
        for folder in self._folders:
            try:
                return (folder / name).read_text()
            except OSError:
                continue
        return ""


def _list_folders(root: pathlib.Path, own: pathlib.Path) -> list[pathlib.Path]:
    """Return the folders that may be this process's group: by its path, and as a container sees it, at the top."""
    folders = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", "", ""][:3]
        if controllers == "":
            folders += [root / path.lstrip("/"), root]
        elif "memory" in controllers.split(","):
            folders += [root / "memory" / path.lstrip("/"), root / "memory"]
    return folders


def _read_free() -> int:
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 0


def limit_buffer(wanted_bytes: int, current_bytes: int, num_processes: int) -> int:
    """Return how large one of a pod's `num_processes` buffers may be: what it wants, or its share of what is free.

    A buffer that holds less than a save makes training wait for a part of the writing; a pod that runs out of memory
    is killed.
    """
    if wanted_bytes <= current_bytes:
        return current_bytes
    share = int(_BUFFER_SHARE * HostMemory().read_available()) // num_processes
    return min(wanted_bytes, current_bytes + max(share, _LEAST_BUFFER_BYTES))


def suggest_memory(limit_bytes: int) -> str:
    """Return what to ask for instead of a limit that was too small, as a quantity: half as much again."""
    return f"{math.ceil(1.5 * limit_bytes / 2**30)}Gi"
