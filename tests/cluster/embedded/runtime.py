"""The container runtime of one cluster: containerd's and CNI's configuration, and the pause image.

Called by lifecycle.py. Images are kept outside the run folder so that they survive `down`; nothing is ever pulled.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

from .errors import ClusterError
from .layout import IMAGE_NAMESPACE, PAUSE_IMAGE, Cluster

CNI_PROGRAMS = "/usr/lib/cni"


def write_runtime_configuration(cluster: Cluster) -> None:
    (cluster.run / "containerd.toml").write_text(_build_containerd_configuration(cluster))
    network = cluster.run / "cni"
    network.mkdir(exist_ok=True)
    (network / "10-pods.conflist").write_text(json.dumps(_build_pod_network(cluster), indent=2))


def _build_containerd_configuration(cluster: Cluster) -> str:
    # restrict_oom_score_adj: root without CAP_SYS_RESOURCE may not lower it, and every sandbox would fail.
    return f"""version = 2
root = "{cluster.images}"
state = "{cluster.run}/containerd-state"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
address = "{cluster.containerd_socket}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE_IMAGE}"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{CNI_PROGRAMS}"
conf_dir = "{cluster.run}/cni"
"""


def _build_pod_network(cluster: Cluster) -> dict[str, object]:
    """Routed links instead of a bridge: no bridge filter of the kernel's is needed for pods to reach Services."""
    addresses = {
        "type": "host-local",
        "dataDir": "/run/cni",
        "ranges": [[{"subnet": cluster.pod_network}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    pods = {"type": "ptp", "ipMasq": True, "mtu": 9000, "ipam": addresses}
    ports = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}
    return {"cniVersion": "0.4.0", "name": "pods", "plugins": [pods, ports]}


def build_ctr_command(cluster: Cluster) -> list[str]:
    return ["ctr", "--address", str(cluster.containerd_socket), "--namespace", IMAGE_NAMESPACE]


def import_pause_image(cluster: Cluster, binary: Path) -> None:
    """Pack the pause program as an image and load it, unless this cluster's store has it."""
    ctr = build_ctr_command(cluster)
    listed = subprocess.run([*ctr, "images", "list", "-q"], capture_output=True, text=True, check=False)
    if PAUSE_IMAGE in listed.stdout.split():
        return
    archive = cluster.run / "pause.tar"
    archive.write_bytes(build_image_archive(PAUSE_IMAGE, {"pause": binary.read_bytes()}, ["/pause"]))
    finished = subprocess.run([*ctr, "images", "import", str(archive)], capture_output=True, text=True, check=False)
    archive.unlink()
    if finished.returncode:
        raise ClusterError(f"containerd: cannot import the pause image: {finished.stderr.strip()}")


def build_image_archive(reference: str, files: dict[str, bytes], entrypoint: list[str]) -> bytes:
    """A one-layer image of executable files, as the archive that `docker save` writes."""
    layer = _build_tar(files, mode=0o755)
    configuration = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": entrypoint, "User": "65532:65532"},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        }
    ).encode()
    name = f"{hashlib.sha256(configuration).hexdigest()}.json"
    manifest = json.dumps([{"Config": name, "RepoTags": [reference], "Layers": ["layer.tar"]}]).encode()
    return _build_tar({"manifest.json": manifest, name: configuration, "layer.tar": layer}, mode=0o644)


def _build_tar(files: dict[str, bytes], mode: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
