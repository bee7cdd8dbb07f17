"""What users notice of an endpoint that changes under them: requests at a steady rate through all that happens to it.

`python -m tests.bench.rollout`. Two replicas answer ten requests a second while a later job takes the endpoint over,
one pod is killed, a version is asked for that cannot start, and the endpoint goes back to its first version. A model
that never passes its gate stands by. A request fails when neither it nor one retry, each within five seconds, brings a
200; the answers carry the digest of the model that gave them.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import os
import statistics
import sys
import time
from typing import Any

from tests.bench.results import FOLDER, Result, write_results
from tests.cluster.world import World, borrow_world
from tests.demo.demo import install_chart
from tests.support.jobs import JobHandle, apply_job, make_job
from tests.support.load import Load, list_failed
from tests.support.waiting import eventually

PATIENCE_SECONDS = 300
RATE = 10
ENDPOINT = "support"
UNREACHABLE = 1000
NEVER_PROMOTED = "b0" * 32
CHANGE, KILL, BROKEN, BACK = 0.1, 0.35, 0.5, 0.75
"""What happens after which share of the requests."""
Line = dict[str, Any]


@dataclasses.dataclass
class Rollout:
    """One endpoint, asked all the time, and what is done to it."""

    world: World
    namespace: str
    requests: int
    happened: dict[str, float] = dataclasses.field(default_factory=dict)
    """When each thing was done, Unix time."""

    def run(self) -> tuple[list[Line], tuple[str, str]]:
        """Return every request, and the digests of the two models that passed."""
        cluster = self.world.cluster
        first = self._apply("first", 42)
        digest = first.wait_for_state("Succeeded", within=PATIENCE_SECONDS)["serving"]["digest"]
        for name, seed in (("second", 7), ("third", 8)):
            self._apply(name, seed, UNREACHABLE).wait_for_condition(
                "Evaluated", "False", reason="EvaluationBelowGate", within=PATIENCE_SECONDS
            )
        second = JobHandle(cluster, self.namespace, "second")
        load = Load(cluster, self.namespace, "load")
        load.start(self.world.images["trainer"], ENDPOINT, RATE, self.requests)
        self._wait_until(load, CHANGE)
        self._note("change")
        second.patch(evaluation={"gates": []})
        second.wait_for_condition("Succeeded", within=PATIENCE_SECONDS)
        newer = second.status()["serving"]["digest"]
        self._wait_until(load, KILL)
        self._kill_pod(newer)
        self._wait_until(load, BROKEN)
        self._note("broken")
        second.patch(inference={"version": NEVER_PROMOTED})
        second.wait_for_condition("Stalled", "True", within=PATIENCE_SECONDS)
        self._wait_until(load, BACK)
        self._note("back")
        second.patch(inference={"version": digest})
        second.wait_for_condition("Ready", "True", within=PATIENCE_SECONDS)
        eventually(load.is_done, within=self.requests / RATE + PATIENCE_SECONDS, otherwise=second.describe, every=2.0)
        return load.stop(), (digest, newer)

    def _apply(self, name: str, seed: int, least: float = 0.0) -> JobHandle:
        gates = [{"task": "holdout", "metric": "loss", "min": least}]
        inference = {"enabled": True, "endpoint": ENDPOINT, "runtime": "transformers", "replicas": 2}
        manifest = make_job(name, evaluation={"gates": gates}, inference=inference, training={"seed": seed})
        return apply_job(self.world.cluster, self.namespace, manifest)

    def _wait_until(self, load: Load, share: float) -> None:
        asked = int(self.requests * share)

        def look() -> bool:
            lines = load.read()
            return bool(lines) and lines[-1]["n"] >= asked

        eventually(look, within=self.requests / RATE + PATIENCE_SECONDS, every=1.0)

    def _note(self, what: str) -> None:
        self.happened[what] = time.time()
        print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)

    def _kill_pod(self, digest: str) -> None:
        """Take one of the pods that answer away without a warning."""
        selector = f"finetune.dev/endpoint={ENDPOINT},finetune.dev/job=second"
        pods = self.world.cluster.read("pods", "-n", self.namespace, "-l", selector)["items"]
        chosen = next(pod for pod in pods if pod["metadata"]["annotations"]["finetune.dev/model-digest"] == digest)
        self._note("kill")
        name = chosen["metadata"]["name"]
        self.world.cluster.run("delete", "pod", name, "-n", self.namespace, "--grace-period=0", "--force")


def build_results(lines: list[Line], passed: tuple[str, str], happened: dict[str, float]) -> list[Result]:
    """Return the figures, the headline first."""
    seconds = sorted(line["seconds"] for line in lines)
    answers = sorted((line["ended"], line["digest"]) for line in lines if line["digest"])
    gaps = [after[0] - before[0] for before, after in itertools.pairwise(answers)]
    first, second = passed

    def until(digest: str, event: str) -> float:
        return next(at for at, each in answers if each == digest and at > happened[event]) - happened[event]

    last_of_first = max((at for at, each in answers if each == first and at < happened["back"]), default=0.0)
    return [
        Result("failed_requests", len(list_failed(lines)), "requests"),
        Result("requests", len(lines), "requests"),
        Result("unretried_resets", sum(bool(line.get("first")) for line in lines), "requests"),
        Result("answers_of_models_that_did_not_pass", sum(digest not in passed for _, digest in answers), "answers"),
        Result("median_seconds", statistics.median(seconds), "s"),
        Result("p99_seconds", seconds[int(len(seconds) * 0.99)], "s"),
        Result("longest_silence_seconds", max(gaps), "s"),
        Result("change_seconds", until(second, "change"), "s"),
        Result("overlap_seconds", max(0.0, last_of_first - happened["change"] - until(second, "change")), "s"),
        Result("rollback_seconds", until(first, "back"), "s"),
    ]


def main() -> int:
    """Measure on the embedded cluster, which is left as it was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--cluster", default="default")
    arguments = parser.parse_args()
    with borrow_world(arguments.cluster) as world:
        namespace = world.make_namespace("rollout")
        rollout = Rollout(world, namespace, arguments.requests)
        try:
            install_chart(world.cluster, world.images)
            lines, passed = rollout.run()
        finally:
            world.cluster.run("delete", "namespace", namespace, "--wait=false")
    FOLDER.mkdir(parents=True, exist_ok=True)
    kept = {"happened": rollout.happened, "passed": passed, "requests": lines}
    (FOLDER / "rollout-requests.json").write_text(json.dumps(kept), encoding="utf-8")
    first_tries = collections.Counter(line["first"] for line in lines if line.get("first"))
    results = build_results(lines, passed, rollout.happened)
    write_results("rollout", results, first_tries=dict(first_tries), load_average=os.getloadavg())
    return 0


if __name__ == "__main__":
    sys.exit(main())
