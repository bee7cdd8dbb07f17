"""The certificates and kubeconfigs of one cluster, made once per `up` with openssl. Called by lifecycle.py.

Every component has an identity of its own, as in a normal cluster, so that RBAC and the node authorizer are real.
"""

from __future__ import annotations

import base64
import json
import subprocess

from .errors import ClusterError
from .layout import CLUSTER_DOMAIN, SYSTEM_NAMESPACE, Cluster

VALID_DAYS = "3650"
NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
CLIENTS = {
    "admin": "/O=system:masters/CN=kubernetes-admin",
    "addons": "/O=system:masters/CN=embedded-cluster-addons",
    "controller-manager": "/CN=system:kube-controller-manager",
    "scheduler": "/CN=system:kube-scheduler",
    "proxy": "/CN=system:kube-proxy",
    "apiserver-to-kubelet": "/O=system:masters/CN=kube-apiserver-kubelet-client",
}


def write_certificates(cluster: Cluster) -> None:
    """All keys, certificates and kubeconfigs; does nothing where they exist."""
    if cluster.kubeconfig.exists():
        return
    cluster.pki.mkdir(mode=0o700, exist_ok=True)
    _write_authority(cluster, "ca", "/CN=finetune-embedded-cluster")
    _write_authority(cluster, "front-proxy-ca", "/CN=finetune-embedded-front-proxy")
    _openssl(["ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", f"{cluster.pki}/service-accounts.key"])
    _openssl(
        ["pkey", "-in", f"{cluster.pki}/service-accounts.key", "-pubout", "-out", f"{cluster.pki}/service-accounts.pub"]
    )
    _write_server(cluster, "apiserver", "/CN=kube-apiserver", _list_api_names(cluster))
    node = ["IP:127.0.0.1", f"IP:{cluster.node_address}", f"DNS:{cluster.node_name}"]
    _write_server(cluster, "kubelet", f"/O=system:nodes/CN=system:node:{cluster.node_name}", node)
    services = [f"DNS:s3.{SYSTEM_NAMESPACE}.svc", f"DNS:s3.{SYSTEM_NAMESPACE}.svc.{CLUSTER_DOMAIN}"]
    _write_server(cluster, "s3", "/CN=s3", [f"IP:{cluster.node_address}", *services])
    _write_client(cluster, "front-proxy-client", "/CN=front-proxy-client", "front-proxy-ca")
    for name, subject in CLIENTS.items():
        _write_client(cluster, name, subject, "ca")
    for name in ("addons", "controller-manager", "scheduler", "proxy", "kubelet"):
        (cluster.pki / f"{name}.kubeconfig").write_text(json.dumps(_build_kubeconfig(cluster, name)))
    cluster.kubeconfig.touch(mode=0o600)
    cluster.kubeconfig.write_text(json.dumps(_build_kubeconfig(cluster, "admin"), indent=2))


def _list_api_names(cluster: Cluster) -> list[str]:
    names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", f"kubernetes.default.svc.{CLUSTER_DOMAIN}"]
    addresses = ["127.0.0.1", cluster.node_address, cluster.api_service_address]
    return [f"DNS:{name}" for name in ["localhost", *names]] + [f"IP:{address}" for address in addresses]


def _build_kubeconfig(cluster: Cluster, user: str) -> dict[str, object]:
    """Credentials are inlined so that the file can be copied anywhere."""

    def inline(file: str) -> str:
        return base64.b64encode((cluster.pki / file).read_bytes()).decode()

    name = cluster.context
    credentials = {"client-certificate-data": inline(f"{user}.crt"), "client-key-data": inline(f"{user}.key")}
    server = {"server": cluster.api_url, "certificate-authority-data": inline("ca.crt")}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": server}],
        "users": [{"name": f"{name}-{user}", "user": credentials}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": f"{name}-{user}"}}],
        "current-context": name,
    }


def _write_authority(cluster: Cluster, name: str, subject: str) -> None:
    usage = ["-addext", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature"]
    files = ["-keyout", f"{cluster.pki}/{name}.key", "-out", f"{cluster.pki}/{name}.crt"]
    _openssl(["req", "-x509", *NEW_KEY, *files, "-days", VALID_DAYS, "-subj", subject, *usage])


def _write_server(cluster: Cluster, name: str, subject: str, names: list[str]) -> None:
    usage = "extendedKeyUsage=serverAuth,clientAuth"
    _write_signed(cluster, name, subject, "ca", [usage, f"subjectAltName={','.join(names)}"])


def _write_client(cluster: Cluster, name: str, subject: str, authority: str) -> None:
    _write_signed(cluster, name, subject, authority, ["extendedKeyUsage=clientAuth"])


def _write_signed(cluster: Cluster, name: str, subject: str, authority: str, extensions: list[str]) -> None:
    signer = ["-CA", f"{cluster.pki}/{authority}.crt", "-CAkey", f"{cluster.pki}/{authority}.key"]
    files = ["-keyout", f"{cluster.pki}/{name}.key", "-out", f"{cluster.pki}/{name}.crt"]
    added = [part for text in ["basicConstraints=critical,CA:FALSE", *extensions] for part in ("-addext", text)]
    _openssl(["req", "-x509", *NEW_KEY, *signer, *files, "-days", VALID_DAYS, "-subj", subject, *added])


def _openssl(arguments: list[str]) -> None:
    finished = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    if finished.returncode:
        raise ClusterError(f"openssl {' '.join(arguments)} failed:\n{finished.stderr}")
