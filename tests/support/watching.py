"""Notes when things were seen to change, as a watch of the API server tells."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

from tests.demo.kubectl import Cluster

Marks = Callable[[dict[str, Any]], list[str]]
"""Names the marks that an object carries; the first time of each is noted."""


class Watch:
    """A watch of one kind in one namespace, until it is closed."""

    def __init__(self, cluster: Cluster, namespace: str, kind: str, marks: Marks) -> None:
        command = (cluster.kubectl, f"--kubeconfig={cluster.kubeconfig}", "get", kind, "-n", namespace)
        self._process = subprocess.Popen(
            (*command, "--watch", "--output-watch-events", "-o", "json"), stdout=subprocess.PIPE, text=True
        )
        self._marks = marks
        self.seen: dict[str, float] = {}
        """Unix time at which each mark was seen first."""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            now = time.time()
            for mark in self._marks(json.loads(line)["object"]):
                self.seen.setdefault(mark, now)

    def close(self) -> None:
        """End the watch."""
        self._process.terminate()
        self._process.wait(timeout=10)
        self._thread.join(timeout=10)


def mark_pod(pod: dict[str, Any]) -> list[str]:
    """Return `made:`, `placed:`, `ready:` and `done:` with the name of a pod, as far as it has come."""
    name, status = pod["metadata"]["name"], pod["status"]
    is_ready = any(each["type"] == "Ready" and each["status"] == "True" for each in status.get("conditions") or ())
    marks = {
        "made": True,
        "placed": bool(pod["spec"].get("nodeName")),
        "ready": is_ready,
        "done": status.get("phase") == "Succeeded",
    }
    return [f"{mark}:{name}" for mark, holds in marks.items() if holds]


def mark_service(service: dict[str, Any]) -> list[str]:
    """Return the version that a Service selects, behind its name."""
    version = (service["spec"].get("selector") or {}).get("finetune.dev/version", "")
    return [f"{service['metadata']['name']}:{version}"]
