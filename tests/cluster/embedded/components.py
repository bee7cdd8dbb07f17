"""The daemons of one cluster: how each is started and how it says that it is ready.

Called by lifecycle.py. Pure but for `start_component` and `wait_for_component`.
"""

from __future__ import annotations

import socket
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from .errors import ClusterError
from .layout import S3_REGION, Cluster
from .namespaces import build_uplink_command, enter_cluster, enter_process_namespace
from .processes import read_pid, start_daemon

READY_SECONDS = 60.0
RUNTIME_COMPONENTS = ("uplink", "containerd")
API_COMPONENTS = ("etcd", "apiserver", "controller-manager")
NODE_COMPONENTS = ("scheduler", "kubelet", "proxy", "dns", "provisioner", "s3", "discovery", "prometheus")
OPTIONAL_COMPONENTS = ("kwok", "s3-tls")


@dataclass(frozen=True)
class Component:
    name: str
    argv: list[str]
    ready: str
    """URL that answers 200, `unix:PATH` that accepts, or "" for a daemon that needs no wait."""
    environment: dict[str, str] = field(default_factory=dict)
    on_host_network: bool = False


@dataclass(frozen=True)
class Programs:
    """Where our own binaries lie."""

    kube: Path
    s3: Path


def start_component(cluster: Cluster, component: Component, init_pid: int) -> None:
    def enter() -> None:
        if component.on_host_network:
            enter_process_namespace(init_pid)
        else:
            enter_cluster(init_pid, component.environment)

    start_daemon(component.argv, pid_file(cluster, component.name), log_file(cluster, component.name), enter)


def wait_for_component(cluster: Cluster, component: Component) -> None:
    """Returns when the component is ready; names it, with its last words, when it dies or takes too long."""
    deadline = time.monotonic() + READY_SECONDS
    while not is_ready(component):
        if read_pid(pid_file(cluster, component.name)) is None:
            raise ClusterError(f"{component.name} ended; its last lines:\n{read_last_lines(cluster, component.name)}")
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{component.name} was not ready after {READY_SECONDS:.0f} s ({component.ready}); its last lines:\n"
                + read_last_lines(cluster, component.name)
            )
        time.sleep(0.1)


def is_ready(component: Component) -> bool:
    kind, _, place = component.ready.partition(":")
    if kind == "unix":
        with socket.socket(socket.AF_UNIX) as connection:
            return connection.connect_ex(place) == 0
    return not component.ready or _answers(component.ready)


def _answers(url: str) -> bool:
    # Health endpoints only: no credential is sent, and some serve certificates of their own making.
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
    )
    try:
        with opener.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def pid_file(cluster: Cluster, name: str) -> Path:
    return cluster.run / "pids" / name


def log_file(cluster: Cluster, name: str) -> Path:
    return cluster.run / "logs" / f"{name}.log"


def read_last_lines(cluster: Cluster, name: str, count: int = 15) -> str:
    log = log_file(cluster, name)
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:]) if log.exists() else "(no log)"


def build_components(cluster: Cluster, programs: Programs, init_pid: int) -> dict[str, Component]:
    components = [
        *_build_runtime(cluster, init_pid),
        *_build_control_plane(cluster, str(programs.kube)),
        *_build_node(cluster, str(programs.kube)),
        *_build_addons(cluster, programs),
    ]
    return {component.name: component for component in components}


def _build_runtime(cluster: Cluster, init_pid: int) -> list[Component]:
    containerd = ["containerd", "--config", f"{cluster.run}/containerd.toml"]
    return [
        Component("uplink", build_uplink_command(cluster, init_pid), "", on_host_network=True),
        Component("containerd", containerd, f"unix:{cluster.containerd_socket}"),
    ]


def _build_control_plane(cluster: Cluster, kube: str) -> list[Component]:
    manager_kubeconfig = f"--kubeconfig={cluster.pki}/controller-manager.kubeconfig"
    scheduler_kubeconfig = f"--kubeconfig={cluster.pki}/scheduler.kubeconfig"
    address = cluster.node_address
    return [
        Component("etcd", _build_etcd_command(cluster), f"http://{address}:2381/health"),
        Component("apiserver", [kube, "kube-apiserver", *_list_apiserver_flags(cluster)], f"{cluster.api_url}/readyz"),
        Component(
            "controller-manager",
            [
                *(kube, "kube-controller-manager", manager_kubeconfig, "--leader-elect=false"),
                *(f"--root-ca-file={cluster.pki}/ca.crt", "--use-service-account-credentials=true"),
                f"--service-account-private-key-file={cluster.pki}/service-accounts.key",
                f"--cluster-signing-cert-file={cluster.pki}/ca.crt",
                f"--cluster-signing-key-file={cluster.pki}/ca.key",
                *("--cert-dir=/run/controller-manager", "--concurrent-job-syncs=10"),
                # A node that went away is noticed within half a minute, so that tests of lost nodes end.
                *("--node-monitor-period=2s", "--node-monitor-grace-period=20s"),
            ],
            f"https://{address}:10257/healthz",
        ),
        Component(
            "scheduler",
            [kube, "kube-scheduler", scheduler_kubeconfig, "--leader-elect=false", "--cert-dir=/run/scheduler"],
            f"https://{address}:10259/healthz",
        ),
    ]


