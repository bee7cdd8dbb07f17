"""The files of a prepared data set: hashed while they are written, complete when `manifest.json` is there."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any, Self

from finetune_trainer.data.report_page import build_page
from finetune_trainer.reporting import write_json
from finetune_trainer.versions import read_version

if TYPE_CHECKING:
    import pathlib
    import types
    from collections.abc import Mapping, Sequence

TRAIN = "train.jsonl"
HOLDOUT = "holdout.jsonl"
REMOVED = "removed.jsonl"
BAD = "bad.jsonl"
REPORT = "report.json"
PAGE = "report.html"
SAMPLES = "samples.jsonl"
MANIFEST = "manifest.json"

_BLOCK = 1 << 20


class LinesFile:
    """A file of JSON lines that knows its own digest; one that is not `kept` is only counted, not written."""

    def __init__(self, path: pathlib.Path, *, kept: bool = True, mode: str = "wb") -> None:
        self.path = path
        self.kept = kept
        self._digest = hashlib.sha256()
        self._size = 0
        self.num_lines = 0
        self._file = open(path if kept else os.devnull, mode)  # noqa: SIM115 - closed by close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    @classmethod
    def carry_on(cls, path: pathlib.Path, entry: Mapping[str, Any]) -> Self | None:
        """Open a file that goes on after what the entry describes, and cut off the rest; None if it does not hold that.

        Raises KeyError for what is no entry.
        """
        digest, left = hashlib.sha256(), entry["size"]
        try:
            with open(path, "rb") as file:
                while left and (data := file.read(min(left, _BLOCK))):
                    digest.update(data)
                    left -= len(data)
        except FileNotFoundError:
            return None
        if left or digest.hexdigest() != entry["sha256"]:
            return None
        os.truncate(path, entry["size"])
        found = cls(path, mode="ab")
        found._digest, found._size, found.num_lines = digest, entry["size"], entry["lines"]
        return found

    def write(self, value: Mapping[str, Any]) -> None:
        """Append one line."""
        self.append(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n", 1)

    def append(self, lines: bytes, num_lines: int) -> None:
        """Append rendered lines."""
        self._file.write(lines)
        self._digest.update(lines)
        self._size += len(lines)
        self.num_lines += num_lines

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self._file.flush()

    def sync(self) -> None:
        """Make what was flushed durable."""
        if self.kept:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Make what was written durable, and write no more."""
        if not self._file.closed:
            self.flush()
            self.sync()
            self._file.close()

    def to_entry(self) -> dict[str, Any]:
        """Return the file's facts for the manifest."""
        return {"size": self._size, "sha256": self._digest.hexdigest(), "lines": self.num_lines}


def write_report(folder: pathlib.Path, report: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
    """Write report.json, which has no texts of the data, samples.jsonl, which has, and the page made of both."""
    report = {**report, "versions": {"finetune-operator": read_version("finetune-operator")}}
    with LinesFile(folder / SAMPLES) as lines:
        for sample in samples:
            lines.write(sample)
    (folder / PAGE).write_text(build_page(report, samples), encoding="utf-8")
    write_json(folder / REPORT, report)


def write_manifest(folder: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """Write the mark that makes the folder a prepared data set; everything else must be durable by now."""
    write_json(folder / MANIFEST, facts)


def read_manifest(folder: pathlib.Path) -> dict[str, Any] | None:
    """Return the manifest of a complete data set; None when it is missing or a file is not as it says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        whole = all((folder / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None
