"""What a recovery campaign strikes: our trainer, the stock Trainer beside it, and our save engine alone."""

from __future__ import annotations

import hashlib
import pathlib
import shutil
from typing import Protocol

from finetune_trainer.checkpoints.layout import checkpoint_name, list_folders
from finetune_trainer.checkpoints.manifest import read_manifest, verify_checkpoint
from tests.bench import recovery_engine, stock_trainer
from tests.bench.training_process import TrainingProcess, start_forked, start_fresh, start_training
from tests.support.training_runs import Run, end_state


class Arm(Protocol):
    """What the campaign needs to know of a trainer."""

    name: str

    def start(self, run: Run, is_fresh: bool) -> TrainingProcess:
        """Start or resume the training of a workspace, as a restarted pod would."""

    def is_complete(self, run: Run, step: int) -> bool:
        """Whether the save of a step came to its end."""

    def list_problems(self, run: Run, step: int) -> list[str]:
        """Return what is wrong with a checkpoint that was complete, every byte looked at."""

    def read_weights(self, run: Run, step: int) -> dict[str, str]:
        """Return digests of all that a training ends with at `step`."""

    def lend_a_hand(self, run: Run) -> bool:
        """Do by hand what makes a stuck training start again; False when nobody would know what."""


class OurTrainer:
    """`finetune-trainer train`."""

    name = "finetune-trainer"

    def start(self, run: Run, is_fresh: bool) -> TrainingProcess:
        """Crashed ranks may restart inside the pod twice."""
        return start_training(run, "topology.in_pod_restarts=2", is_fresh=is_fresh)

    def is_complete(self, run: Run, step: int) -> bool:
        """A checkpoint is one from the moment its manifest is whole; one that is being written does not count."""
        return not verify_checkpoint(_folder(run, step))

    def list_problems(self, run: Run, step: int) -> list[str]:
        """Sizes and digests against the manifest."""
        return verify_checkpoint(_folder(run, step), full=True)

    def read_weights(self, run: Run, step: int) -> dict[str, str]:
        """Weights, optimizer, schedule and random states."""
        return end_state(read_manifest(_folder(run, step)))

    def lend_a_hand(self, run: Run) -> bool:
        """Nobody should ever have to."""
        return False


class SaveEngine(OurTrainer):
    """Our keeper, writers and supervisor on synthetic state; a start costs no imports and no DeepSpeed."""

    name = "save engine"

    def start(self, run: Run, is_fresh: bool) -> TrainingProcess:
        """Always forked: there is little to import."""
        return start_forked(lambda: recovery_engine.train(run.workspace), run.root / "trainer.log")


class StockTrainer:
    """The Trainer of Transformers, restarted with `resume_from_checkpoint=True`."""

    name = "stock Trainer"

    def start(self, run: Run, is_fresh: bool) -> TrainingProcess:
        """A crashed rank ends the pod, as under torchrun."""
        log, words = run.root / "trainer.log", run.words("train")
        if is_fresh:
            return start_fresh(["-m", "tests.bench.stock_trainer", *words], log)
        return start_forked(lambda: stock_trainer.train(words), log)

    def is_complete(self, run: Run, step: int) -> bool:
        """It leaves no sign of its own, so a callback does."""
        return stock_trainer.saved_path(run.root, step).exists()

    def list_problems(self, run: Run, step: int) -> list[str]:
        """It keeps no digests; what can be asked is whether the folder is still there."""
        return [] if _folder(run, step).is_dir() else ["is gone"]

    def read_weights(self, run: Run, step: int) -> dict[str, str]:
        """The model's file and the shards; the files that hold times of day or paths are left out."""
        folder = _folder(run, step)
        files = [folder / "model.safetensors", *sorted((folder / f"global_step{step}").iterdir())]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def lend_a_hand(self, run: Run) -> bool:
        """Remove the newest folder, which somebody who reads the traceback would try first."""
        folders = list_folders(run.workspace.checkpoints)
        if not folders:
            return False
        shutil.rmtree(folders[-1].path)
        stock_trainer.saved_path(run.root, folders[-1].step).unlink(missing_ok=True)
        return True


def _folder(run: Run, step: int) -> pathlib.Path:
    return run.workspace.checkpoints / checkpoint_name(step)
