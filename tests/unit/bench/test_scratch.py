"""A killed benchmark's temporary files are gone after the next one has begun."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from tests.bench.scratch import make_scratch


def test_temporary_files_go_with_the_block(tmp_path, monkeypatch):
    monkeypatch.delenv("TMPDIR", raising=False)
    before = tempfile.gettempdir()
    with make_scratch(tmp_path, "bench") as folder:
        assert tempfile.mkdtemp().startswith(str(folder))
        child = subprocess.run(
            [sys.executable, "-c", "import tempfile; print(tempfile.mkdtemp())"],
            capture_output=True,
            check=True,
            text=True,
        )
        assert child.stdout.startswith(str(folder))
    assert (tempfile.gettempdir(), os.environ.get("TMPDIR")) == (before, None)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_benchmark_left_is_removed_and_a_running_ones_stays(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, running, other = (
        tmp_path / f"bench-a-pid{ended.pid}",
        tmp_path / f"bench-b-pid{os.getppid()}",
        tmp_path / "bench-7.jsonl",
    )
    left.mkdir()
    running.mkdir()
    other.touch()
    with make_scratch(tmp_path, "bench"):
        assert not left.exists()
        assert running.exists()
        assert other.exists()
