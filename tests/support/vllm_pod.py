"""A pod of an endpoint on vLLM, without a cluster: its container's command, probes and files, run on this machine.

vLLM is the inference image's version, built for CPUs (`.venv-vllm`).
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Mapping
from typing import Any

from finetune_contract import smoke_prompt
from finetune_contract.reports import ExitReport, Phase
from finetune_operator.manifests.common import CONFIG_MOUNT
from finetune_operator.manifests.inference import PORT, Served, build_served
from finetune_operator.plan import Plan
from finetune_operator.versions import make_request
from tests.support.operator_parts import make_record, make_test_plan
from tests.support.training_runs import Run

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
VLLM = REPOSITORY / ".venv-vllm" / "bin"
KEY = "secret"
"""What requests must carry, where the container asks for a key."""
STARTING_SECONDS = 300
SERVED = {
    "runtime": "vllm",
    "apiKeySecretRef": {"name": "keys"},
    "autoscaling": {"minReplicas": 1, "maxReplicas": 2},
}
EVALUATED = (Phase.INSPECT, Phase.PREPARE, Phase.TRAIN, Phase.PROMOTE, Phase.EVALUATE)


def build_objects(run: Run, composed: dict[str, Any] | None = None, bucket: str = "") -> tuple[Plan, Served]:
    """Return plan and objects of the version that serves the promoted model: its copy in an S3 bucket where one is
    named, or the composition on it.
    """
    inference, promotion = dict(SERVED), {}
    if composed:
        inference["adapters"] = [{"name": "polite", "source": "pvc:///workspace/polite"}]
    if bucket:
        inference["loadFrom"] = "S3"
        promotion["destinations"] = [{"destination": bucket, "secretRef": {"name": "bucket"}}]
    plan = make_test_plan(inference=inference, promotion=promotion)
    record = make_record(*EVALUATED, claim_uid="claim").with_phase(Phase.PROMOTE, run.report("promote")["details"])
    if composed:
        record = record.with_composition(make_request(plan, record), composed)
    return plan, build_served(plan, record)


class VllmPod:
    """One container of a Deployment: paths and the port are this machine's, all else is as the operator wrote it."""

    def __init__(
        self,
        objects: tuple[dict[str, Any], ...],
        workspace: pathlib.Path,
        folder: pathlib.Path,
        secret: Mapping[str, str] | None = None,
    ) -> None:
        """Start it. `secret` is what every Secret holds that it takes variables from."""
        config_map, deployment = objects[:2]
        (self.container,) = deployment["spec"]["template"]["spec"]["containers"]
        self._places = {"/workspace": str(workspace), CONFIG_MOUNT: str(folder / "etc"), str(PORT): str(_find_port())}
        (folder / "etc").mkdir(parents=True)
        for name, text in config_map["data"].items():
            (folder / "etc" / name).write_text(text)
        self._termination_log, self._log = folder / "termination-log", folder / "log"
        keys = {each["name"]: KEY for each in self.container["env"] if "valueFrom" in each}
        for source in self.container["envFrom"]:
            keys |= {source["prefix"] + name: value for name, value in (secret or {}).items()}
        self._environment = {
            "PATH": f"{VLLM}:{os.environ['PATH']}",
            "HOME": str(folder),
            "VLLM_NO_USAGE_STATS": "1",
            # Small, and for CPUs.
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "FINETUNE_TERMINATION_LOG": str(self._termination_log),
            **keys,
        }
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                # Its compiler takes longer than all else, and CPUs are not what it is for.
                self._place([*self.container["command"], *self.container["args"], "--enforce-eager"]),
                env=self._environment,
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _place(self, words: list[str]) -> list[str]:
        """Return a command of the container as this machine runs it."""
        for there, here in self._places.items():
            words = [word.replace(there, here) for word in words]
        return words

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._places[str(PORT)]}"

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def report(self) -> ExitReport | None:
        """What the container left as its termination message."""
        if not self._termination_log.exists():
            return None
        return ExitReport.from_termination_message(self._termination_log.read_text())

    def run(self, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a probe or a hook in the container."""
        return subprocess.run(
            self._place(command),
            env=self._environment | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def is_started(self) -> bool:
        """Whether the start-up probe passes; raises AssertionError with the log's end when the server has ended."""
        assert self.process.poll() is None, self.log[-3000:]
        return self.run(self.container["startupProbe"]["exec"]["command"]).returncode == 0

    def request(self, path: str, body: dict[str, Any] | None = None, *, key: str = KEY) -> urllib.request.Request:
        """Return a request with the key."""
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        return urllib.request.Request(self.url + path, json.dumps(body).encode() if body else None, headers)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the answer to a request, from JSON."""
        with urllib.request.urlopen(self.request(path, body), timeout=smoke_prompt.ASK_SECONDS) as response:
            return json.load(response)

    def read_metrics(self) -> str:
        """Return the metrics, which ask for no key."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            return str(response.read().decode())

    def end(self) -> None:
        """Kill what is left of it."""
        # A container's processes end with the first one.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
