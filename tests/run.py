"""Run rungs of the test ladder, each with the interpreter it needs; `make test` and its parts call this.

A rung that fails does not stop the next: one run shows all that is broken. Exits non-zero if any failed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import IO, Any

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
LIGHT = REPOSITORY / ".venv" / "bin" / "python"
TRAINER = REPOSITORY / ".venv-trainer" / "bin" / "python"
RUNGS = {
    "unit": (LIGHT, "-n", "2"),
    "chart": (LIGHT,),
    "api": (LIGHT,),
    "trainer": (TRAINER,),
    "cluster": (LIGHT,),
    "vllm": (TRAINER,),
    "gpu": (TRAINER,),
}
LANES = (("chart", "api", "cluster"), ("unit", "trainer", "vllm", "gpu"))
"""Rungs of a lane run one after another, and the lanes side by side: the first waits most of the time, for an API
server or for pods; the second wants the cores."""


def main(names: list[str]) -> int:
    """Run these rungs; return 0 only if every one passed."""
    unknown = [name for name in names if name not in RUNGS]
    if unknown or not names:
        print(f"name rungs among {', '.join(RUNGS)}; unknown: {', '.join(unknown) or 'none given'}", file=sys.stderr)
        return 2
    was_up = _is_cluster_up()
    verdicts = _run_lanes([lane for lane in ([each for each in lane if each in names] for lane in LANES) if lane])
    if "cluster" in names and not was_up:
        subprocess.run((sys.executable, "tests/cluster/cluster.py", "down"), cwd=REPOSITORY, check=False)
    print("\n" + "\n".join(f"{name:<8} {verdicts[name]}" for name in names), flush=True)
    return int(any("FAILED" in verdict for verdict in verdicts.values()))


def _run_lanes(lanes: list[list[str]]) -> dict[str, str]:
    """Run these lanes at once: the first one's output is shown as it comes, the other's when it has ended."""
    shown, *others = lanes
    later = [name for lane in others for name in lane]
    with contextlib.ExitStack() as stack:
        spools = {name: stack.enter_context(tempfile.NamedTemporaryFile()) for name in later}
        verdicts: dict[str, concurrent.futures.Future[str]] = {
            name: concurrent.futures.Future() for name in (*shown, *later)
        }
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor())
        for lane in others:
            pool.submit(_run_lane, lane, spools, verdicts)
        if later:
            print(f"\n== {', '.join(later)} run beside these; their output follows ==", flush=True)
        _run_lane(shown, spools, verdicts)
        for name in later:
            _follow(name, spools[name].name, verdicts[name])
        return {name: verdict.result() for name, verdict in verdicts.items()}


def _run_lane(lane: list[str], spools: dict[str, Any], verdicts: dict[str, concurrent.futures.Future[str]]) -> None:
    for name in lane:
        if name not in spools:
            print(f"\n== {name} ==", flush=True)
        try:
            verdict = _run(name, spools.get(name))
        except OSError as error:
            verdict = f"FAILED: {error}"
        if name in spools:
            print(f"\n== {name} {verdict} ==", flush=True)
        verdicts[name].set_result(verdict)


def _run(name: str, spool: IO[bytes] | None) -> str:
    interpreter, *options = RUNGS[name]
    command = (str(interpreter), "-m", "pytest", f"tests/{name}", "--durations=8", *options)
    started = time.monotonic()
    code = subprocess.run(command, cwd=REPOSITORY, check=False, stdout=spool, stderr=spool).returncode
    return f"{'passed' if code == 0 else f'FAILED (exit {code})'} in {time.monotonic() - started:.0f} s"


def _follow(name: str, spool: str, verdict: concurrent.futures.Future[str]) -> None:
    """Show what a rung has written so far, and go on until it has ended."""
    print(f"\n== {name} ==", flush=True)
    # Opened anew: on the rung's own file description, reading would move the place where it writes.
    with pathlib.Path(spool).open("rb") as written:
        is_over = False
        while not is_over:
            is_over = bool(concurrent.futures.wait((verdict,), timeout=1).done)
            shutil.copyfileobj(written, sys.stdout.buffer)
            sys.stdout.flush()


def _is_cluster_up() -> bool:
    """Whether somebody already uses the cluster, who would not like it taken down."""
    answer = subprocess.run(
        (sys.executable, "tests/cluster/cluster.py", "status"),
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
    )
    try:
        return json.loads(answer.stdout).get("state") not in (None, "down")
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
