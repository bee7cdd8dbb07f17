"""The embedded cluster itself: it leaves nothing behind, two never collide, and what it offers to pods works.

Uses clusters with names of its own, so it can run while `default` is up; needs root and no built images.
"""

import json
import os
import re
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.cluster.embedded.errors import ClusterError
from tests.cluster.embedded.layout import choose_block
from tests.cluster.embedded.processes import wait_until
from tests.cluster.embedded.runtime import build_image_archive

TOOL = Path(__file__).with_name("cluster.py")
SHELL_IMAGE = "localhost/finetune/shell:1"
BUSYBOX = Path("/bin/busybox")
RESTRICTED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


class Cluster:
    """One cluster under test, driven only through the command line."""

    def __init__(self, name):
        self.name = name
        self.status = {}

    def tool(self, command, *arguments, check=True):
        return subprocess.run(
            [sys.executable, str(TOOL), command, "--name", self.name, *arguments],
            capture_output=True,
            text=True,
            check=check,
        )

    def up(self, *arguments):
        finished = self.tool("up", *arguments, check=False)
        assert finished.returncode == 0, finished.stderr
        self.status = json.loads(finished.stdout)

    def kubectl(self, *arguments, text=None, check=True):
        command = [f"{self.status['bin']}/kubectl", "--kubeconfig", self.status["kubeconfig"], *arguments]
        finished = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        assert not check or finished.returncode == 0, finished.stderr
        return finished.stdout

    def apply(self, *objects):
        self.kubectl("apply", "-f", "-", text=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    def load_shell_image(self):
        program = BUSYBOX.read_bytes()
        archive = build_image_archive(SHELL_IMAGE, {"bin/busybox": program, "bin/sh": program}, ["/bin/sh"])
        subprocess.run([*self.status["containerd"]["ctr"], "images", "import", "-"], input=archive, check=True)


def read_host():
    """What a cluster could leave on the host, without what other clusters and other programs own."""

    def lines(command):
        return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())

    settings = ("vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys")
    return {
        "mounts": {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()},
        "interfaces": {entry.name for entry in Path("/sys/class/net").iterdir() if not is_of_a_cluster(entry.name)},
        "routes": {line for line in lines(["ip", "-4", "route"]) if not is_of_a_cluster(line)},
        "firewall": lines(["iptables-save"]) if Path("/usr/sbin/iptables-save").exists() else set(),
        "namespaces": lines(["ip", "netns", "list"]),
        "settings": {name: Path("/proc/sys", name).read_text() for name in settings},
    }


def is_of_a_cluster(text):
    """Other clusters may come and go while a test runs; its own is looked for by name."""
    return re.search(r"\bft\d+\b", text) is not None


def has_interface(cluster):
    block = cluster.status["nodeAddress"].split(".")[1]
    return Path(f"/sys/class/net/ft{block}").exists()


def without_comments(host):
    """iptables-save prints its own times and packet counts."""
    return {**host, "firewall": {line for line in host["firewall"] if not line.startswith(("#", ":"))}}


def list_processes_naming(text):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text in (folder / "cmdline").read_text():
                found.append(folder.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def list_control_groups(name):
    return [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/finetune-{name}-*")]


@pytest.fixture(scope="module")
def make_cluster():
    made = []

    def make():
        cluster = Cluster(f"t-{secrets.token_hex(3)}")
        made.append(cluster)
        return cluster

    yield make
    for cluster in made:
        cluster.tool("down", "--purge", check=False)


@pytest.fixture(scope="module")
def cluster(make_cluster):
    made = make_cluster()
    made.up()
    made.load_shell_image()
    return made


def build_pod(name, script, *, claim="", **fields):
    mounts, volumes = [], []
    if claim:
        mounts = [{"name": "data", "mountPath": "/data"}]
        volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}]
    identity = {"runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532, "runAsNonRoot": True}
    container = {
        "name": "main",
        "image": SHELL_IMAGE,
        "command": ["/bin/sh", "-c", script],
        "securityContext": RESTRICTED,
        "volumeMounts": mounts,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}, **fields.pop("metadata", {})},
        "spec": {
            "restartPolicy": "Never",
            "securityContext": {**identity, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
            "volumes": volumes,
            "terminationGracePeriodSeconds": 0,
            **fields,
        },
    }


