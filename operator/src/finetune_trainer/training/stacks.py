"""The Python stacks of ranks that make no step: asked for by a signal, written by `faulthandler` in the rank.

`faulthandler` answers inside the signal handler, so that also a rank which waits in a library for ever says where. Used
by the supervisor; needs no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import pathlib
import re
import signal
import time
from collections.abc import Mapping
from typing import Any

from finetune_contract.stacks import STACKS, choose_culprit, describe_stacks

SIGNAL = signal.SIGUSR1
ANSWER_SECONDS = 5.0
"""How long a rank may take to write its stack."""
QUIET_SECONDS = 0.3
"""A file that has not grown for so long is whole."""
MAX_REPORTED = 16
"""Ranks whose place goes into the exit report; the file has them all."""

_SECTION = re.compile(r"^(Current thread|Thread) 0x[0-9a-f]+.*:$")
_FRAME = re.compile(r'^  File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<name>.+)$')
_COLLECTIVE = re.compile(r"/(torch/distributed|deepspeed/comm)/")
_INNERMOST = 6
"""Frames in which a collective is looked for."""


@dataclasses.dataclass(frozen=True)
class Stack:
    """Where one rank stands."""

    rank: int
    text: str
    """As `faulthandler` wrote it, all threads; or why there is none."""

    @property
    def frames(self) -> tuple[tuple[str, int, str], ...]:
        """File, line and function of the main thread's frames, innermost first."""
        sections: list[tuple[bool, list[tuple[str, int, str]]]] = []
        for line in self.text.splitlines():
            if _SECTION.match(line):
                sections.append((line.startswith("Current"), []))
            elif sections and (found := _FRAME.match(line)):
                sections[-1][1].append((found["file"], int(found["line"]), found["name"]))
        # The main thread takes signals; it is also the oldest, which is listed last.
        current = [frames for is_current, frames in sections if is_current and frames]
        return tuple(current[0] if current else sections[-1][1] if sections else ())

    @property
    def waits(self) -> bool:
        """Does it wait in a collective for other ranks?"""
        return any(_COLLECTIVE.search(file) for file, _, _ in self.frames[:_INNERMOST])

    @property
    def place(self) -> str:
        """The innermost frame; of a rank that waits, the code that called the collective."""
        frames = [frame for frame in self.frames if not (self.waits and _COLLECTIVE.search(frame[0]))]
        if not frames:
            return self.text.strip().splitlines()[-1][:120] if self.text.strip() else "an unknown place"
        file, line, name = frames[0]
        return f"{pathlib.Path(file).name}:{line} in {name}"


@dataclasses.dataclass(frozen=True)
class Hang:
    """Ranks that were ended because none made a step in time."""

    deadline_seconds: float
    stacks: tuple[Stack, ...]

    def to_details(self) -> dict[str, dict[str, Any]]:
        """Return where each rank stands, for the exit report."""
        places = {str(stack.rank): {"at": stack.place, "waits": stack.waits} for stack in self.stacks}
        culprit = choose_culprit(places)
        order = sorted(places, key=lambda rank: (rank != culprit, int(rank)))
        return {rank: places[rank] for rank in order[:MAX_REPORTED]}

    @property
    def culprit(self) -> int:
        """The rank that holds up the others; -1: it cannot be told."""
        found = choose_culprit(self.to_details())
        return -1 if found is None else int(found)

    @property
    def message(self) -> str:
        """What happened, in one line."""
        return (
            f"no step for {self.deadline_seconds:.0f} s (spec.failurePolicy.progressDeadlineSeconds): "
            f"{describe_stacks(self.to_details())}"
        )

    @property
    def details(self) -> dict[str, Any]:
        """Entries of the exit report's details."""
        return {STACKS: self.to_details()}

    def write(self, path: pathlib.Path) -> None:
        """Write every stack whole. Never raises: a full or absent workspace must not hide the hang."""
        text = "\n".join(f"rank {stack.rank}\n{stack.text.rstrip()}\n" for stack in self.stacks)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def answer_signals(folder: pathlib.Path, rank: int) -> None:
    """Make this process write its stacks when it is asked to; called in the rank."""
    faulthandler.register(SIGNAL, file=_path(folder, rank).open("w"), all_threads=True)


def _path(folder: pathlib.Path, rank: int) -> pathlib.Path:
    return folder / f"stack-{rank}.txt"


def collect_stacks(folder: pathlib.Path, pids: Mapping[int, int]) -> tuple[Stack, ...]:
    """Ask ranks (rank to process) for their stacks, and return them in the order of ranks."""
    for pid in pids.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, SIGNAL)
    deadline = time.monotonic() + ANSWER_SECONDS
    sizes: list[int] = []
    quiet_since = time.monotonic()
    while (now := time.monotonic()) < deadline:
        found = [_size(_path(folder, rank)) for rank in pids]
        if found != sizes:
            sizes, quiet_since = found, now
        if all(sizes) and now - quiet_since >= QUIET_SECONDS:
            break
        time.sleep(0.02)
    return tuple(Stack(rank, _read(_path(folder, rank)) or _describe_process(pids[rank])) for rank in sorted(pids))


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _describe_process(pid: int) -> str:
    """Return what the kernel says of a process that does not answer: most likely it waits for a disk."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        place = pathlib.Path(f"/proc/{pid}/wchan").read_text()
    except (OSError, IndexError):
        return "no answer, and no process to ask"
    return f"no answer: process state {state}" + (f", in the kernel at {place}" if place.strip("0") else "")
