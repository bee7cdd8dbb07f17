"""A FineTuneJob on an API server without nodes: apply it, change it, and wait for what its status says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from tests.support.jobs import make_job
from tests.support.kubelet import Kubelet
from tests.support.rest import Json
from tests.support.waiting import eventually


@dataclasses.dataclass(frozen=True)
class PlayedJob:
    """One job, whose pods the test plays."""

    kubelet: Kubelet
    name: str

    @property
    def namespace(self) -> str:
        return self.kubelet.namespace

    @property
    def path(self) -> str:
        return f"/apis/finetune.dev/v1alpha1/namespaces/{self.namespace}/finetunejobs/{self.name}"

    def apply(self, **spec: Any) -> PlayedJob:
        """Make the job."""
        body = make_job(self.name, **spec)
        self.kubelet.rest.request("POST", self.path.rpartition("/")[0], body)
        return self

    def patch(self, **spec: Any) -> None:
        """Change its spec."""
        self.kubelet.rest.merge(self.path, {"spec": spec})

    def delete(self) -> None:
        """Delete it, as kubectl does."""
        self.kubelet.rest.request("DELETE", self.path, {"propagationPolicy": "Background"})

    def read(self) -> Json | None:
        """Return the object; None when it is gone."""
        return self.kubelet.rest.find(self.path)

    def status(self) -> Json:
        """Return its status, empty before the first write."""
        return (self.read() or {}).get("status") or {}

    def condition(self, kind: str) -> Json:
        """Return one condition, empty when it is not there."""
        return next((each for each in self.status().get("conditions", ()) if each["type"] == kind), {})

    def wait(self, look: Callable[[Json], Any], within: float = 30) -> Json:
        """Return the status for which `look` is true."""

        def found() -> Json | None:
            status = self.status()
            return status if status and look(status) else None

        return eventually(found, within=within, every=0.1, otherwise=self.describe)

    def wait_for_state(self, state: str, within: float = 30) -> Json:
        """Return the status once its state is this one."""
        return self.wait(lambda status: status.get("state") == state, within)

    def wait_for_condition(self, kind: str, value: str, reason: str = "", within: float = 30) -> Json:
        """Return the condition once it has this value and reason."""

        def look() -> Json | None:
            found = self.condition(kind)
            return found if found.get("status") == value and reason in ("", found.get("reason")) else None

        return eventually(look, within=within, every=0.1, otherwise=self.describe)

    def child(self, api: str, kind: str, name: str) -> Json | None:
        """Return a child; None when there is none."""
        return self.kubelet.rest.find(f"{api}/namespaces/{self.namespace}/{kind}/{name}")

    def job(self, suffix: str) -> Json | None:
        """Return one of its batch Jobs."""
        return self.child("/apis/batch/v1", "jobs", f"{self.name}-{suffix}")

    def jobs(self) -> list[str]:
        """Return the names of its batch Jobs, without the job's own."""
        selector = f"labelSelector=finetune.dev%2Fjob%3D{self.name}"
        found = self.kubelet.rest.items(f"/apis/batch/v1/namespaces/{self.namespace}/jobs?{selector}")
        return sorted(each["metadata"]["name"].removeprefix(f"{self.name}-") for each in found)

    def versions(self, endpoint: str = "") -> list[Json]:
        """Return the Deployments of an endpoint, by default its own, oldest first."""
        selector = f"labelSelector=finetune.dev%2Fendpoint%3D{endpoint or self.name}"
        found = self.kubelet.rest.items(f"/apis/apps/v1/namespaces/{self.namespace}/deployments?{selector}")
        return sorted(found, key=lambda each: each["metadata"]["creationTimestamp"])

    def record(self) -> Json:
        """Return what the operator remembers."""
        found = self.child("/api/v1", "configmaps", f"{self.name}-record")
        assert found is not None, "no record"
        data: Json = json.loads(found["data"]["record.json"])
        return data

    def events(self) -> list[Json]:
        """Return the events about it."""
        selector = f"fieldSelector=involvedObject.name%3D{self.name}"
        return self.kubelet.rest.items(f"/api/v1/namespaces/{self.namespace}/events?{selector}")

    def wait_for_event(self, reason: str) -> Json:
        """Return the event with this reason once it is there."""
        return eventually(
            lambda: next((each for each in self.events() if each["reason"] == reason), None),
            within=15,
            every=0.2,
            otherwise=lambda: f"no event {reason}; there are {[each['reason'] for each in self.events()]}",
        )

    def prepare(self) -> PlayedJob:
        """Play the phases before training."""
        for phase in ("inspect", "prepare"):
            self.kubelet.finish_phase(self.name, phase)
        return self

    def prepare_after_inspect(self) -> PlayedJob:
        """Play the one phase that is left before training."""
        self.kubelet.finish_phase(self.name, "prepare")
        return self

    def train(self, attempt: int = 1, count: int = 1) -> list[Json]:
        """Return the pods of an attempt, running."""
        pods = self.kubelet.wait_for_pods(self.name, "train", count, attempt)
        for pod in pods:
            self.kubelet.run(pod)
        return pods

    def complete(self, attempt: int = 1, *, served: bool = False, **details: Any) -> Json:
        """Play everything from training to the end; return the last status."""
        self.kubelet.finish_training(self.name, attempt, **details)
        for phase in ("promote", "evaluate"):
            self.kubelet.finish_phase(self.name, phase)
        if served:
            self.kubelet.answer(self.name)
        return self.wait_for_state("Succeeded")

    def describe(self) -> str:
        """Say what there is, for the reader of a failed test."""
        return self.kubelet.describe(self.name)
