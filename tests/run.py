"""Run rungs of the test ladder in order, each with the interpreter it needs; `make test` and its parts call this.

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
from typing import IO

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
BESIDE = {"trainer": "api", "vllm": "cluster"}
"""Rungs that run beside another, which waits most of the time for an API server or for pods: these want the cores."""


def main(names: list[str]) -> int:
    """Run these rungs; return 0 only if every one passed."""
    unknown = [name for name in names if name not in RUNGS]
    if unknown or not names:
        print(f"name rungs among {', '.join(RUNGS)}; unknown: {', '.join(unknown) or 'none given'}", file=sys.stderr)
        return 2
    was_up = _is_cluster_up()
    verdicts: dict[str, str] = {}
    for together in _list_rounds(names):
        verdicts |= _run_round(together)
    if "cluster" in names and not was_up:
        subprocess.run((sys.executable, "tests/cluster/cluster.py", "down"), cwd=REPOSITORY, check=False)
    print("\n" + "\n".join(f"{name:<8} {verdicts[name]}" for name in names), flush=True)
    return int(any("FAILED" in verdict for verdict in verdicts.values()))


def _list_rounds(names: list[str]) -> list[list[str]]:
    """Return the rungs that run at once, in the order in which their output is shown."""
    companions = {name for name in names if BESIDE.get(name) in names}
    return [
        [name, *(each for each in names if each in companions and BESIDE[each] == name)]
        for name in names
        if name not in companions
    ]


def _run_round(names: list[str]) -> dict[str, str]:
    """Run these rungs at once: the first one's output is shown as it comes, the others' when it has ended."""
    first, *others = names
    beside = "".join(f"; {name} runs beside it, its output follows" for name in others)
    print(f"\n== {first}{beside} ==", flush=True)
    with contextlib.ExitStack() as stack:
        spools = {name: stack.enter_context(tempfile.NamedTemporaryFile()) for name in others}
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor())
        verdicts = {name: pool.submit(_run, name, spools.get(name)) for name in names}
        verdicts[first].result()
        for name in others:
            _follow(name, spools[name].name, verdicts[name])
        return {name: verdict.result() for name, verdict in verdicts.items()}


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
