"""The facts that decide what a run's model becomes: runs that agree on them may take up each other's checkpoints."""

from __future__ import annotations

import hashlib
import json
import pathlib

from finetune_contract.parsing import to_plain
from finetune_contract.run_config import IDENTITY_TRAINING, RunConfig
from finetune_contract.workspace import Workspace
from finetune_trainer.storage.transfer import hash_file

RUN = "run"
"""Key of these facts in a manifest's `extra`."""


def identify_run(run: RunConfig, base_model: pathlib.Path, dataset: pathlib.Path) -> dict[str, str]:
    """Return digests of the rows, the base model and the settings, under `dataset`, `model` and `settings`."""
    # As it is sent: a setting that came later changes no digest while it has its default.
    settings = {name: value for name, value in to_plain(run.training).items() if name in IDENTITY_TRAINING}
    settings["prompt_template"] = run.dataset.prompt_template
    return {
        "dataset": hash_file(dataset / "train.jsonl")[:32],
        "model": _read_model_digest(run, base_model),
        "settings": _digest(settings),
    }


def _read_model_digest(run: RunConfig, base_model: pathlib.Path) -> str:
    manifest = Workspace(pathlib.Path(run.workspace)).base_model_manifest
    if manifest.exists():
        return str(json.loads(manifest.read_text())["digest"])
    # A folder that somebody named: reading tens of gigabytes at each start would cost more than it tells.
    files = sorted(path for path in base_model.rglob("*") if path.is_file())
    sizes = [(path.relative_to(base_model).as_posix(), path.stat().st_size) for path in files]
    return _digest([sizes, hash_file(base_model / "config.json")])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
