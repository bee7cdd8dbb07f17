"""How long from a fault to the next optimizer step, on a real cluster: a pod killed, and a rank alone.

`python -m tests.bench.restart`. Both happen to one training on the embedded cluster, in turn; each part of the way back
is read from a watch of the API server and from the time stamps of the pod's log. Medians of the rounds are reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from tests.bench.results import Result, write_results
from tests.cluster.faults import Faults, Line
from tests.cluster.world import World, borrow_world
from tests.demo.demo import install_chart
from tests.support.jobs import apply_job, make_job
from tests.support.waiting import eventually
from tests.support.watching import Watch, mark_pod

PATIENCE_SECONDS = 300
RANK_PARTS = ("detect", "model", "resume", "first_step")
"""Parts of the way back after a rank was killed, in order: until the ranks start again, the model and its engine are
there, the checkpoint is read, and the first step is done."""
POD_PARTS = ("detect", "schedule", "container", "imports", "rows", *RANK_PARTS[1:])
"""After a pod was killed: until there is another pod, it has a node, its program runs, the stack is imported, and the
rows are tokenized."""
RANK_MARKS = (" resuming ", " training step=", "first step done")
"""Lines of the log at which the last parts end."""
POD_MARKS = ("rows tokenized", *RANK_MARKS)


@dataclasses.dataclass
class Bench:
    """One training job that is hurt again and again."""

    faults: Faults
    watch: Watch

    def measure_pod(self) -> dict[str, float]:
        """Kill the training pod; return the seconds of each part until the next step is done."""
        pod = self._ready_pod()
        killed = time.time()
        self.faults.delete_pod(pod)
        name = self.faults.running_pod()["metadata"]["name"]
        lines = self._wait_for_step(name, killed)
        imported, text = _find(lines, "stack imported", killed)
        begun = imported - float(re.search(r"seconds=([\d.]+)", text)[1])  # type: ignore[index]
        marks = [killed, self.watch.seen[f"made:{name}"], self.watch.seen[f"placed:{name}"], begun, imported]
        return _split(POD_PARTS, [*marks, *_find_all(lines, POD_MARKS, killed)])

    def measure_rank(self) -> dict[str, float]:
        """Kill one rank; return the seconds of each part until the next step is done in the same pod."""
        pod = self._ready_pod()
        _, killed = self.faults.kill_process(pod, "rank")
        lines = self._wait_for_step(pod["metadata"]["name"], killed)
        noticed, _ = _find(lines, "ranks restart in this pod", killed)
        return _split(RANK_PARTS, [killed, noticed, *_find_all(lines, RANK_MARKS, killed)])

    def _ready_pod(self) -> dict[str, Any]:
        """Return the training pod once it has made steps past a checkpoint since it started."""
        pod = self.faults.running_pod()
        job = self.faults.job

        def look() -> bool:
            status = job.live_status()
            complete = (status.get("checkpoints") or {}).get("latestComplete") or 0
            return complete > 0 and ((status.get("progress") or {}).get("step") or 0) > complete

        self._wait_for_step(pod["metadata"]["name"], 0.0)
        eventually(look, within=PATIENCE_SECONDS, otherwise=job.describe)
        return pod

    def _wait_for_step(self, pod: str, after: float) -> list[Line]:
        def look() -> list[Line] | None:
            lines = self.faults.read_log(pod)
            return lines if any(at > after and "first step done" in text for at, text in lines) else None

        return eventually(look, within=PATIENCE_SECONDS, otherwise=self.faults.job.describe)


def _find(lines: Sequence[Line], text: str, after: float) -> Line:
    return next((at, line) for at, line in lines if at > after and text in line)


def _find_all(lines: Sequence[Line], texts: Sequence[str], after: float) -> list[float]:
    return [_find(lines, text, after)[0] for text in texts]


def _split(parts: Sequence[str], marks: Sequence[float]) -> dict[str, float]:
    spans = {part: end - start for part, start, end in zip(parts, marks[:-1], marks[1:], strict=True)}
    return {"next_step": marks[-1] - marks[0], **spans}


def measure(world: World, rounds: int) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Return the parts of each round: the pod killed, a rank killed."""
    namespace = world.make_namespace("restart")
    manifest = make_job(
        "restart",
        training={"maxSteps": 1_000_000},
        checkpoint={"everySteps": 50},
        resources={"processesPerNode": 2},
        failurePolicy={"maxRestarts": 1000},
    )
    job = apply_job(world.cluster, namespace, manifest)
    watch = Watch(world.cluster, namespace, "pods", mark_pod)
    try:
        bench = Bench(Faults(world, job), watch)
        pods, ranks = [], []
        for _ in range(rounds):
            ranks.append(bench.measure_rank())
            pods.append(bench.measure_pod())
            print(f"rank: {_describe(ranks[-1])}\npod:  {_describe(pods[-1])}", flush=True)
        return pods, ranks
    finally:
        watch.close()
        world.cluster.run("delete", "namespace", namespace, "--wait=false")


def _describe(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items())


def build_results(pods: list[dict[str, float]], ranks: list[dict[str, float]]) -> list[Result]:
    """Return the medians, the two headlines first."""

    def median(rounds: list[dict[str, float]], part: str) -> float:
        return statistics.median(each[part] for each in rounds)

    whole = median(pods, "next_step")
    results = [
        Result("next_step_seconds", whole, "s"),
        Result("rank_next_step_seconds", median(ranks, "next_step"), "s", "the pod killed", whole),
    ]
    results += [Result(f"pod_{part}_seconds", median(pods, part), "s") for part in POD_PARTS]
    results += [Result(f"rank_{part}_seconds", median(ranks, part), "s") for part in RANK_PARTS]
    return results


def main() -> int:
    """Measure on the embedded cluster, which is left as it was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cluster", default="default")
    arguments = parser.parse_args()
    with borrow_world(arguments.cluster) as world:
        install_chart(world.cluster, world.images)
        pods, ranks = measure(world, arguments.rounds)
    write_results("restart", build_results(pods, ranks), rounds={"pod": pods, "rank": ranks})
    return 0


if __name__ == "__main__":
    sys.exit(main())
