"""What the tests do to a running job on the embedded cluster: kill, drain, cut off, restart. Waiting is the test's."""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import re
import subprocess
from typing import Any

from tests.cluster.world import World
from tests.demo.kubectl import ClusterError
from tests.support.jobs import JobHandle
from tests.support.waiting import eventually

PATIENCE_SECONDS = 240

_KILL = r"""
import os, pathlib, signal, sys, time
root, manifest, pid, kind = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]

def saving():
    for folder in root.glob("checkpoint-*"):
        try:
            names = os.listdir(folder)
        except FileNotFoundError:  # pruned a moment ago
            continue
        if names and manifest not in names and "finetune-deleting" not in names:
            return folder.name

def parent(number):
    try:
        return int(pathlib.Path("/proc", number, "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0

deadline, found = time.monotonic() + 60, ""
while manifest and not (found := saving()):
    if time.monotonic() > deadline:
        sys.exit("no save was seen within 60 s")
children = [int(number) for number in os.listdir("/proc") if number.isdigit() and parent(number) == pid]
if kind != "nothing":
    os.kill(max(children) if kind == "rank" else pid, signal.SIGKILL)
print(found, time.time())
"""
"""Runs inside the cluster's namespaces: waits for a save to be under way, if asked to, and kills at that moment."""
Line = tuple[float, str]
"""When a container wrote a line, Unix time, and the line."""


