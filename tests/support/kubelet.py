"""Plays the kubelet for a cluster without nodes: what pods would do is written into their status by the test.

The Job controller, the garbage collector and everything else are the real ones.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from typing import Any

from tests.support.rest import Json, Rest, RestError
from tests.support.waiting import eventually

DETAILS: dict[str, dict[str, Any]] = {
    "inspect": {
        "model_bytes": 8_000_000,
        "model_parameters": 4_000_000,
        "model_type": "llama",
        "model_revision": "",
        "dataset_bytes": 1_000_000,
        "dataset_revisions": [""],
    },
    "prepare": {
        "rows_read": 1000,
        "rows_kept": 950,
        "rows_removed": 50,
        "rows_bad": 0,
        "rows_train": 931,
        "rows_holdout": 19,
        "tokens": 95_000,
        "removed_per_category": {"refusal": 50},
        "dataset_digest": "d1",
        "report": "reports/prepare.json",
        "model_digest": "m1",
        "model_revision": "r1",
    },
    "train": {
        "step": 100,
        "total_steps": 100,
        "loss": 1.25,
        "resumed_from_step": None,
        "checkpoints": [80, 90, 100],
        "latest_complete": 100,
        "best": None,
    },
    "promote": {
        "digest": "abc123",
        "path": "output/abc123",
        "checkpoint_step": 100,
        "parameters": 4_000_000,
        "bytes": 1,
        "report": "reports/run-abc123.html",
    },
    "evaluate": {
        "scores": {"holdout": {"loss": 2.0, "perplexity": 7.4, "unigram_entropy": 6.1}},
        "baseline": {"holdout": {"loss": 8.0, "perplexity": 2980.0, "unigram_entropy": 6.1}},
    },
    "publish": {"destinations": ["s3://bucket/models/abc123"]},
    "compose": {
        "digest": "f00d",
        "model": "output/abc123",
        "rank": 16,
        "largest_error": 0.0,
        "adapters": [{"name": "polite", "digest": "p1", "weight": 1.0}],
        "scores": {"holdout": {"loss": 2.1, "perplexity": 8.2}},
        "drift": {"base": 0.2, "polite": 0.0},
    },
    "smoke": {"time_to_first_token_seconds": 0.25, "tokens_per_second": 40.0, "answer_seconds": 0.6, "tokens": 16},
}
"""What each phase reports where a test says nothing else."""


def now_text() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclasses.dataclass(frozen=True)
class Kubelet:
    """The kubelet of one namespace."""

    rest: Rest
    namespace: str

    def _path(self, kind: str, name: str = "") -> str:
        return f"/api/v1/namespaces/{self.namespace}/{kind}" + (f"/{name}" if name else "")

    def pods(self, job: str, component: str = "") -> list[Json]:
        """Return the pods of a FineTuneJob that are there and not on their way out, oldest first."""
        selector = f"finetune.dev%2Fjob%3D{job}" + (f",finetune.dev%2Fcomponent%3D{component}" if component else "")
        pods = self.rest.items(f"{self._path('pods')}?labelSelector={selector}")
        return sorted(pods, key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))

    def wait_for_pods(
        self, job: str, component: str, count: int = 1, attempt: int = 0, within: float = 30
    ) -> list[Json]:
        """Return that many pods of a phase that have not ended yet."""

        def look() -> list[Json] | None:
            found = [
                pod
                for pod in self.pods(job, component)
                if pod["status"].get("phase") in (None, "Pending", "Running")
                and not pod["metadata"].get("deletionTimestamp")
                and (not attempt or pod["metadata"]["labels"].get("finetune.dev/attempt") == str(attempt))
            ]
            return found if len(found) >= count else None

        return eventually(
            look, within=within, every=0.1, otherwise=lambda: f"{count} {component} pods: {self.describe(job)}"
        )

    def describe(self, job: str) -> str:
        """Say what there is, for the reader of a failed test."""
        found = self.rest.find(f"/apis/finetune.dev/v1alpha1/namespaces/{self.namespace}/finetunejobs/{job}")
        pods = [(pod["metadata"]["name"], pod["status"].get("phase")) for pod in self.pods(job)]
        return json.dumps({"status": (found or {}).get("status"), "pods": pods}, indent=1)

    def run(self, pod: Json, node: str = "node-a") -> None:
        """The pod runs on a node."""
        self.place(pod, node)
        self._write(
            pod, {"phase": "Running", "startTime": now_text()}, {"running": {"startedAt": now_text()}}, ready=True
        )

    def place(self, pod: Json, node: str) -> None:
        """Bind the pod to a node, as the scheduler does."""
        if pod["spec"].get("nodeName"):
            return
        name = pod["metadata"]["name"]
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": name},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        }
        self.rest.request("POST", f"{self._path('pods', name)}/binding", binding)
        pod["spec"]["nodeName"] = node

    def succeed(self, pod: Json, component: str, **details: Any) -> None:
        """The pod ends well, with its phase's report."""
        report = {"phase": component, "reason": "Completed", "message": "done", "exit_code": 0}
        self.end(pod, 0, json.dumps({**report, "details": {**DETAILS.get(component, {}), **details}}))

    def fail(self, pod: Json, code: int, reason: str, message: str, **report: Any) -> None:
        """The pod fails with a report."""
        component = pod["metadata"]["labels"]["finetune.dev/component"]
        base = {"phase": component, "reason": reason, "message": message, "exit_code": code, "rank": 0}
        self.end(pod, code, json.dumps({**base, **report}))

    def end(self, pod: Json, code: int, message: str, reason: str = "", **status: Any) -> None:
        """The pod's container ends with a code and a termination message."""
        self.place(pod, "node-a")
        ended = {
            "exitCode": code,
            "reason": reason or ("Completed" if code == 0 else "Error"),
            "message": message,
            "startedAt": now_text(),
            "finishedAt": now_text(),
        }
        phase = {"phase": "Succeeded" if code == 0 else "Failed", "startTime": now_text(), **status}
        self._write(pod, phase, {"terminated": ended}, ready=False)

    def wait_reason(self, pod: Json, reason: str, message: str) -> None:
        """The pod's container waits for a reason."""
        self.place(pod, "node-a")
        self._write(pod, {"phase": "Pending"}, {"waiting": {"reason": reason, "message": message}}, ready=False)

    def mark(self, pod: Json, kind: str, status: str, reason: str, message: str) -> None:
        """Give the pod a condition."""
        condition = {
            "type": kind,
            "status": status,
            "reason": reason,
            "message": message,
            "lastTransitionTime": now_text(),
        }
        self._patch(pod, {"conditions": [condition]})

    def _write(self, pod: Json, status: Json, state: Json, *, ready: bool) -> None:
        container = pod["spec"]["containers"][0]
        entry = {
            "name": container["name"],
            "image": container["image"],
            "imageID": "",
            "ready": ready,
            "restartCount": 0,
            "state": state,
        }
        conditions = [{"type": "Ready", "status": str(ready), "lastTransitionTime": now_text()}]
        self._patch(pod, {**status, "conditions": conditions, "containerStatuses": [entry]})

    def _patch(self, pod: Json, status: Json) -> None:
        path = f"{self._path('pods', pod['metadata']['name'])}/status"
        self.rest.request("PATCH", path, {"status": status}, "application/strategic-merge-patch+json")

    def delete(self, pod: Json) -> None:
        """The kubelet lets go of a pod that was being deleted."""
        path = self._path("pods", pod["metadata"]["name"])
        try:
            self.rest.request(
                "DELETE", path, {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}}
            )
        except RestError as error:
            if error.code not in (404, 409):
                raise

    def let_go(self, job: str) -> None:
        """Let go of every pod that is being deleted."""
        for pod in self.pods(job):
            if pod["metadata"].get("deletionTimestamp"):
                self.delete(pod)

    def finish_phase(self, job: str, component: str, **details: Any) -> None:
        """Wait for the pod of a phase that runs once, and let it end well."""
        (pod,) = self.wait_for_pods(job, component)[:1]
        self.succeed(pod, component, **details)

    def finish_training(self, job: str, attempt: int, **details: Any) -> None:
        """Let every pod of an attempt end well."""
        for pod in self.wait_for_pods(job, "train", attempt=attempt):
            self.succeed(pod, "train", **details)

    def answer(self, endpoint: str, job: str = "") -> None:
        """A job (by default the one named as the endpoint) brings its version to the endpoint: it answers."""
        holder = job or endpoint
        path = f"/apis/apps/v1/namespaces/{self.namespace}/deployments"
        chosen = f"{path}?labelSelector=finetune.dev%2Fendpoint%3D{endpoint},finetune.dev%2Fjob%3D{holder}"

        def look() -> Json | None:
            found = [each for each in self.rest.items(chosen) if each["spec"]["replicas"]]
            return max(found, key=lambda each: each["metadata"]["creationTimestamp"], default=None)

        found = eventually(look, within=30, every=0.1, otherwise=f"no version of {endpoint}")
        name, label = found["metadata"]["name"], found["metadata"]["labels"]["finetune.dev/version"]
        self.start_version(label, f"{path}/{name}", found["spec"]["replicas"])
        (pod,) = self.wait_for_pods(holder, "smoke")[:1]
        self.succeed(pod, "smoke")

    def start_version(self, label: str, path: str, wanted: int) -> None:
        """All pods of a version of an endpoint run and are ready."""

        def is_done() -> bool:
            # The ReplicaSet's pods are real objects: ready ones make the Deployment controller count them.
            for pod in self.rest.items(f"{self._path('pods')}?labelSelector=finetune.dev%2Fversion%3D{label}"):
                if pod["metadata"].get("deletionTimestamp"):
                    self.delete(pod)
                else:
                    # Said again and again, as a kubelet does: the node controller takes pods for unready whose node
                    # never says that it lives, and these never do.
                    self.run(pod)
            deployment = self.rest.get(path)
            status, counts = deployment["status"], ("replicas", "updatedReplicas", "availableReplicas")
            # Counts of the generation before this one would end the play too early.
            is_current = status.get("observedGeneration", 0) >= deployment["metadata"]["generation"]
            return is_current and all(status.get(name, 0) == wanted for name in counts)

        def describe() -> str:
            pods = self.rest.items(f"{self._path('pods')}?labelSelector=finetune.dev%2Fversion%3D{label}")
            deployment, told = self.rest.get(path), [(pod["metadata"], pod["status"]) for pod in pods]
            return f"{path} never became available: {json.dumps([deployment['metadata'], deployment['status'], told])}"

        # A controller manager whose API server was just restarted by another test takes its time to come back.
        eventually(is_done, within=150, every=0.2, otherwise=describe)
