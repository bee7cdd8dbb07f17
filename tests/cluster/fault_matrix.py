"""Every fault in every phase of a training, on the embedded cluster: `make test-faults`.

A job lives through one fault again and again: before its first save, between two saves, while a save is being written,
and at the end, while its model is promoted. Another one takes over where its steps run out. After each the job has to
go on by itself, from the newest checkpoint that was complete, and to use up restarts only where the fault is the
training's own. At the end its promoted model has to be, bit for bit, that of a job that nothing happened to. Takes
three minutes a fault, so it is no part of `make test`; writes build/bench/faults.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.bench.results import Result, write_results
from tests.cluster.faults import LOSES_NODES_QUICKLY, PATIENCE_SECONDS, Faults
from tests.cluster.world import World, borrow_world
from tests.demo.demo import OPERATOR_NAMESPACE, install_chart
from tests.demo.kubectl import ClusterError
from tests.support.jobs import apply_job, make_job
from tests.support.waiting import eventually

TOTAL_STEPS, SAVE_STEPS = 100, 20
NEEDED_STEPS = 3 * SAVE_STEPS
"""With fewer steps to go from a checkpoint, training might be over before the next fault has struck."""
LIMITED = {"size": "96Mi", "storageClassName": "limited"}
Pod = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Phase:
    """When a fault strikes."""

    name: str
    component: str = "train"
    is_in_save: bool = False


BEFORE_FIRST_SAVE, BETWEEN_SAVES = Phase("before the first save"), Phase("between two saves")
IN_SAVE, PROMOTING = Phase("in a save", is_in_save=True), Phase("promoting", "promote")
PHASES = (BEFORE_FIRST_SAVE, BETWEEN_SAVES, IN_SAVE, PROMOTING)


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that happens, and what it may cost."""

    name: str
    strike: Callable[[Faults, Pod, Phase], None]
    reasons: tuple[str, ...] = ()
    """Why the attempt that it ends has ended; empty: it ends none."""
    counts: bool = False
    """Whether it uses up a restart of failurePolicy.maxRestarts."""
    is_in_pod: bool = False
    """Ranks start again inside their pod."""
    workspace: dict[str, str] = dataclasses.field(default_factory=dict)
    phases: tuple[Phase, ...] = PHASES


def _kill(kind: str) -> Callable[[Faults, Pod, Phase], None]:
    def strike(faults: Faults, pod: Pod, phase: Phase) -> None:
        faults.kill_process(pod, kind, in_save=phase.is_in_save)

    return strike


def _in_save(do: Callable[[Faults, Pod], object]) -> Callable[[Faults, Pod, Phase], None]:
    """Wait for a save first, where the phase says so: what follows begins inside it."""

    def strike(faults: Faults, pod: Pod, phase: Phase) -> None:
        if phase.is_in_save:
            faults.kill_process(pod, "nothing", in_save=True)
        do(faults, pod)

    return strike


def _cut_power(faults: Faults, pod: Pod, phase: Phase) -> None:
    # Promotion would have ended before its pod could be found without kubelet: there the network is cut.
    faults.lose_node(pod, kill_in_save=None if phase is PROMOTING else phase.is_in_save)


def _drain(faults: Faults, _: Pod) -> None:
    try:
        said = faults.drain("--disable-eviction", f"--timeout={PATIENCE_SECONDS}s")
        assert "drained" in said, said
    finally:
        faults.uncordon()


def _fill_disk(faults: Faults, pod: Pod) -> None:
    """Fill the workspace, wait until the job says so, and give it more room."""
    job, name = faults.job, pod["metadata"]["name"]
    claim = job.cluster.read("pvc", f"{job.name}-workspace", "-n", job.namespace)
    size = int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Mi"))
    fill = ("dd", "if=/dev/zero", f"of=/workspace/ballast-{size}", "bs=1M")
    with pytest.raises(ClusterError, match="No space left"):
        job.cluster.run("exec", "-n", job.namespace, name, "--", *fill)
    job.wait_for_condition("Stalled", reason="StorageFull", within=PATIENCE_SECONDS)
    job.patch(workspace={"size": f"{size + 64}Mi"})


