"""Training runs on CPUs without a cluster: workspace, settings and data of a run that takes a second, and its commands.

Imported before torch: it sets what makes a process with the stack imported safe to fork from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import sys
from typing import Any

# Before torch is imported: one thread, so that this process can be forked at any time.
os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

from finetune_contract.workspace import Workspace
from finetune_trainer.__main__ import main
from finetune_trainer.checkpoints.layout import list_folders
from finetune_trainer.checkpoints.manifest import Manifest, read_manifest, verify_checkpoint
from tests.support import tiny_models
from tests.support.waiting import eventually

SMALL = (
    "training.max_length=128",
    "training.per_device_batch_size=2",
    "training.gradient_accumulation_steps=1",
    "training.gradient_checkpointing=false",
    "training.learning_rate=0.001",
    "topology.processes_per_node=2",
    "dataset.prompt_template=wizardlm",
    "evaluation.baseline=false",
)
"""Settings of a run that takes a second; tests add to them."""


def import_stack() -> None:
    """Import the stack once, as the supervisor does; the ranks are forked from this process."""
    from finetune_trainer.training import stack

    os.environ["PATH"] = str(pathlib.Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    stack.import_stack()


def build_pairs():
    """Return 48 questions with answers of several lengths."""
    things = ("list", "dict", "set", "str", "file", "path", "loop", "class")
    verbs = ("opens", "closes", "joins", "splits", "counts", "sorts")
    return [
        (f"What does {thing}.{verb} do?", f"It {verb} the {thing} and returns {index} of its parts." * (1 + index % 3))
        for index, (thing, verb) in enumerate((thing, verb) for thing in things for verb in verbs)
    ]


def write_rows(path, pairs):
    """Write prepared rows."""
    lines = (
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "index": i, "source": 0}
        for i, (q, a) in enumerate(pairs)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_data(folder: pathlib.Path) -> pathlib.Path:
    """Write a prepared data set of 40 rows, and 8 held out."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", build_pairs()[:40])
    write_rows(folder / "holdout.jsonl", build_pairs()[40:])
    return folder


def build_texts() -> list[str]:
    """Return what the tiny models' tokenizers are trained on."""
    return [f"{q}\n\n### Response:{a}" for q, a in build_pairs()]


def build_llama(folder: pathlib.Path) -> pathlib.Path:
    """Write the tiny Llama that the runs train."""
    return tiny_models.build_tiny_llama(folder, build_texts(), vocab_size=400, hidden=64, layers=2)


@dataclasses.dataclass
class Run:
    """One workspace with one model, and the commands on it."""

    root: pathlib.Path
    model: pathlib.Path
    data: pathlib.Path
    settings: tuple[str, ...] = SMALL
    started: list[int] = dataclasses.field(default_factory=list)
    """Process groups of the trainings that `start` began."""

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.root)

    def words(self, command: str, *extra: str) -> list[str]:
        """Return the command line; `a.b=c` among `extra` are settings."""
        words = [command, "--model", str(self.model), "--data", str(self.data), "--workspace", str(self.root)]
        for setting in (*self.settings, *(word for word in extra if not word.startswith("-") and "=" in word)):
            words += ["--set", setting]
        return words + [word for word in extra if word.startswith("-") or "=" not in word]

    def call(self, command: str, *extra: str) -> int:
        """Run a command here, and return its exit code."""
        return int(main(self.words(command, *extra)))

    def train(self, *settings: str) -> dict[str, Any]:
        """Train, expect success, and return the results."""
        assert self.call("train", *settings) == 0, self.report("train")
        details: dict[str, Any] = self.report("train")["details"]
        return details

    def start(self, *settings: str) -> int:
        """Train in a child process of its own group, and return its id; forked, so the stack must be imported."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setpgid(0, 0)
                code = self.call("train", *settings)
            finally:
                os._exit(code)
        self.started.append(pid)
        return pid

    def end(self) -> None:
        """Kill the trainings that a failed test has left."""
        for pid in self.started:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                kill_group(pid)

    def report(self, phase: str) -> dict[str, Any]:
        """Return the exit report of a phase."""
        report: dict[str, Any] = json.loads((self.workspace.reports / f"{phase}.json").read_text())
        return report

    def manifests(self) -> dict[int, Manifest]:
        """Return the manifests of the committed checkpoints, by step."""
        found = {}
        for folder in list_folders(self.workspace.checkpoints):
            if (folder.path / "finetune-manifest.json").exists():
                found[folder.step] = read_manifest(folder.path)
        return found

    def wait_for_checkpoint(self, step: int) -> None:
        """Wait until a step has been committed."""
        folder = self.workspace.checkpoints / f"checkpoint-{step}"
        eventually(lambda: not verify_checkpoint(folder), within=120, every=0.01, otherwise=f"{folder} is not complete")


def end_state(manifest: Manifest) -> dict[str, str]:
    """Return the digests of everything that decides how training goes on: weights, optimizer, schedule, randomness."""
    names = ("model", "global_step", "scheduler", "rng_state")
    return {name: entry.sha256 for name, entry in manifest.files.items() if name.startswith(names)}


def reap(pid: int) -> int:
    """Return the exit code of a child; negative is a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_group(pid: int) -> None:
    """End a run as a lost node does: everything at once."""
    os.killpg(pid, signal.SIGKILL)
    reap(pid)
