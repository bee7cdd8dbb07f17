"""The temporary files of a benchmark that kills, and is killed: none outlives the next start."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def make_scratch(parent: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
    """Make a folder below `parent` for the block, in which this process and its children put all temporary files.

    What killed benchmarks of the same name have left is removed first.
    """
    for old in parent.glob(f"{name}-*-pid*"):
        if not pathlib.Path("/proc", old.name.rpartition("-pid")[2]).exists():
            shutil.rmtree(old, ignore_errors=True)
    previous = tempfile.tempdir, os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix=f"{name}-", suffix=f"-pid{os.getpid()}", dir=parent) as folder:
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        try:
            yield pathlib.Path(folder)
        finally:
            tempfile.tempdir = previous[0]
            os.environ.pop("TMPDIR")
            if previous[1] is not None:
                os.environ["TMPDIR"] = previous[1]
