"""BuildKit on the embedded cluster's containerd: its programs, its daemon while a build runs, and one build.

build.py calls it. Images are written straight into the store that kubelet uses, so nothing is pushed or pulled. The
daemon lives inside the cluster's namespaces and ends with the build. Standard library only.
"""

import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import CACHE, ImageBuildError, held_lock, show

MODULE = Path(__file__).resolve().parent / "buildkit"
PROGRAMS = ["buildctl", "buildkitd"]
SECONDS_BETWEEN_SIGNS_OF_LIFE = 10
# What one set of images takes in BuildKit's own count, which has every layer twice.
CACHE_MEGABYTES = 16_000


def build_programs() -> Path:
    """The folder with buildctl and buildkitd of this go.sum; compiles them first where there is none."""
    digest = hashlib.sha256((MODULE / "go.mod").read_bytes() + (MODULE / "go.sum").read_bytes()).hexdigest()[:16]
    folder = CACHE / "go" / f"buildkit-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with held_lock(folder / ".lock"):
        if not all((folder / program).exists() for program in PROGRAMS):
            compile_programs(folder)
    return folder


def compile_programs(folder: Path) -> None:
    show("building BuildKit: about 3 minutes of processor time")
    started = time.monotonic()
    environment = {**os.environ, "CGO_ENABLED": "0", "GOGC": "400", "GOFLAGS": "-mod=readonly -buildvcs=false"}
    packages = [f"github.com/moby/buildkit/cmd/{program}" for program in PROGRAMS]
    flags = ["-v", "-trimpath", "-gcflags=all=-dwarf=false", "-ldflags=-s -w", "-o", str(folder)]
    try:
        compiler = subprocess.Popen(
            ["go", "build", *flags, *packages], cwd=MODULE, env=environment, stderr=subprocess.PIPE, text=True
        )
    except FileNotFoundError as error:
        raise ImageBuildError("go is missing: install Go 1.26 or later and put it on PATH") from error
    assert compiler.stderr is not None
    lines: list[str] = []
    for line in compiler.stderr:
        lines.append(line)
        if len(lines) % 200 == 0:
            show(f"building BuildKit: {len(lines)} packages after {time.monotonic() - started:.0f} s")
    if compiler.wait():
        raise ImageBuildError(f"building BuildKit in {MODULE} failed:\n{''.join(lines[-20:])}")
    show(f"built BuildKit in {time.monotonic() - started:.0f} s")


def build_daemon_config(root: Path, address: str, socket: str, namespace: str) -> str:
    """Only the containerd worker, in kubelet's namespace. `host` is the cluster's network: the daemon runs in it."""
    return f"""root = "{root}"
[grpc]
address = ["{address}"]
[worker.oci]
enabled = false
[worker.containerd]
enabled = true
address = "{socket}"
namespace = "{namespace}"
snapshotter = "overlayfs"
networkMode = "host"
gc = false
"""


class BuildKit:
    """A running daemon, and the builds asked of it."""

    def __init__(self, programs: Path, address: str) -> None:
        self._buildctl = [str(programs / "buildctl"), "--addr", address]

    def build(self, label: str, options: list[str]) -> None:
        """Build one image; `options` are buildctl's."""
        command = [*self._buildctl, "build", "--progress=rawjson", "--frontend=dockerfile.v0", *options]
        progress = Progress(label)
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                progress.read(line)
            progress.close()
        if process.returncode:
            raise ImageBuildError(f"building {label} failed:\n{progress.describe_failure()}")

    def forget_old_layers(self) -> None:
        """Keep the newest layers, enough for the next change of code; those of an old lock are 13 GB each."""
        command = [*self._buildctl, "prune", "--all", f"--keep-storage={CACHE_MEGABYTES}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def is_ready(self) -> bool:
        command = [*self._buildctl, "debug", "workers"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextmanager
def running_daemon(programs: Path, status: dict[str, Any], root: Path) -> Iterator[BuildKit]:
    """Run buildkitd inside the cluster of that status for as long as the block lasts."""
    root.mkdir(parents=True, exist_ok=True)
    address = f"unix://{root}/buildkitd.sock"
    config, log = root / "buildkitd.toml", root / "buildkitd.log"
    containerd = status["containerd"]
    config.write_text(build_daemon_config(root, address, containerd["socket"], containerd["namespace"]))
    # Each link dies with the one before it, so that not even a killed build leaves a daemon behind.
    follow = ["setpriv", "--pdeathsig", "TERM"]
    command = [*follow, *status["enter"], *follow, str(programs / "buildkitd"), "--config", str(config)]
    with log.open("w") as output:
        daemon = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        buildkit = BuildKit(programs, address)
        wait_until_ready(buildkit, daemon, log)
        yield buildkit
    finally:
        if daemon.poll() is None:
            os.killpg(daemon.pid, signal.SIGTERM)
        daemon.wait()


def wait_until_ready(buildkit: BuildKit, daemon: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 60
    while not buildkit.is_ready():
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise ImageBuildError(f"buildkitd did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.1)


class Progress:
    """Turns buildctl's stream of events into a line per finished step, and a sign of life during long ones."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._started: dict[str, float] = {}
        self._names: dict[str, str] = {}
        self._finished: set[str] = set()
        self._last_line = ""
        self._tail: list[str] = []
        self._errors: list[str] = []
        self._closed = threading.Event()
        self._teller = threading.Thread(target=self._tell, daemon=True)
        self._teller.start()

    def read(self, line: str) -> None:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            self._errors.append(line.rstrip())
            return
        for vertex in event.get("vertexes") or []:
            self._read_step(vertex)
        for log in event.get("logs") or []:
            text = base64.b64decode(log["data"]).decode(errors="replace")
            lines = [part.strip() for part in text.splitlines() if part.strip()]
            self._tail = [*self._tail, *lines][-40:]
            self._last_line = lines[-1] if lines else self._last_line

    def _read_step(self, vertex: dict[str, Any]) -> None:
        digest = vertex["digest"]
        if vertex.get("error"):
            self._errors.append(vertex["error"])
        if vertex.get("started") and digest not in self._started:
            self._names[digest] = shorten_step(vertex["name"])
            self._started[digest] = time.monotonic()
            self._last_line = ""
        if vertex.get("completed") and digest not in self._finished:
            self._finished.add(digest)
            took = time.monotonic() - self._started.get(digest, time.monotonic())
            if took >= 1:
                show(f"{self._label}: {self._names[digest]}: {took:.0f} s")

    def _tell(self) -> None:
        while not self._closed.wait(SECONDS_BETWEEN_SIGNS_OF_LIFE):
            for digest in [digest for digest in list(self._started) if digest not in self._finished]:
                seconds = time.monotonic() - self._started[digest]
                if seconds >= SECONDS_BETWEEN_SIGNS_OF_LIFE:
                    said = f"{self._names[digest]}: {seconds:.0f} s so far"
                    show(f"{self._label}: {said} {self._last_line[:60]}".rstrip())

    def close(self) -> None:
        self._closed.set()
        self._teller.join()

    def describe_failure(self) -> str:
        return "\n".join([*self._tail, *self._errors])


def shorten_step(name: str) -> str:
    """Leave the mounts and settings of a RUN line out: what it runs is what a reader knows it by."""
    name = re.sub(r"--mount=\S+\s*|\b[A-Z_]+=\S+\s+|/tmp/build/with-build-ca\s+", "", name)
    return re.sub(r"\s+", " ", name).strip()[:80]
