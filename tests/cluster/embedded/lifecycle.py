"""Brings a cluster up and down: the order of things, and nothing about what each thing is.

Called by cluster.py and by tests. `bring_up` starts what is missing and leaves what is healthy alone, so it is also the
repair; `take_down` ends the namespaces, with everything in them, and removes the run folder.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from . import components as parts
from .certificates import write_certificates
from .components import Component, Programs
from .configuration import (
    build_corefile,
    build_kubelet_configuration,
    build_node_services,
    build_prometheus_configuration,
    build_proxy_configuration,
    build_storage_classes,
)
from .errors import ClusterError
from .layout import CLUSTERS, IMAGE_NAMESPACE, S3_REGION, Cluster, held_lock
from .namespaces import end_namespaces, ensure_namespaces, init_pid_file
from .packages import install_missing_packages
from .processes import read_pid, stop_process, wait_until
from .progress import show
from .runtime import build_ctr_command, import_pause_image, write_runtime_configuration
from .tools import BIN, KUBE, PAUSE, S3, build_program, install_kubectl_and_helm

LEVELS = {
    "runtime": parts.RUNTIME_COMPONENTS,
    "api": parts.API_COMPONENTS,
    "node": parts.RUNTIME_COMPONENTS + parts.API_COMPONENTS + parts.NODE_COMPONENTS,
}
RUN_FOLDERS = ("pids", "levels", "logs", "pod-logs", "volumes", "buckets", "volume-plugins")


def bring_up(cluster: Cluster, level: str) -> None:
    """Start whatever of this level does not run yet, and return when all of it is ready."""
    if os.geteuid() != 0:
        raise ClusterError("the embedded cluster needs root: run this as root, or name your own cluster instead")
    started = time.monotonic()
    install_missing_packages()
    cluster.folder.mkdir(parents=True, exist_ok=True)
    programs = _build_programs(level)
    with held_lock(cluster.folder / ".lock"):
        for folder in RUN_FOLDERS:
            (cluster.run / folder).mkdir(parents=True, exist_ok=True)
        (cluster.run / "levels" / level).touch()
        init_pid = ensure_namespaces(cluster)
        _write_configuration(cluster, level)
        components = parts.build_components(cluster, programs, init_pid)
        _start_in_order(cluster, [components[name] for name in LEVELS[level]], init_pid)
        _finish(cluster, level)
    show(f"{cluster.name} is ready after {time.monotonic() - started:.0f} s")


def _build_programs(level: str) -> Programs:
    if level == "runtime":
        return Programs(kube=Path("unused"), s3=Path("unused"))
    install_kubectl_and_helm()
    return Programs(kube=build_program(KUBE), s3=build_program(S3) if level == "node" else Path("unused"))


def _write_configuration(cluster: Cluster, level: str) -> None:
    if level != "api":
        cluster.images.mkdir(exist_ok=True)
        write_runtime_configuration(cluster)
    if level == "runtime":
        return
    write_certificates(cluster)
    if level == "node":
        _write_s3_credentials(cluster)
        for name, text in (
            ("Corefile", build_corefile(cluster)),
            ("kubelet.json", json.dumps(build_kubelet_configuration(cluster), indent=2)),
            ("proxy.json", json.dumps(build_proxy_configuration(cluster), indent=2)),
            ("prometheus.json", json.dumps(build_prometheus_configuration(cluster), indent=2)),
        ):
            _write_changed(cluster.run / name, text)


def _write_changed(file: Path, text: str) -> None:
    """kube-proxy ends itself whenever its file is written, changed or not."""
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


def _write_s3_credentials(cluster: Cluster) -> None:
    """Keys named as boto3 reads them from the environment, and as a job's Secret names them."""
    file = cluster.run / "s3.env"
    if file.exists():
        return
    file.touch(mode=0o600)
    file.write_text(
        f"AWS_ACCESS_KEY_ID={secrets.token_hex(10)}\nAWS_SECRET_ACCESS_KEY={secrets.token_hex(20)}\n"
        f"AWS_ENDPOINT_URL_S3={cluster.s3_url}\nAWS_REGION={S3_REGION}\n"
    )


def _start_in_order(cluster: Cluster, wanted: list[Component], init_pid: int) -> None:
    """The API server needs etcd, and all the rest needs the API server; what can start together does."""
    waves: list[list[Component]] = [[], [], []]
    for component in wanted:
        first = component.name in ("etcd", "containerd", "uplink", "s3")
        waves[0 if first else 1 if component.name == "apiserver" else 2].append(component)
    for wave in waves:
        for component in wave:
            if read_pid(parts.pid_file(cluster, component.name)) is None:
                parts.start_component(cluster, component, init_pid)
        for component in wave:
            parts.wait_for_component(cluster, component)


