"""The real operator as a process of its own, as `python -m finetune_operator` starts it."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any

import yaml

from tests.support.waiting import eventually


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class OperatorProcess:
    """One copy of the operator; `kill` is kill -9."""

    def __init__(self, folder: pathlib.Path, kubeconfig: str, **settings: Any) -> None:
        self.folder = folder
        self.kubeconfig = kubeconfig
        self.ports = {name: free_port() for name in ("progress", "metrics", "health")}
        self.settings = {
            "images": {"trainer": "example.org/trainer:1", "inference": "example.org/inference:1"},
            "progress": {
                "url": f"https://127.0.0.1:{self.ports['progress']}",
                "port": self.ports["progress"],
                "tlsSecretName": "progress-tls",
                "namespace": "default",
            },
            "metrics": {"port": self.ports["metrics"]},
            "health": {"port": self.ports["health"]},
            "resyncSeconds": 5,
            "unschedulableSeconds": 3,
            **settings,
        }
        self.log_path = folder / "operator.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> OperatorProcess:
        """Start it, without waiting for anything."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "settings.yaml"
        path.write_text(yaml.safe_dump(self.settings))
        environment = {
            **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
            "FINETUNE_OPERATOR_SETTINGS": str(path),
            "KUBECONFIG": self.kubeconfig,
        }
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                (sys.executable, "-m", "finetune_operator"), env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        return self

    def wait_until_healthy(self) -> OperatorProcess:
        """Wait until it says of itself that it is well."""
        eventually(lambda: self.read("health", "/healthz") == "ok\n", within=30, otherwise=self.log)
        return self

    def read(self, port: str, path: str) -> str:
        """Return what one of its HTTP servers answers; empty when it does not."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[port]}{path}", timeout=5) as response:
                text: str = response.read().decode()
                return text
        except (urllib.error.URLError, OSError):
            return ""

    def is_running(self) -> bool:
        """Has it not ended?"""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """Kill it as a lost node or the kernel would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to stop, as the kubelet does."""
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait(timeout=40)

    def log(self) -> str:
        """Return what it has logged."""
        return self.log_path.read_text() if self.log_path.exists() else ""