@dataclasses.dataclass(frozen=True)
class Faults:
    """The faults, done to one job."""

    world: World
    job: JobHandle

    @property
    def node(self) -> str:
        """Name of the cluster's one node."""
        return f"{self.world.name}-node"

    def running_pod(self, component: str = "train", within: float = PATIENCE_SECONDS) -> dict[str, Any]:
        """Return the running pod of a phase, waiting for it."""

        def look() -> dict[str, Any] | None:
            found = [pod for pod in self.job.pods(component) if _is_running(pod)]
            return found[0] if found else None

        return eventually(look, within=within, otherwise=self.job.describe, every=0.1)

    def kill_process(self, pod: dict[str, Any], kind: str = "container", in_save: bool = False) -> tuple[str, float]:
        """Kill a container's first process, one `rank` below it, or `nothing`.

        Returns the save it was in, and when, in Unix time.
        """
        container = pod["status"]["containerStatuses"][0]["containerID"].rpartition("/")[2]
        tasks = subprocess.run(
            (*self.world.read_status()["containerd"]["ctr"], "tasks", "ls"), capture_output=True, check=True
        )
        found = [line.split() for line in tasks.stdout.decode().splitlines() if line.startswith(container)]
        assert found, f"the container of pod {pod['metadata']['name']} has ended"
        manifest = "finetune-manifest.json" if in_save else ""
        arguments = (str(self.volume / "checkpoints"), manifest, found[0][1], kind)
        answer = self.world.tool("exec", "--", "python3", "-c", _KILL, *arguments).split()
        return " ".join(answer[:-1]), float(answer[-1])

    @property
    def volume(self) -> pathlib.Path:
        """The workspace as the node sees it."""
        claim = self.world.cluster.read("pvc", f"{self.job.name}-workspace", "-n", self.job.namespace)
        volume = self.world.cluster.read("pv", claim["spec"]["volumeName"])
        return pathlib.Path(volume["spec"]["local"]["path"])

    def newest_complete_step(self) -> int:
        """Return the step of the newest checkpoint that has its manifest, as the node sees it; 0 without one."""
        pattern = f"{self.volume}/checkpoints/checkpoint-*/finetune-manifest.json"
        found = self.world.tool(
            "exec", "--", "python3", "-c", "import glob, sys; print(glob.glob(sys.argv[1]))", pattern
        )
        return max((int(step) for step in re.findall(r"checkpoint-(\d+)/", found)), default=0)

    def delete_pod(self, pod: dict[str, Any]) -> None:
        """Delete a pod by force, as a node that vanishes does: no signal that it could answer to."""
        name = pod["metadata"]["name"]
        self.world.cluster.run("delete", "pod", name, "-n", self.job.namespace, "--grace-period=0", "--force")

    def drain(self, *options: str) -> str:
        """Drain the node of this job's pods; return what kubectl says, also when it gives up."""
        selector = f"--pod-selector=finetune.dev/job={self.job.name}"
        common = ("--delete-emptydir-data", "--ignore-daemonsets", "--force")
        try:
            return self.world.cluster.run("drain", self.node, selector, *common, *options, timeout=PATIENCE_SECONDS)
        except ClusterError as error:
            return str(error)

    def uncordon(self) -> None:
        """Let the node take pods again."""
        self.world.cluster.run("uncordon", self.node)

    def restart(self, component: str) -> None:
        """Stop a daemon of the cluster and start it again."""
        self.world.tool("stop", component)
        self.world.tool("start", component)

    def read_log(self, pod: str) -> list[Line]:
        """Return what a pod has logged."""
        text = self.world.cluster.run("logs", pod, "-n", self.job.namespace, "--timestamps", "--ignore-errors")
        stamped = (line.partition(" ") for line in text.splitlines())
        return [(_to_unix(stamp), rest) for stamp, _, rest in stamped if stamp.endswith("Z")]

    def lose_node(self, pod: dict[str, Any], kill_in_save: bool | None = None) -> None:
        """Stop kubelet until this pod, or the operator its attempt, has been given up; then start it again.

        As when the network is cut, the pod itself goes on; with `kill_in_save` it ends, inside a save or anywhere, as
        when the power is.
        """
        number = int(pod["metadata"]["labels"].get("finetune.dev/attempt", 0))

        def is_given_up() -> bool:
            self._keep_another_node()
            if not number:
                return self._is_deleted(pod)
            attempts = self.job.live_status()["attempts"]
            return any(each["number"] == number and each.get("endTime") for each in attempts)

        self.world.cluster.apply(ANOTHER_NODE)
        self._keep_another_node()
        self.world.tool("stop", "kubelet")
        try:
            if kill_in_save is not None:
                self.kill_process(pod, in_save=kill_in_save)
            eventually(is_given_up, within=PATIENCE_SECONDS, otherwise=self.job.describe, every=1)
        finally:
            self.world.tool("start", "kubelet")
            self.world.cluster.run("delete", "node", ANOTHER_NODE["metadata"]["name"])

    def _is_deleted(self, pod: dict[str, Any]) -> bool:
        pods = self.world.cluster.read("pods", "-n", self.job.namespace)["items"]
        kept = {each["metadata"]["uid"] for each in pods if not each["metadata"].get("deletionTimestamp")}
        return pod["metadata"]["uid"] not in kept

    def _keep_another_node(self) -> None:
        """Say that the other node is alive, as its kubelet would."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": now}
        patch = json.dumps({"status": {"conditions": [ready]}})
        name = ANOTHER_NODE["metadata"]["name"]
        self.world.cluster.run("patch", "node", name, "--subresource=status", "--type=merge", "-p", patch)

    def kill_operator(self, namespace: str) -> None:
        """Delete the operator's pod without grace, and wait until another one is ready."""
        cluster, selector = self.world.cluster, "app.kubernetes.io/name=finetune-operator"
        before = cluster.read("pods", "-n", namespace, "-l", selector)["items"][0]["metadata"]["name"]
        cluster.run("delete", "pod", before, "-n", namespace, "--grace-period=0", "--force")
        cluster.run("rollout", "status", "deploy/finetune-operator", "-n", namespace, "--timeout=120s", timeout=130)


def _to_unix(stamp: str) -> float:
    """Return a time of the container runtime, which has nine digits after the point, as Unix time."""
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    return datetime.datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")


def _is_running(pod: dict[str, Any]) -> bool:
    if pod["metadata"].get("deletionTimestamp") or pod["status"].get("phase") != "Running":
        return False
    states = pod["status"].get("containerStatuses") or [{}]
    return "running" in states[0].get("state", {})


ANOTHER_NODE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "another-node"},
    "spec": {"taints": [{"key": "finetune.dev/no-kubelet", "effect": "NoSchedule"}]},
}
"""A node without kubelet, on which nothing runs: while all nodes are silent, Kubernetes blames the network and gives up
no pods."""
LOSES_NODES_QUICKLY = [
    {"key": f"node.kubernetes.io/{state}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 3}
    for state in ("not-ready", "unreachable")
]
"""Tolerations with which a pod is given up seconds after its node was."""