def _finish(cluster: Cluster, level: str) -> None:
    if level != "api":
        import_pause_image(cluster, build_program(PAUSE))
    if level != "runtime":
        objects = build_storage_classes() + (build_node_services(cluster) if level == "node" else [])
        manifest = {"apiVersion": "v1", "kind": "List", "items": objects}
        run_kubectl(cluster, ["apply", "--server-side", "-f", "-"], json.dumps(manifest))
    if level == "node":
        run_kubectl(cluster, ["wait", "--for=condition=Ready", f"node/{cluster.node_name}", "--timeout=60s"])
    if level != "runtime" and not wait_until(lambda: _has_default_account(cluster), 30):
        raise ClusterError(
            "controller-manager makes no service accounts; its last lines:\n"
            + parts.read_last_lines(cluster, "controller-manager")
        )


def _has_default_account(cluster: Cluster) -> bool:
    command = [str(BIN / "kubectl"), "--kubeconfig", str(cluster.kubeconfig), "get", "serviceaccount", "default"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def run_kubectl(cluster: Cluster, arguments: list[str], text: str = "") -> str:
    command = [str(BIN / "kubectl"), "--kubeconfig", str(cluster.kubeconfig), *arguments]
    finished = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise ClusterError(f"kubectl {' '.join(arguments)} failed:\n{finished.stderr.strip()}")
    return finished.stdout


def take_down(cluster: Cluster, purge: bool = False) -> None:
    """End everything of this cluster; images stay unless purge. A cluster that is not up is not an error."""
    with held_lock(cluster.folder / ".lock"):
        for name in ("kubelet", "prometheus"):
            stop_process(parts.pid_file(cluster, name), grace_seconds=0.5)
        end_namespaces(cluster)
        # The kernel takes a moment to drop the mounts of namespaces that have just ended.
        if not wait_until(lambda: _is_removed(cluster.run), 10):
            raise ClusterError(f"down: cannot remove {cluster.run}: look for mounts below it with `findmnt`")
        if purge:
            shutil.rmtree(cluster.images, ignore_errors=True)
    if not cluster.images.exists():
        shutil.rmtree(cluster.folder)


def _is_removed(folder: Path) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def stop_component(cluster: Cluster, name: str, force: bool = False) -> None:
    _check_component_name(name)
    stop_process(parts.pid_file(cluster, name), grace_seconds=0.0 if force else 10.0)


def start_one(cluster: Cluster, name: str) -> None:
    """Start one component of a cluster that is up, and wait until it is ready."""
    _check_component_name(name)
    init_pid = read_running(cluster)
    component = parts.build_components(cluster, _build_programs("node"), init_pid)[name]
    if read_pid(parts.pid_file(cluster, name)) is None:
        parts.start_component(cluster, component, init_pid)
    parts.wait_for_component(cluster, component)


def _check_component_name(name: str) -> None:
    known = (*LEVELS["node"], *parts.OPTIONAL_COMPONENTS)
    if name not in known:
        raise ClusterError(f"no component {name!r}: use one of {', '.join(known)}")


def read_running(cluster: Cluster) -> int:
    """Pid of the cluster's process 1."""
    pid = read_pid(init_pid_file(cluster))
    if pid is None:
        raise ClusterError(f"cluster {cluster.name!r} is not up: start it with `cluster.py up --name {cluster.name}`")
    return pid


def read_status(cluster: Cluster) -> dict[str, Any]:
    """Everything another program needs to use the cluster, as plain data."""
    alive = {name: read_pid(parts.pid_file(cluster, name)) is not None for name in _list_expected(cluster)}
    init_pid = read_pid(init_pid_file(cluster))
    state = "down" if init_pid is None else "up" if alive and all(alive.values()) else "degraded"
    return {
        "name": cluster.name,
        "state": state,
        "kubeconfig": str(cluster.kubeconfig),
        "context": cluster.context,
        "node": cluster.node_name,
        "nodeAddress": cluster.node_address,
        "hostAddress": cluster.host_address,
        "uplinkDns": cluster.uplink_dns,
        "s3": {
            "url": cluster.s3_url,
            "tlsUrl": cluster.s3_tls_url,
            "authority": str(cluster.pki / "ca.crt"),
            "credentials": str(cluster.run / "s3.env"),
        },
        "prometheus": cluster.prometheus_url,
        "containerd": {
            "socket": str(cluster.containerd_socket),
            "namespace": IMAGE_NAMESPACE,
            "ctr": build_ctr_command(cluster),
        },
        "initPid": init_pid,
        "enter": ["nsenter", f"--target={init_pid}", "--net", "--mount", "--pid"] if init_pid else [],
        "bin": str(BIN),
        "logs": str(cluster.run / "logs"),
        "components": alive,
    }


def _list_expected(cluster: Cluster) -> list[str]:
    """The components of the levels that were brought up, and those started by name."""
    levels = (cluster.run / "levels").glob("*")
    wanted = {name for level in levels for name in LEVELS[level.name]}
    started = {file.name for file in (cluster.run / "pids").glob("*")} - {"init"}
    return sorted(wanted | started)


def list_cluster_names() -> list[str]:
    return sorted(file.parent.name for file in CLUSTERS.glob("*/block"))
