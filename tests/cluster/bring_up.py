"""Everything a demo or a test of the cluster rung needs, from nothing: programs, images, a running cluster.

Compiling Kubernetes is processor time and the trainer image is download and disk, so the two run side by side.
Standard library only, because nothing may be installed yet. Prints each step's own progress behind its name.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import threading
import time
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CLUSTER_TOOL = HERE / "cluster.py"
IMAGE_TOOL = HERE / "images" / "build.py"
IMAGE_REFERENCES = REPOSITORY / "build" / "images.json"


class BringUpError(RuntimeError):
    """A step failed; the message names it and quotes its last lines."""


def bring_up(name: str) -> dict[str, Any]:
    """Build what is missing, start cluster `name`, and return its status with the references of its images."""
    _run_step("packages", (str(CLUSTER_TOOL), "packages"))
    _run_step("runtime", (str(CLUSTER_TOOL), "runtime-up", "--name", name))
    _run_together(
        ("programs", (str(CLUSTER_TOOL), "build")),
        ("images", (str(IMAGE_TOOL), "--name", name, "operator", "trainer")),
    )
    status: dict[str, Any] = json.loads(_run_step("cluster", (str(CLUSTER_TOOL), "up", "--name", name)))
    images = json.loads(IMAGE_REFERENCES.read_text())
    # The trainer image also serves on CPUs; the GPU's inference image is not built here.
    status["images"] = {"inference": images["trainer"], **images}
    return status


def read_s3_keys(status: dict[str, Any]) -> tuple[str, str]:
    """Return access key and secret key of the cluster's S3 server."""
    lines = pathlib.Path(status["s3"]["credentials"]).read_text().splitlines()
    values = dict(line.partition("=")[::2] for line in lines if "=" in line)
    return values["AWS_ACCESS_KEY_ID"], values["AWS_SECRET_ACCESS_KEY"]


def _run_together(*steps: tuple[str, tuple[str, ...]]) -> None:
    failures: list[BringUpError] = []

    def run(step: str, command: tuple[str, ...]) -> None:
        try:
            _run_step(step, command)
        except BringUpError as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=step) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _run_step(step: str, command: tuple[str, ...]) -> str:
    """Run a program; show its progress lines as they come, and return what it answered."""
    started = time.monotonic()
    process = subprocess.Popen(
        (sys.executable, *command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    answer: list[str] = []
    assert process.stdout is not None
    assert process.stderr is not None
    reader = threading.Thread(target=answer.extend, args=(process.stdout,))
    reader.start()
    last: list[str] = []
    for line in process.stderr:
        last = [*last[-20:], line]
        print(f"[{step:<8}] {line}", end="", flush=True)
    reader.join()
    if process.wait():
        raise BringUpError(f"{step} failed: {' '.join(command)}\n{''.join(last)}{''.join(answer[-20:])}")
    took = time.monotonic() - started
    if took > 1:
        print(f"[{step:<8}] done in {took:.0f} s", flush=True)
    return "".join(answer)


def main() -> int:
    """Bring a cluster up from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="default")
    try:
        print(json.dumps(bring_up(parser.parse_args().name), indent=1))
    except BringUpError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