TRAINING_ONLY = (BEFORE_FIRST_SAVE, BETWEEN_SAVES, IN_SAVE)
FAULTS = (
    Fault("pod killed", _in_save(Faults.delete_pod), ("PodDeleted", "Interrupted")),
    Fault("rank killed", _kill("rank"), counts=True, is_in_pod=True, phases=TRAINING_ONLY),
    Fault("container killed", _kill("container"), ("Killed",), counts=True),
    Fault("node drained", _in_save(_drain), ("Interrupted", "PodDeleted")),
    Fault("node lost", _cut_power, ("NodeLost",)),
    Fault("containerd restarted", _in_save(lambda faults, _: faults.restart("containerd"))),
    Fault("API server restarted", _in_save(lambda faults, _: faults.restart("apiserver"))),
    Fault("operator killed", _in_save(lambda faults, _: faults.kill_operator(OPERATOR_NAMESPACE))),
    Fault("disk full", _in_save(_fill_disk), ("StorageFull",), counts=True, workspace=LIMITED),
)
UNDISTURBED = Fault("undisturbed", lambda *_: None)


@dataclasses.dataclass
class Cell:
    """What a fault did in one phase."""

    fault: str
    phase: str
    problem: str = ""
    """Empty: the job went on as it has to."""
    reason: str = ""
    complete: int = 0
    """Newest complete checkpoint when the fault struck."""
    resumed_from: int | None = None
    next_step_seconds: float | None = None


class Run:
    """One job that lives through one fault, phase after phase."""

    def __init__(self, world: World, fault: Fault) -> None:
        self.fault = fault
        manifest = make_job(
            fault.name.lower().replace(" ", "-"),
            training={"maxSteps": TOTAL_STEPS},
            checkpoint={"everySteps": SAVE_STEPS},
            resources={"processesPerNode": 2},
            evaluation={"holdout": False},
            failurePolicy={"maxRestarts": 20},
            workspace=fault.workspace,
            pod={"tolerations": LOSES_NODES_QUICKLY},
        )
        self.job = apply_job(world.cluster, world.make_namespace("matrix"), manifest)
        self.faults = Faults(world, self.job)
        self.cells: list[Cell] = []

    def live(self, phases: Sequence[Phase]) -> tuple[str, list[Phase]]:
        """Go through phases, and to the end.

        Returns the digest of the promoted model, empty when it never came, and the phases that there was no time for.
        """
        left = list(phases)
        try:
            for phase in phases:
                if phase is not PROMOTING and self.cells and not self._has_time():
                    continue
                left.remove(phase)
                self.cells.append(Cell(self.fault.name, phase.name))
                self._suffer(self.fault, phase, self.cells[-1])
            status = self.job.wait_for_state("Succeeded", within=2 * PATIENCE_SECONDS)
            return str(status["promotion"]["digest"]), left
        except (AssertionError, ClusterError, subprocess.SubprocessError) as error:
            print(f"{self.job.name}: {error}", file=sys.stderr, flush=True)
            if self.cells:
                lines = str(error).strip().splitlines()
                self.cells[-1].problem = " ... ".join(dict.fromkeys((lines[0][:200], lines[-1][:200])))
            return "", left
        finally:
            self.job.cluster.run("delete", "namespace", self.job.namespace, "--wait=false")

    def _has_time(self) -> bool:
        """Will there be another save? Told from the workspace: the status is old while no operator writes it."""
        return self.faults.newest_complete_step() <= TOTAL_STEPS - NEEDED_STEPS

    def _suffer(self, fault: Fault, phase: Phase, cell: Cell) -> None:
        pod = self._wait_for(phase)
        before = self.job.live_status()
        cell.complete = self.faults.newest_complete_step() if phase.component == "train" else TOTAL_STEPS
        fault.strike(self.faults, pod, phase)
        struck = time.time()
        if phase is PROMOTING:
            # The fault has struck a pod that may try again; the job's success, and its model, are the proof.
            return
        self._wait_for_step(struck, is_new=bool(fault.reasons) or fault.is_in_pod, cell=cell)
        after = eventually(lambda: self._status_after(before, fault), within=60, otherwise=self.job.describe)
        self._judge(fault, before, after, cell)

    def _wait_for(self, phase: Phase) -> Pod:
        pod = self.faults.running_pod(phase.component, within=2 * PATIENCE_SECONDS)
        if phase.component == "train":
            name, wanted = pod["metadata"]["name"], "first step done"

            def is_there() -> bool:
                has_begun = any(wanted in line for _, line in self.faults.read_log(name))
                return has_begun and (phase is BEFORE_FIRST_SAVE or self.faults.newest_complete_step() > 0)

            eventually(is_there, within=PATIENCE_SECONDS, otherwise=self.job.describe)
        return pod

    def _wait_for_step(self, since: float, *, is_new: bool, cell: Cell) -> None:
        """Wait for the first step of a new start, or for any step where nothing starts anew."""
        wanted = "first step done" if is_new else " step step="

        def look() -> float | None:
            self.job.live_status()
            for pod in self.job.pods("train"):
                for at, line in self.faults.read_log(pod["metadata"]["name"]):
                    if at > since and wanted in line:
                        return at
                    if not is_new and f" step={TOTAL_STEPS} of=" in line:
                        # It went on to its end while the fault lasted.
                        return since
            return None

        cell.next_step_seconds = round(
            eventually(look, within=PATIENCE_SECONDS, otherwise=self.job.describe) - since, 1
        )

    def _status_after(self, before: dict[str, Any], fault: Fault) -> dict[str, Any] | None:
        """Return the status once it tells of what has happened."""
        status = self.job.live_status()
        has_restarted = status["restarts"] > before["restarts"]
        return status if has_restarted == (bool(fault.reasons) or fault.is_in_pod) else None

    def _judge(self, fault: Fault, before: dict[str, Any], after: dict[str, Any], cell: Cell) -> None:
        old, new = before["attempts"][-1]["number"], after["attempts"][-1]["number"]
        ended = next(each for each in after["attempts"] if each["number"] == old)
        cell.reason = "restarted in its pod" if fault.is_in_pod else ended["reason"]
        cell.resumed_from = (after["attempts"][-1].get("resumedFromStep") or 0) if fault.reasons else None
        counted = after["restartsCountTowardsMax"] - before["restartsCountTowardsMax"]
        assert new - old == int(bool(fault.reasons)), f"attempt {old} is followed by {new}"
        assert not fault.reasons or cell.reason in fault.reasons, f"attempt {old} ended as {cell.reason}"
        assert counted == int(fault.counts), f"{counted} restarts were counted"
        assert not fault.reasons or (cell.resumed_from or 0) >= cell.complete, (
            f"checkpoint {cell.complete} was complete, and training resumed from {cell.resumed_from}"
        )


