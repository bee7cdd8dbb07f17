"""Installs the Debian packages that the cluster runs on, without letting any of them start a service.

Called by lifecycle.py before anything else. Does nothing when all programs are there, so a warm start asks no mirror.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ClusterError
from .layout import CACHE, held_lock
from .progress import show

PACKAGE_OF_PROGRAM = {
    "etcd": "etcd-server",
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "/usr/lib/cni/ptp": "containernetworking-plugins",
    "slirp4netns": "slirp4netns",
    "iptables": "iptables",
    "ip": "iproute2",
    "mount": "mount",
    "openssl": "openssl",
    "mmdebstrap": "mmdebstrap",
    "prometheus": "prometheus",
    "busybox": "busybox-static",
}
POLICY = Path("/usr/sbin/policy-rc.d")


def install_missing_packages() -> None:
    if not _list_missing():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with held_lock(CACHE / ".packages.lock"):
        _install(_list_missing())


def _list_missing() -> list[str]:
    return sorted({package for program, package in PACKAGE_OF_PROGRAM.items() if shutil.which(program) is None})


def _install(missing: list[str]) -> None:
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ClusterError(f"missing: install these packages (Debian's names) and try again: {' '.join(missing)}")
    show(f"installing Debian packages: {' '.join(missing)}")
    with _services_kept_from_starting():
        _apt_get("update", "-qq")
        _apt_get("install", "-y", "-qq", "--no-install-recommends", *missing)


def _apt_get(*arguments: str) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    finished = subprocess.run(
        ["apt-get", "-o", "DPkg::Lock::Timeout=300", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if finished.returncode:
        tail = "\n".join(finished.stdout.splitlines()[-15:])
        raise ClusterError(f"apt-get {' '.join(arguments)} failed:\n{tail}")


@contextmanager
def _services_kept_from_starting() -> Iterator[None]:
    """Debian asks policy-rc.d before a package starts its service; 101 means no. A policy already there is kept."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()
