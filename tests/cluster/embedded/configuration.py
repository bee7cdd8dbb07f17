"""Configuration files of kubelet, kube-proxy, CoreDNS and Prometheus, and the objects every cluster starts with. Pure.

Called by lifecycle.py, which writes them.
"""

from __future__ import annotations

from typing import Any

from .layout import CLUSTER_DOMAIN, SYSTEM_NAMESPACE, Cluster

Object = dict[str, Any]


def build_kubelet_configuration(cluster: Cluster) -> Object:
    certificate = str(cluster.pki / "kubelet.crt")
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {"x509": {"clientCAFile": str(cluster.pki / "ca.crt")}, "webhook": {"enabled": True}},
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": certificate,
        "tlsPrivateKeyFile": certificate.replace(".crt", ".key"),
        "healthzBindAddress": cluster.node_address,
        "containerRuntimeEndpoint": f"unix://{cluster.containerd_socket}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{cluster.cgroup}",
        "failSwapOn": False,
        "oomScoreAdj": 0,
        "clusterDNS": [cluster.dns_service_address],
        "clusterDomain": CLUSTER_DOMAIN,
        "resolvConf": str(cluster.run / "pod-resolv.conf"),
        "podLogsDir": str(cluster.run / "pod-logs"),
        "volumePluginDir": str(cluster.run / "volume-plugins"),
        "serializeImagePulls": False,
        # There is no registry to fetch a removed image from again.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "nodeStatusUpdateFrequency": "4s",
        "shutdownGracePeriod": "0s",
        "logging": {"verbosity": 1},
    }


def build_proxy_configuration(cluster: Cluster) -> Object:
    keep_host_settings = {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"}
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "clusterCIDR": cluster.pod_network,
        "clientConnection": {"kubeconfig": str(cluster.pki / "proxy.kubeconfig")},
        "hostnameOverride": cluster.node_name,
        "healthzBindAddress": f"{cluster.node_address}:10256",
        "metricsBindAddress": f"{cluster.node_address}:10249",
        "oomScoreAdj": 0,
        "conntrack": keep_host_settings,
    }


def build_corefile(cluster: Cluster) -> str:
    """Short time to live: tests delete and create Services of the same name."""
    return f""".:53 {{
    bind {cluster.node_address}
    errors
    health {cluster.node_address}:8080
    kubernetes {CLUSTER_DOMAIN} in-addr.arpa ip6.arpa {{
        kubeconfig {cluster.pki}/addons.kubeconfig
        pods insecure
        ttl 2
    }}
    forward . {cluster.uplink_dns}
    cache 5
}}
"""


def build_prometheus_configuration(cluster: Cluster) -> Object:
    """Scrapes the pods that our discovery program lists: Debian's Prometheus is built without Kubernetes discovery."""
    job = {
        "job_name": "pods",
        "http_sd_configs": [{"url": f"http://{cluster.node_address}:9091/pods", "refresh_interval": "2s"}],
        "tls_config": {"insecure_skip_verify": True},
    }
    return {"global": {"scrape_interval": "2s", "scrape_timeout": "2s"}, "scrape_configs": [job]}


def build_storage_classes() -> list[Object]:
    """The classes that the provisioner serves; `standard` is the default."""
    return [
        _build_storage_class("standard", {}, default=True),
        _build_storage_class("limited", {"limited": "true"}),
        _build_storage_class("zonal", {"topology": "zone"}),
    ]


def build_node_services(cluster: Cluster) -> list[Object]:
    """Services that lead to processes on the node: DNS, S3, Prometheus."""
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM_NAMESPACE}},
        *_build_node_service(cluster, "kube-system", "kube-dns", {"dns": ("UDP", 53), "dns-tcp": ("TCP", 53)}),
        *_build_node_service(cluster, SYSTEM_NAMESPACE, "s3", {"http": ("TCP", 7070)}),
        *_build_node_service(cluster, SYSTEM_NAMESPACE, "prometheus", {"http": ("TCP", 9090)}),
    ]


def _build_storage_class(name: str, parameters: dict[str, str], default: bool = False) -> Object:
    annotations = {"storageclass.kubernetes.io/is-default-class": "true"} if default else {}
    # An empty map is stored as none, and applying it again would read as a change of what may not change.
    optional = {"parameters": parameters} if parameters else {}
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name, "annotations": annotations},
        "provisioner": "finetune.dev/local",
        **optional,
        "reclaimPolicy": "Delete",
        "volumeBindingMode": "WaitForFirstConsumer",
        "allowVolumeExpansion": True,
    }


def _build_node_service(
    cluster: Cluster, namespace: str, name: str, ports: dict[str, tuple[str, int]]
) -> tuple[Object, Object]:
    """A Service without selector and the slice that leads it to the node itself."""
    listed = [{"name": port, "protocol": protocol, "port": number} for port, (protocol, number) in ports.items()]
    address = {"clusterIP": cluster.dns_service_address} if name == "kube-dns" else {}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"ports": listed, **address},
    }
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{name}-node", "namespace": namespace, "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "ports": listed,
        "endpoints": [{"addresses": [cluster.node_address], "conditions": {"ready": True}}],
    }
    return service, endpoints
