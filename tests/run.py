"""Run rungs of the test ladder in order, each with the interpreter it needs; `make test` and its parts call this.

A rung that fails does not stop the next: one run shows all that is broken. Exits non-zero if any failed.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
LIGHT = REPOSITORY / ".venv" / "bin" / "python"
TRAINER = REPOSITORY / ".venv-trainer" / "bin" / "python"
RUNGS = {
    "unit": (LIGHT, "-n", "2"),
    "chart": (LIGHT,),
    "api": (LIGHT,),
    "trainer": (TRAINER,),
    "cluster": (LIGHT,),
    "gpu": (TRAINER,),
}
NO_TESTS_COLLECTED = 5


def main(names: list[str]) -> int:
    """Run these rungs; return 0 only if every one passed."""
    unknown = [name for name in names if name not in RUNGS]
    if unknown or not names:
        print(f"name rungs among {', '.join(RUNGS)}; unknown: {', '.join(unknown) or 'none given'}", file=sys.stderr)
        return 2
    was_up = _is_cluster_up()
    verdicts: dict[str, str] = {}
    for name in names:
        started = time.monotonic()
        print(f"\n== {name} ==", flush=True)
        code = _run(name)
        verdicts[name] = f"{'passed' if code == 0 else f'FAILED (exit {code})'} in {time.monotonic() - started:.0f} s"
    if "cluster" in names and not was_up:
        subprocess.run((sys.executable, "tests/cluster/cluster.py", "down"), cwd=REPOSITORY, check=False)
    print("\n" + "\n".join(f"{name:<8} {verdict}" for name, verdict in verdicts.items()), flush=True)
    return int(any("FAILED" in verdict for verdict in verdicts.values()))


def _run(name: str) -> int:
    interpreter, *options = RUNGS[name]
    command = (str(interpreter), "-m", "pytest", f"tests/{name}", "--durations=8", *options)
    return subprocess.run(command, cwd=REPOSITORY, check=False).returncode


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
