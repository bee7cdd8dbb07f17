"""A pod that asks an endpoint at a steady rate, and what it saw."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from tests.demo.kubectl import Cluster
from tests.support.waiting import eventually

PROGRAM = pathlib.Path(__file__).with_name("asker.py")


@dataclasses.dataclass(frozen=True)
class Load:
    """One asking pod."""

    cluster: Cluster
    namespace: str
    name: str

    def start(self, image: str, endpoint: str, rate: float, requests: int) -> Load:
        """Make the pod, and wait until it has asked for the first time."""
        metadata = {"name": self.name, "namespace": self.namespace}
        program = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}
        command = ["python3", "/program/asker.py", f"http://{endpoint}", endpoint, str(rate), str(requests)]
        container = {
            "name": "asker",
            "image": image,
            "command": command,
            "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}],
            "volumeMounts": [{"name": "program", "mountPath": "/program"}],
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }
        security = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
        spec = {
            "restartPolicy": "Never",
            "securityContext": security,
            "containers": [container],
            "volumes": [{"name": "program", "configMap": {"name": self.name}}],
        }
        self.cluster.apply(
            {**program, "data": {"asker.py": PROGRAM.read_text()}},
            {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec},
        )
        eventually(self.read, within=90, otherwise=lambda: self.cluster.run("describe", "pod", "-n", self.namespace))
        return self

    def read(self) -> list[dict[str, Any]]:
        """Return what was noted so far, in the order in which the requests began."""
        pod = self.cluster.read("pod", self.name, "-n", self.namespace)
        if pod["status"].get("phase") in (None, "Pending"):
            return []
        lines = self.cluster.run("logs", self.name, "-n", self.namespace).splitlines()
        return sorted((json.loads(line) for line in lines if line.startswith("{")), key=lambda line: line["n"])

    def wait_for_digest(self, digest: str, within: float = 60) -> None:
        """Wait until the newest answers all come from one model."""

        def look() -> bool:
            newest = [line["digest"] for line in self.read()[-10:]]
            return len(newest) == 10 and set(newest) == {digest}

        eventually(look, within=within, otherwise=lambda: json.dumps(self.read()[-20:]))

    def is_done(self) -> bool:
        """Have all requests been asked?"""
        return bool(self.cluster.read("pod", self.name, "-n", self.namespace)["status"].get("phase") == "Succeeded")

    def stop(self) -> list[dict[str, Any]]:
        """Return everything noted, and remove the pod."""
        lines = self.read()
        self.cluster.run("delete", "pod", self.name, "-n", self.namespace, "--grace-period=0", "--force")
        return lines


def list_failed(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the requests that brought no 200, not even on their retry."""
    return [line for line in lines if line.get("failed")]
