"""How long from the moment a model has passed its gates to its first answer through its endpoint, on a real cluster.

`python -m tests.bench.serve_start`. A job is held back by its gate while a pod asks its endpoint ten times a second;
then the gate is lowered. Each part of the way is read from a watch of the API server and from the pods' logs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import statistics
import sys
import time

from tests.bench.results import Result, write_results
from tests.cluster.faults import Faults
from tests.cluster.world import World, borrow_world
from tests.demo.demo import install_chart
from tests.support.jobs import JobHandle, apply_job, make_job
from tests.support.load import Load
from tests.support.waiting import eventually
from tests.support.watching import Watch, mark_pod, mark_service

PATIENCE_SECONDS = 300
UNREACHABLE = 1000
RATE = 10
PARTS = ("operator", "container", "imports", "model", "ready", "switch", "answer")
"""Until there is a pod with a node; its program runs; its libraries are imported; the model is loaded; the pod is ready
and the smoke prompt is answered; the Service selects the version; the first answer has come."""


@dataclasses.dataclass
class Round:
    """One job, from its gate to its first answer."""

    world: World
    namespace: str
    name: str

    def measure(self) -> dict[str, float]:
        """Return the seconds of each part, and of the whole."""
        job, cluster = self._hold(), self.world.cluster
        load = Load(cluster, self.namespace, f"{self.name}-load")
        load.start(self.world.images["trainer"], self.name, RATE, requests=1_000_000)
        pods = Watch(cluster, self.namespace, "pods", mark_pod)
        services = Watch(cluster, self.namespace, "services", mark_service)
        try:
            passed = time.time()
            job.patch(evaluation={"gates": [{"task": "holdout", "metric": "loss", "min": 0}]})
            job.wait_for_condition("Succeeded", within=PATIENCE_SECONDS)
            digest = job.status()["serving"]["digest"]
            answered = eventually(
                lambda: next((each["ended"] for each in load.read() if each["digest"] == digest), None),
                within=PATIENCE_SECONDS,
                otherwise=job.describe,
            )
            return self._split(job, passed, answered, {**pods.seen, **services.seen})
        finally:
            pods.close()
            services.close()
            load.stop()
            cluster.run("delete", "finetunejob", self.name, "-n", self.namespace, "--timeout=90s")

    def _hold(self) -> JobHandle:
        gates = [{"task": "holdout", "metric": "loss", "min": UNREACHABLE}]
        inference = {"enabled": True, "runtime": "transformers"}
        manifest = make_job(self.name, evaluation={"gates": gates}, inference=inference)
        job = apply_job(self.world.cluster, self.namespace, manifest)
        job.wait_for_condition("Evaluated", "False", reason="EvaluationBelowGate", within=PATIENCE_SECONDS)
        return job

    def _split(self, job: JobHandle, passed: float, answered: float, seen: dict[str, float]) -> dict[str, float]:
        (pod,) = job.pods("serve")
        name, version = pod["metadata"]["name"], pod["metadata"]["labels"]["finetune.dev/version"]
        lines = Faults(self.world, job).read_log(name)
        imported, text = next(line for line in lines if "stack imported" in line[1])
        loaded, _ = next(line for line in lines if " serving " in line[1])
        begun = imported - float(re.search(r"seconds=([\d.]+)", text)[1])  # type: ignore[index]
        smoke = next(at for mark, at in seen.items() if mark.startswith(f"done:{self.name}-") and "-smoke-" in mark)
        ready = max(seen[f"ready:{name}"], smoke)
        marks = [passed, seen[f"placed:{name}"], begun, imported, loaded, ready]
        marks += [seen[f"{self.name}:{version}"], answered]
        spans = {part: end - start for part, start, end in zip(PARTS, marks[:-1], marks[1:], strict=True)}
        alone = {"pod_ready": seen[f"ready:{name}"] - loaded, "smoke": smoke - loaded}
        return {"first_answer": answered - passed, **spans, **alone}


def measure(world: World, num_rounds: int) -> list[dict[str, float]]:
    """Return the seconds of each part, round by round."""
    rounds = []
    namespace = world.make_namespace("start")
    try:
        install_chart(world.cluster, world.images)
        for number in range(num_rounds):
            rounds.append(Round(world, namespace, f"start-{number}").measure())
            print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in rounds[-1].items()), flush=True)
        return rounds
    finally:
        world.cluster.run("delete", "namespace", namespace, "--wait=false")


def build_results(rounds: list[dict[str, float]]) -> list[Result]:
    """Return the medians, the headline first."""
    names = ("first_answer", *PARTS, "pod_ready", "smoke")
    results = [Result(f"{name}_seconds", statistics.median(each[name] for each in rounds), "s") for name in names]
    return [*results, Result("slowest_first_answer_seconds", max(each["first_answer"] for each in rounds), "s")]


def main() -> int:
    """Measure on the embedded cluster, which is left as it was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cluster", default="default")
    arguments = parser.parse_args()
    with borrow_world(arguments.cluster) as world:
        rounds = measure(world, arguments.rounds)
        load = os.getloadavg()
    write_results("serve-start", build_results(rounds), rounds=rounds, load_average=load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
