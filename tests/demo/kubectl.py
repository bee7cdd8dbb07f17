"""kubectl and Helm against one named context; the demo's only way to a cluster.

The context is always given: nothing here ever falls back to a current context.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class ClusterError(RuntimeError):
    """A command against the cluster failed; the message is the command's own."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One context of one kubeconfig, and the two programs that talk to it."""

    kubeconfig: str
    context: str
    kubectl: str = "kubectl"
    helm: str = "helm"

    def run(self, *arguments: str, stdin: str | None = None, timeout: float = 120) -> str:
        """Run kubectl and return its output. Raises ClusterError."""
        command = (self.kubectl, f"--context={self.context}", *arguments)
        return self._run(command, stdin, timeout)

    def run_helm(self, *arguments: str, timeout: float = 300) -> str:
        """Run Helm and return its output. Raises ClusterError."""
        return self._run((self.helm, f"--kube-context={self.context}", *arguments), None, timeout)

    def read(self, *arguments: str) -> dict[str, Any]:
        """Run `kubectl get ... -o json` and return the object. Raises ClusterError."""
        result: dict[str, Any] = json.loads(self.run("get", *arguments, "-o", "json"))
        return result

    def apply(self, *objects: dict[str, Any]) -> None:
        """Apply whole objects on the server's side."""
        document = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        self.run("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=document)

    def _run(self, command: tuple[str, ...], stdin: str | None, timeout: float) -> str:
        environment = {**os.environ, "KUBECONFIG": self.kubeconfig}
        try:
            result = subprocess.run(
                command, input=stdin, env=environment, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"{' '.join(command[:4])} ... gave no answer within {timeout:.0f} s") from error
        if result.returncode:
            raise ClusterError(f"{' '.join(command)}: {result.stderr.strip() or result.stdout.strip()}")
        return result.stdout

    @contextmanager
    def forward(self, namespace: str, target: str, port: int) -> Iterator[str]:
        """Forward a free local port to a Service; yields the base URL."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            local = probe.getsockname()[1]
        command = (
            self.kubectl,
            f"--context={self.context}",
            "-n",
            namespace,
            "port-forward",
            target,
            f"{local}:{port}",
        )
        environment = {**os.environ, "KUBECONFIG": self.kubeconfig}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            _wait_for_port(local, process)
            yield f"http://127.0.0.1:{local}"
        finally:
            process.terminate()
            process.wait(timeout=10)


def _wait_for_port(port: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ClusterError(f"kubectl port-forward ended: {process.stderr.read() if process.stderr else ''}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise ClusterError("kubectl port-forward opened no port within 20 s")