def _build_etcd_command(cluster: Cluster) -> list[str]:
    return [
        *("etcd", f"--data-dir={cluster.run}/etcd", "--unsafe-no-fsync", "--log-level=warn"),
        *("--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379"),
        *("--listen-peer-urls=http://127.0.0.1:2380", f"--listen-metrics-urls=http://{cluster.node_address}:2381"),
        *("--quota-backend-bytes=1073741824", "--auto-compaction-retention=10m"),
    ]


def _list_apiserver_flags(cluster: Cluster) -> list[str]:
    pki = cluster.pki
    return [
        "--etcd-servers=http://127.0.0.1:2379",
        f"--advertise-address={cluster.node_address}",
        "--secure-port=6443",
        f"--service-cluster-ip-range={cluster.service_network}",
        f"--client-ca-file={pki}/ca.crt",
        f"--tls-cert-file={pki}/apiserver.crt",
        f"--tls-private-key-file={pki}/apiserver.key",
        f"--kubelet-certificate-authority={pki}/ca.crt",
        f"--kubelet-client-certificate={pki}/apiserver-to-kubelet.crt",
        f"--kubelet-client-key={pki}/apiserver-to-kubelet.key",
        # The node's name is in no DNS.
        "--kubelet-preferred-address-types=InternalIP",
        f"--service-account-key-file={pki}/service-accounts.pub",
        f"--service-account-signing-key-file={pki}/service-accounts.key",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        f"--requestheader-client-ca-file={pki}/front-proxy-ca.crt",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-username-headers=X-Remote-User",
        f"--proxy-client-cert-file={pki}/front-proxy-client.crt",
        f"--proxy-client-key-file={pki}/front-proxy-client.key",
    ]


def _build_node(cluster: Cluster, kube: str) -> list[Component]:
    address = cluster.node_address
    kubelet = [
        *(kube, "kubelet", f"--config={cluster.run}/kubelet.json", f"--root-dir={cluster.run}/kubelet"),
        *(f"--kubeconfig={cluster.pki}/kubelet.kubeconfig", f"--hostname-override={cluster.node_name}"),
        *(f"--node-ip={address}", "--cert-dir=/run/kubelet"),
    ]
    return [
        Component("kubelet", kubelet, f"http://{address}:10248/healthz"),
        Component("proxy", [kube, "kube-proxy", f"--config={cluster.run}/proxy.json"], f"http://{address}:10256/livez"),
    ]


def _build_addons(cluster: Cluster, programs: Programs) -> list[Component]:
    kube, kubeconfig, address = str(programs.kube), f"{cluster.pki}/addons.kubeconfig", cluster.node_address
    provisioner = [kube, "provisioner", f"-kubeconfig={kubeconfig}", f"-root={cluster.run}/volumes"]
    s3 = [str(programs.s3), f"-folder={cluster.run}/buckets", f"-region={S3_REGION}"]
    tls = [f"-tls-cert={cluster.pki}/s3.crt", f"-tls-key={cluster.pki}/s3.key"]
    s3_keys = _read_s3_credentials(cluster)
    discovery = [kube, "discovery", f"-kubeconfig={kubeconfig}", f"-address={address}:9091"]
    prometheus = [
        *("prometheus", f"--config.file={cluster.run}/prometheus.json", f"--storage.tsdb.path={cluster.run}/metrics"),
        *(f"--web.listen-address={address}:9090", "--web.enable-lifecycle", "--log.level=warn"),
    ]
    kwok = [kube, "kwok", f"-kubeconfig={kubeconfig}"]
    return [
        Component("dns", [kube, "coredns", "-conf", f"{cluster.run}/Corefile"], f"http://{address}:8080/health"),
        Component("provisioner", provisioner, ""),
        Component("discovery", discovery, f"http://{address}:9091/pods"),
        Component("s3", [*s3, f"-address={address}:7070"], f"{cluster.s3_url}/health", s3_keys),
        Component("s3-tls", [*s3, f"-address={address}:7443", *tls], f"{cluster.s3_tls_url}/health", s3_keys),
        Component("prometheus", prometheus, f"{cluster.prometheus_url}/-/ready"),
        # etcd 3.4 cannot serve streamed lists: without this KWOK tries them first and sees changes seconds late.
        Component("kwok", kwok, "", {"KUBE_FEATURE_WatchListClient": "false"}),
    ]


def _read_s3_credentials(cluster: Cluster) -> dict[str, str]:
    file = cluster.run / "s3.env"
    if not file.exists():
        return {}
    values = dict(line.split("=", 1) for line in file.read_text().splitlines())
    return {"ROOT_ACCESS_KEY": values["AWS_ACCESS_KEY_ID"], "ROOT_SECRET_KEY": values["AWS_SECRET_ACCESS_KEY"]}