def build_claim(name, size, storage_class=None):
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}}
    if storage_class:
        spec["storageClassName"] = storage_class
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}


def wait_for_pod(cluster, name, phase):
    def reached():
        return cluster.kubectl("get", "pod", name, "-o", "jsonpath={.status.phase}") == phase

    assert wait_until(reached, 60, 0.5), cluster.kubectl("describe", "pod", name)


def read_url(url):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=5) as response:
        return response.read().decode()


def test_a_new_cluster_takes_the_first_network_that_neither_host_nor_cluster_uses():
    assert choose_block(taken={110, 111}, routes=["10.112.7.0/24", "192.168.0.0/16", "10.113.4.1"]) == 114
    with pytest.raises(ClusterError, match="no free network"):
        choose_block(taken=set(), routes=["10.0.0.0/8"])


def test_down_leaves_nothing_of_a_cluster_that_ran_pods(make_cluster):
    before = without_comments(read_host())
    cluster = make_cluster()
    cluster.up()
    cluster.load_shell_image()
    cluster.apply(build_claim("full", "4Mi", "limited"), build_pod("idle", "busybox sleep 600", claim="full"))
    wait_for_pod(cluster, "idle", "Running")
    assert has_interface(cluster)
    assert list_processes_naming(f"/clusters/{cluster.name}/")
    assert list_control_groups(cluster.name)

    cluster.tool("down", "--purge")

    assert without_comments(read_host()) == before
    assert not has_interface(cluster)
    assert list_processes_naming(f"/clusters/{cluster.name}/") == []
    assert list_control_groups(cluster.name) == []
    assert not Path(cluster.status["kubeconfig"]).parents[1].exists()


def test_a_running_cluster_changes_no_mount_rule_or_setting_of_the_host(make_cluster):
    before = without_comments(read_host())
    cluster = make_cluster()
    cluster.up()
    assert has_interface(cluster)
    assert without_comments(read_host()) == before
    cluster.tool("down", "--purge")


def test_each_of_two_clusters_survives_the_others_end(cluster, make_cluster):
    other = make_cluster()
    other.up()
    other.load_shell_image()
    for one in (cluster, other):
        one.apply(build_pod("survivor", "busybox sleep 600"))
        wait_for_pod(one, "survivor", "Running")
    started = cluster.kubectl("get", "pod", "survivor", "-o", "jsonpath={.status.containerStatuses}")

    other.tool("down")

    assert json.loads(cluster.tool("status").stdout)["state"] == "up"
    assert cluster.kubectl("get", "pod", "survivor", "-o", "jsonpath={.status.containerStatuses}") == started
    cluster.kubectl("exec", "survivor", "--", "/bin/busybox", "true")

    other.up()
    cluster.kubectl("delete", "pod", "survivor")
    assert other.status["state"] == "up"


