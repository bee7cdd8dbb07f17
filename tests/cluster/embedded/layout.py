"""Where everything of one cluster lies: folders, addresses, names. Pure but for `choose_block` and `open_cluster`,
which remember which address block a cluster owns. Called by every other module; starts and changes nothing else.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import ClusterError

CACHE = Path(os.environ.get("FINETUNE_CACHE", Path.home() / ".cache" / "finetune-operator"))
CLUSTERS = CACHE / "clusters"
FIRST_BLOCK, LAST_BLOCK = 110, 199
CLUSTER_DOMAIN = "cluster.local"
SYSTEM_NAMESPACE = "finetune-demo-system"
IMAGE_NAMESPACE = "k8s.io"
PAUSE_IMAGE = "localhost/finetune/pause:1"
S3_REGION = "us-east-1"


@dataclass(frozen=True)
class Cluster:
    """One cluster's names and places. Everything derives from its name and its address block 10.<block>.0.0/16."""

    name: str
    """What the user calls it; at most 20 lower-case letters, digits and hyphens."""
    block: int
    """Second byte of the /16 that holds its pods, Services, host link and uplink."""

    @property
    def folder(self) -> Path:
        return CLUSTERS / self.name

    @property
    def run(self) -> Path:
        """State that `down` removes; images lie outside it, in `images`."""
        return self.folder / "run"

    @property
    def images(self) -> Path:
        return self.folder / "containerd"

    @property
    def pki(self) -> Path:
        return self.run / "pki"

    @property
    def kubeconfig(self) -> Path:
        return self.run / "kubeconfig"

    @property
    def containerd_socket(self) -> Path:
        return self.run / "containerd.sock"

    @property
    def context(self) -> str:
        return f"finetune-{self.name}"

    @property
    def cgroup(self) -> str:
        """Unique on the host while the cluster runs, also beside one of that name in another cache folder."""
        return f"finetune-{self.name}-{self.block}"

    @property
    def node_name(self) -> str:
        return f"{self.name}-node"

    @property
    def network(self) -> str:
        return f"10.{self.block}.0.0/16"

    @property
    def pod_network(self) -> str:
        return f"10.{self.block}.0.0/17"

    @property
    def service_network(self) -> str:
        return f"10.{self.block}.128.0/18"

    @property
    def api_service_address(self) -> str:
        return f"10.{self.block}.128.1"

    @property
    def dns_service_address(self) -> str:
        return f"10.{self.block}.128.10"

    @property
    def uplink_network(self) -> str:
        """Network of the user-mode uplink: its DNS forwarder is address 3 of it."""
        return f"10.{self.block}.192.0/24"

    @property
    def uplink_dns(self) -> str:
        return f"10.{self.block}.192.3"

    @property
    def host_address(self) -> str:
        return f"10.{self.block}.255.1"

    @property
    def node_address(self) -> str:
        return f"10.{self.block}.255.2"

    @property
    def host_interface(self) -> str:
        return f"ft{self.block}"

    @property
    def api_url(self) -> str:
        return f"https://{self.node_address}:6443"

    @property
    def s3_url(self) -> str:
        return f"http://{self.node_address}:7070"

    @property
    def s3_tls_url(self) -> str:
        """The same buckets behind the cluster's own authority; answers once `s3-tls` has been started."""
        return f"https://{self.node_address}:7443"

    @property
    def prometheus_url(self) -> str:
        return f"http://{self.node_address}:9090"


def open_cluster(name: str) -> Cluster:
    """The cluster of that name; gives one that is down the first address block that nothing on this host uses.

    It keeps the one it had while that is free: a cluster of another cache folder may have taken it meanwhile.
    """
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?", name):
        raise ClusterError(f"--name {name!r}: use 1 to 20 lower-case letters, digits and inner hyphens")
    CLUSTERS.mkdir(parents=True, exist_ok=True)
    with held_lock(CLUSTERS / ".lock"):
        block_file = CLUSTERS / name / "block"
        if block_file.exists():
            cluster = Cluster(name, int(block_file.read_text()))
            if cluster.run.exists() or is_free(cluster.block, _read_routes()):
                return cluster
        block_file.parent.mkdir(exist_ok=True)
        block = choose_block(_read_taken_blocks(), _read_routes())
        block_file.write_text(str(block))
        return Cluster(name, block)


def choose_block(taken: set[int], routes: list[str]) -> int:
    """The first block that no cluster owns and no route of the host overlaps."""
    for block in range(FIRST_BLOCK, LAST_BLOCK + 1):
        if block not in taken and is_free(block, routes):
            return block
    raise ClusterError(
        f"no free network: every 10.{FIRST_BLOCK}.0.0/16 to 10.{LAST_BLOCK}.0.0/16 belongs to a cluster or a route; "
        "remove old clusters with `cluster.py down --name NAME --purge`"
    )


def is_free(block: int, routes: list[str]) -> bool:
    """Whether no route of the host overlaps the block."""
    candidate = ipaddress.ip_network(f"10.{block}.0.0/16")
    return not any(candidate.overlaps(ipaddress.ip_network(route)) for route in routes)


@contextmanager
def held_lock(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read_taken_blocks() -> set[int]:
    return {int(file.read_text()) for file in CLUSTERS.glob("*/block")}


def _read_routes() -> list[str]:
    listed = subprocess.run(["ip", "-4", "-json", "route"], capture_output=True, text=True, check=True).stdout
    return [route["dst"] for route in json.loads(listed or "[]") if route["dst"] != "default"]
