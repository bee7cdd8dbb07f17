"""FineTuneJobs on a real cluster: make one small enough for CPUs, apply it, and wait for what its status says."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

from tests.demo.kubectl import Cluster, ClusterError
from tests.support.waiting import eventually

SMALL = {
    "model": {"source": "s3://tests/models/tiny", "secretRef": {"name": "s3"}},
    "dataset": {"source": "s3://tests/datasets/small.json", "secretRef": {"name": "s3"}},
    "training": {"maxSteps": 4, "maxLength": 128, "perDeviceBatchSize": 2, "gradientAccumulationSteps": 1},
    "checkpoint": {"everySteps": 2},
    "resources": {"gpusPerNode": 0, "processesPerNode": 1},
    "inference": {"enabled": False},
}


def make_job(name: str, **spec: Any) -> dict[str, Any]:
    """Return a job of four steps on one CPU process, with `spec` merged over its fields; None removes a field."""
    merged = copy.deepcopy(SMALL)
    _merge(merged, spec)
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": merged}


def _merge(into: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


@dataclasses.dataclass(frozen=True)
class JobHandle:
    """One job on a cluster."""

    cluster: Cluster
    namespace: str
    name: str

    def read(self) -> dict[str, Any]:
        """Return the object as the API server has it."""
        return self.cluster.read("finetunejob", self.name, "-n", self.namespace)

    def status(self) -> dict[str, Any]:
        """Return its status, empty before the first write."""
        return self.read().get("status") or {}

    def live_status(self) -> dict[str, Any]:
        """Return its status; a job that has failed ends the test."""
        status = self.status()
        assert status.get("state") != "Failed", self.describe()
        return status

    def condition(self, kind: str) -> dict[str, Any]:
        """Return one condition, empty when it is not there."""
        return next((entry for entry in self.status().get("conditions", ()) if entry["type"] == kind), {})

    def patch(self, **spec: Any) -> None:
        """Merge changes into the spec, as a user would with kubectl."""
        body = json.dumps({"spec": spec})
        self.cluster.run("patch", "finetunejob", self.name, "-n", self.namespace, "--type=merge", "-p", body)

    def wait_for_state(self, *states: str, within: float = 240) -> dict[str, Any]:
        """Return the status once its state is one of these; a failure on the way ends the wait."""

        def look() -> dict[str, Any] | None:
            status = self.status() if "Failed" in states else self.live_status()
            return status if status.get("state") in states else None

        return eventually(look, within=within, otherwise=self.describe)

    def wait_for_condition(
        self, kind: str, value: str = "True", reason: str = "", within: float = 120
    ) -> dict[str, Any]:
        """Return the condition once it has this value and reason."""

        def look() -> dict[str, Any] | None:
            found = self.condition(kind)
            return found if found.get("status") == value and reason in ("", found.get("reason")) else None

        return eventually(look, within=within, otherwise=self.describe)

    def pods(self, component: str) -> list[dict[str, Any]]:
        """Return the pods of one phase."""
        selector = f"finetune.dev/job={self.name},finetune.dev/component={component}"
        items: list[dict[str, Any]] = self.cluster.read("pods", "-n", self.namespace, "-l", selector)["items"]
        return items

    def events(self) -> list[dict[str, Any]]:
        """Return the events about this job, oldest first."""
        selector = f"involvedObject.name={self.name},involvedObject.kind=FineTuneJob"
        items = self.cluster.read("events", "-n", self.namespace, "--field-selector", selector)["items"]
        return sorted(items, key=lambda event: event["metadata"]["creationTimestamp"])

    def describe(self) -> str:
        """Say all that a reader of a failed test wants to know: status, pods and their last lines."""
        chosen = ("-n", self.namespace, "-l", f"finetune.dev/job={self.name}")
        told = []
        for command in (("get", "pods", *chosen, "-o", "wide"), ("logs", *chosen, "--tail=25", "--prefix")):
            try:
                told.append(self.cluster.run(*command))
            except ClusterError as error:
                told.append(str(error))
        pods, logs = told
        return f"{self.namespace}/{self.name}: {json.dumps(self.status(), indent=1)}\n{pods}\n{logs}"


def apply_job(cluster: Cluster, namespace: str, job: dict[str, Any]) -> JobHandle:
    """Create or change the job with kubectl, and return its handle."""
    cluster.run("apply", "-n", namespace, "-f", "-", stdin=json.dumps(job))
    return JobHandle(cluster, namespace, job["metadata"]["name"])