def test_a_cluster_that_is_down_leaves_its_network_to_one_of_another_cache_folder(cluster, tmp_path):
    folder = tmp_path / "clusters" / cluster.name
    folder.mkdir(parents=True)
    block = cluster.status["nodeAddress"].split(".")[1]
    (folder / "block").write_text(block)
    there = subprocess.run(
        [sys.executable, str(TOOL), "status", "--name", cluster.name],
        env={**os.environ, "FINETUNE_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    status = json.loads(there.stdout)
    assert status["state"] == "down"
    assert status["nodeAddress"].split(".")[1] != block


def test_up_on_a_healthy_cluster_restarts_nothing(cluster):
    before = {file.name: file.read_text() for file in Path(cluster.status["logs"]).with_name("pids").iterdir()}
    cluster.up()
    after = {file.name: file.read_text() for file in Path(cluster.status["logs"]).with_name("pids").iterdir()}
    assert after == before


def test_up_repairs_a_cluster_that_lost_components(cluster):
    for component in ("apiserver", "dns", "s3"):
        cluster.tool("stop", component, "--force")
    assert json.loads(cluster.tool("status").stdout)["state"] == "degraded"
    cluster.up()
    assert cluster.status["state"] == "up"
    assert cluster.kubectl("get", "--raw", "/readyz") == "ok"


def test_up_after_a_power_cut_brings_objects_and_pods_back(cluster):
    cluster.apply(build_pod("returns", "exec busybox sleep 600", restartPolicy="Always"))
    wait_for_pod(cluster, "returns", "Running")
    os.kill(cluster.status["initPid"], signal.SIGKILL)
    assert wait_until(lambda: json.loads(cluster.tool("status").stdout)["state"] == "down", 20, 0.3)
    cluster.up()

    def restarted():
        count = cluster.kubectl("get", "pod", "returns", "-o", "jsonpath={.status.containerStatuses[0].restartCount}")
        return count == "1"

    assert wait_until(restarted, 60, 0.5), cluster.kubectl("describe", "pod", "returns")
    cluster.kubectl("exec", "returns", "--", "/bin/busybox", "true")
    cluster.kubectl("delete", "pod", "returns")


def test_a_component_that_cannot_start_is_named_with_its_last_words(cluster):
    cluster.tool("stop", "dns")
    folder = Path(cluster.status["logs"]).parent
    (folder / "Corefile").write_text(". {\n    nonsense\n}\n")
    finished = cluster.tool("start", "dns", check=False)
    assert finished.returncode == 1
    assert "dns ended; its last lines:" in finished.stderr
    assert "nonsense" in finished.stderr
    cluster.up()
    assert cluster.status["state"] == "up"


def test_a_restricted_pod_writes_its_volume_and_finds_services_by_name(cluster):
    script = (
        "echo page > /data/index.html && echo 'probe_total 7' > /data/metrics"
        " && busybox nslookup kubernetes.default.svc.cluster.local"
        " && exec busybox httpd -f -p 8000 -h /data"
    )
    annotations = {"prometheus.io/scrape": "true", "prometheus.io/port": "8000"}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8000}]},
    }
    pod = build_pod("web", script, claim="work")
    pod["metadata"]["annotations"] = annotations
    cluster.apply(build_claim("work", "1Gi"), service, pod)
    wait_for_pod(cluster, "web", "Running")
    address = cluster.kubectl("get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")

    def serves():
        try:
            return read_url(f"http://{address}/") == "page\n"
        except OSError:
            return False

    assert wait_until(serves, 20, 0.3)
    assert "10." in cluster.kubectl("logs", "web")
    inside = ["exec", "web", "--", "/bin/busybox", "wget", "-qO-", f"http://{address}/"]
    assert cluster.kubectl(*inside) == "page\n"

    def scraped():
        answer = json.loads(read_url(f"{cluster.status['prometheus']}/api/v1/query?query=probe_total"))
        return [found["value"][1] for found in answer["data"]["result"]] == ["7"]

    assert wait_until(scraped, 30, 0.5)


def test_pods_reach_the_s3_server_and_the_host(cluster):
    health = f"busybox wget -qO- {cluster.status['s3']['url']}/health"
    cluster.apply(build_pod("client", health))
    wait_for_pod(cluster, "client", "Succeeded")
    assert read_url(f"{cluster.status['s3']['url']}/health") == cluster.kubectl("logs", "client")


def test_the_s3_server_answers_over_tls_only_to_who_knows_the_clusters_authority(cluster):
    cluster.tool("start", "s3-tls")
    s3 = cluster.status["s3"]
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(f"{s3['tlsUrl']}/health", timeout=5)
    trusted = ssl.create_default_context(cafile=s3["authority"])
    with urllib.request.urlopen(f"{s3['tlsUrl']}/health", timeout=5, context=trusted) as answer:
        assert answer.status == 200


def test_a_packet_to_a_pod_or_service_that_does_not_exist_is_refused_and_never_circles(cluster):
    prefix = cluster.status["nodeAddress"].rsplit(".", 2)[0]
    for nobody in (f"{prefix}.100.200", f"{prefix}.180.200"):
        with pytest.raises(OSError, match=r"No route to host|unreachable"):
            socket.create_connection((nobody, 80), timeout=10)


