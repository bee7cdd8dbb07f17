"""A cluster's namespaces, its link to the host and its uplink: created, entered, and ended with everything in them.

Called by lifecycle.py. The host gets one interface and one route per cluster and no firewall rule; both vanish with the
namespaces. Outbound traffic goes through slirp4netns, an ordinary process, so the host forwards and translates nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from .errors import ClusterError
from .layout import Cluster
from .processes import create_namespaces, enter_namespaces, read_pid, start_daemon, stop_process, wait_until

CGROUPS = Path("/sys/fs/cgroup")
UPLINK_INTERFACE = "uplink"
HOST_LINK = "host"
MTU = "9000"


def ensure_namespaces(cluster: Cluster) -> int:
    """Pid of the cluster's process 1, started with network and control groups where it does not run."""
    pid = read_pid(init_pid_file(cluster))
    if pid is not None:
        return pid
    _write_resolver(cluster)
    (cluster.run / "init.ready").unlink(missing_ok=True)
    pid = start_daemon(
        [sys.executable, "-S", str(Path(__file__).with_name("init.py")), str(cluster.run)],
        init_pid_file(cluster),
        cluster.run / "logs" / "init.log",
        create_namespaces,
    )
    if not wait_until((cluster.run / "init.ready").exists, 10):
        log = (cluster.run / "logs" / "init.log").read_text()[-1500:]
        raise ClusterError(f"init: the cluster's namespaces did not come up:\n{log}")
    _connect_to_host(cluster, pid)
    _create_control_groups(cluster)
    return pid


def init_pid_file(cluster: Cluster) -> Path:
    return cluster.run / "pids" / "init"


def build_uplink_command(cluster: Cluster, init_pid: int) -> list[str]:
    return [
        *("slirp4netns", "--configure", "--mtu=65520", f"--cidr={cluster.uplink_network}"),
        *(str(init_pid), UPLINK_INTERFACE),
    ]


def end_namespaces(cluster: Cluster) -> None:
    """Kill process 1; the kernel ends everything else in its namespaces. Returns when nothing of it is left."""
    stop_process(init_pid_file(cluster), stop_signal=signal.SIGKILL)
    gone = wait_until(lambda: not Path(f"/sys/class/net/{cluster.host_interface}").exists(), 15)
    if not gone:
        subprocess.run(["ip", "link", "delete", cluster.host_interface], check=False, capture_output=True)
    _remove_control_groups(cluster)


def _write_resolver(cluster: Cluster) -> None:
    text = f"nameserver {cluster.uplink_dns}\n"
    (cluster.run / "resolv.conf").write_text(text)
    (cluster.run / "pod-resolv.conf").write_text(text + "options ndots:1\n")


def _connect_to_host(cluster: Cluster, pid: int) -> None:
    host = cluster.host_interface
    # What is left there is this cluster's own: `open_cluster` gives no block that another one uses.
    subprocess.run(["ip", "link", "delete", host], check=False, capture_output=True)
    for command in (
        f"link add {host} mtu {MTU} type veth peer name {HOST_LINK} mtu {MTU} netns {pid}",
        f"address add {cluster.host_address}/30 dev {host}",
        f"link set {host} up",
    ):
        _run(["ip", *command.split()])
    for command in (
        "link set lo up",
        f"address add {cluster.node_address}/30 dev {HOST_LINK}",
        f"link set {HOST_LINK} up",
        # Each pod has its own route. Without this one, a packet to a pod that has gone leaves by the uplink, comes back
        # by the host's route and circles, a socket of the uplink each time, until nothing else gets through.
        f"route add unreachable {cluster.pod_network}",
        # The same for a Service that has gone; one that exists is translated before it is routed, but for packets of
        # the node's own, which must find a route first.
        f"rule add priority 100 to {cluster.service_network} iif lo lookup main",
        f"rule add priority 101 to {cluster.service_network} unreachable",
    ):
        _run(["nsenter", f"--net=/proc/{pid}/ns/net", "ip", *command.split()])
    _run(["ip", "route", "add", cluster.network, "via", cluster.node_address])


def _run(command: list[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise ClusterError(f"network: `{' '.join(command)}` failed: {finished.stderr.strip()}")


def _create_control_groups(cluster: Cluster) -> None:
    for hierarchy in _list_hierarchies():
        (hierarchy / cluster.cgroup).mkdir(exist_ok=True)


def _list_hierarchies() -> list[Path]:
    """Every mounted version 1 hierarchy, or the one of version 2."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    return [folder for folder in CGROUPS.iterdir() if (folder / "cgroup.procs").exists() and not folder.is_symlink()]


def _remove_control_groups(cluster: Cluster) -> None:
    for hierarchy in _list_hierarchies():
        top = hierarchy / cluster.cgroup
        if not wait_until(lambda top=top: _is_removed(top), 10):  # type: ignore[misc]
            raise ClusterError(f"down: {top} still holds processes; look at {top}/cgroup.procs and run down again")


def _is_removed(top: Path) -> bool:
    for folder, _, _ in os.walk(top, topdown=False):
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return False
    return not top.exists()


def enter_cluster(pid: int, env: dict[str, str] | None = None) -> None:
    enter_namespaces(pid, env=env)


def enter_process_namespace(pid: int) -> None:
    """For the uplink: on the host's network, yet dying with the cluster."""
    enter_namespaces(pid, ("pid",))
