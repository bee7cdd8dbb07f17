"""The files of a prepared data set: hashed while they are written, complete when `manifest.json` is there."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from typing import TYPE_CHECKING, Any, Self

from finetune_trainer.data.report_page import build_page
from finetune_trainer.reporting import write_json

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


class LinesFile:
    """A file of JSON lines that knows its own digest; one that is not `kept` is only counted, not written."""

    def __init__(self, path: pathlib.Path, *, kept: bool = True) -> None:
        self.path = path
        self.kept = kept
        self._digest = hashlib.sha256()
        self._size = 0
        self.num_lines = 0
        self._file = open(path if kept else os.devnull, "wb")  # noqa: SIM115 - closed by close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    def write(self, value: Mapping[str, Any]) -> None:
        """Append one line."""
        line = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        self._file.write(line)
        self._digest.update(line)
        self._size += len(line)
        self.num_lines += 1

    def close(self) -> None:
        """Make what was written durable."""
        if not self._file.closed:
            self._file.flush()
            if self.kept:
                os.fsync(self._file.fileno())
            self._file.close()

    def to_entry(self) -> dict[str, Any]:
        """Return the file's facts for the manifest."""
        return {"size": self._size, "sha256": self._digest.hexdigest(), "lines": self.num_lines}


def write_report(folder: pathlib.Path, report: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
    """Write report.json, which has no texts of the data, samples.jsonl, which has, and the page made of both."""
    report = {**report, "versions": {"finetune-operator": importlib.metadata.version("finetune-operator")}}
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