def format_cells(cells: list[Cell]) -> str:
    """Return the matrix as a Markdown table: the reason that was told, and the seconds to the next step."""
    lines = ["| Fault | " + " | ".join(phase.name for phase in PHASES) + " |", "|---" * (len(PHASES) + 1) + "|"]
    for fault in FAULTS:
        found = {cell.phase: cell for cell in cells if cell.fault == fault.name}
        if found:
            row = (_describe(found.get(phase.name)) for phase in PHASES)
            lines.append(f"| {fault.name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _describe(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.problem:
        return f"FAILED: {cell.problem}"
    if cell.next_step_seconds is None:
        return "succeeded"
    resumed = "" if cell.resumed_from is None else f" from {cell.resumed_from}"
    return f"{cell.reason or 'nothing'}{resumed}, {cell.next_step_seconds:.0f} s"


def run_matrix(world: World, faults: list[Fault]) -> int:
    """Run every fault and one job without any; print and write the report. Returns the exit status."""
    expected, _ = Run(world, UNDISTURBED).live(())
    print(f"undisturbed: {expected}", flush=True)
    cells: list[Cell] = []
    num_diverged = 0
    for fault in faults:
        started, todo = time.monotonic(), list(fault.phases)
        while todo:
            run = Run(world, fault)
            digest, todo = run.live(todo)
            cells += run.cells
            if digest and digest != expected:
                num_diverged += 1
                run.cells[-1].problem = f"the promoted model is {digest}, undisturbed {expected}"
        print(format_cells([cell for cell in cells if cell.fault == fault.name]), flush=True)
        print(f"{fault.name}: {time.monotonic() - started:.0f} s", flush=True)
    good = sum(not cell.problem for cell in cells)
    results = [
        Result("recovered_share", good / len(cells), "share"),
        Result("cells", len(cells), "faults in phases"),
        Result("diverged_runs", num_diverged, "jobs"),
    ]
    print(format_cells(cells))
    write_results("faults", results, cells=[dataclasses.asdict(cell) for cell in cells])
    return int(good < len(cells) or not expected)


def main() -> int:
    """Run the matrix on the embedded cluster, which is left as it was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults to try, separated by commas; all when none is named")
    parser.add_argument("--cluster", default="default")
    arguments = parser.parse_args()
    names = [name.strip() for name in arguments.only.split(",") if name.strip()]
    unknown = set(names) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(fault.name for fault in FAULTS)}")
    with borrow_world(arguments.cluster) as world:
        install_chart(world.cluster, world.images)
        return run_matrix(world, [fault for fault in FAULTS if not names or fault.name in names])


if __name__ == "__main__":
    sys.exit(main())
