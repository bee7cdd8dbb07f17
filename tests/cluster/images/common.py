"""What the modules of the image build share: the cache's place, locks, messages and the one error."""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CACHE = Path(os.environ.get("FINETUNE_CACHE", Path.home() / ".cache/finetune-operator"))


class ImageBuildError(Exception):
    """An image could not be built; the message ends with the last lines of what failed."""


def show(message: str) -> None:
    print(f"images: {message}", file=sys.stderr, flush=True)


@contextmanager
def held_lock(path: Path) -> Iterator[None]:
    """Let one process at a time build; the others wait and then find it built."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