def test_a_limited_volume_runs_full_and_grows_under_its_pod(cluster):
    fill = "busybox dd if=/dev/zero of=/data/fill bs=1M count=6 || echo FULL; exec busybox sleep 600"
    cluster.apply(build_claim("small", "4Mi", "limited"), build_pod("filler", fill, claim="small"))
    wait_for_pod(cluster, "filler", "Running")
    assert wait_until(lambda: "FULL" in cluster.kubectl("logs", "filler"), 20, 0.3)
    wider = json.dumps({"spec": {"resources": {"requests": {"storage": "8Mi"}}}})
    cluster.kubectl("patch", "pvc", "small", "-p", wider)

    def grown():
        return cluster.kubectl("get", "pvc", "small", "-o", "jsonpath={.status.capacity.storage}") == "8Mi"

    assert wait_until(grown, 20, 0.3)
    again = ["exec", "filler", "--", "/bin/busybox", "dd", "if=/dev/zero", "of=/data/fill", "bs=1M", "count=6"]
    cluster.kubectl(*again)


def test_only_a_deleted_claims_data_is_removed(cluster):
    cluster.apply(build_claim("kept", "1Mi"), build_pod("writer", "echo data > /data/file", claim="kept"))
    wait_for_pod(cluster, "writer", "Succeeded")
    volume = cluster.kubectl("get", "pvc", "kept", "-o", "jsonpath={.spec.volumeName}")
    folder = Path(cluster.status["logs"]).with_name("volumes") / volume
    assert (folder / "file").read_text() == "data\n"
    retain = json.dumps({"spec": {"persistentVolumeReclaimPolicy": "Retain"}})
    cluster.kubectl("patch", "pv", volume, "-p", retain)
    cluster.kubectl("delete", "pod/writer", "pvc/kept")
    cluster.kubectl("wait", f"pv/{volume}", "--for=jsonpath={.status.phase}=Released", "--timeout=30s")
    assert (folder / "file").exists()
    cluster.kubectl("patch", "pv", volume, "-p", retain.replace("Retain", "Delete"))
    assert wait_until(lambda: not folder.exists(), 30, 0.3)


def test_a_fake_node_runs_the_pods_that_select_it_and_none_other(cluster):
    cluster.tool("start", "kwok")
    size = {"cpu": "96", "memory": "800Gi", "nvidia.com/gpu": "4", "pods": "110"}
    labels = {"kubernetes.io/hostname": "gpu-0", "topology.kubernetes.io/zone": "zone-1"}
    node = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "gpu-0", "annotations": {"kwok.x-k8s.io/node": "fake"}, "labels": labels},
        "spec": {"taints": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]},
        "status": {"capacity": size, "allocatable": size},
    }
    pod = build_pod("wants-gpu", "unused", claim="zoned", tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists"}])
    pod["spec"]["containers"][0]["resources"] = {"limits": {"nvidia.com/gpu": 4}}
    plain = build_pod("wants-none", "true")
    cluster.apply(node, build_claim("zoned", "1Gi", "zonal"), pod, plain)
    wait_for_pod(cluster, "wants-gpu", "Running")
    wait_for_pod(cluster, "wants-none", "Succeeded")
    placed = cluster.kubectl("get", "pod", "wants-gpu", "wants-none", "-o", "jsonpath={.items[*].spec.nodeName}")
    assert placed.split() == ["gpu-0", cluster.status["node"]]
    affinity = cluster.kubectl("get", "pv", "-o", "jsonpath={.items[*].spec.nodeAffinity}")
    assert '"key":"topology.kubernetes.io/zone","operator":"In","values":["zone-1"]' in affinity
    cluster.kubectl("annotate", "pod", "wants-gpu", "finetune.dev/fake-result=Failed")
    wait_for_pod(cluster, "wants-gpu", "Failed")
    cluster.kubectl("delete", "node", "gpu-0")
