"""Further models to score: where they lie, and how they come onto the workspace. No torch."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING

from finetune_contract.run_config import Source
from finetune_contract.workspace import Workspace
from finetune_trainer.fetch import RemoteModel
from finetune_trainer.reporting import ProgressBar, emit, write_json
from finetune_trainer.storage import Access
from finetune_trainer.storage.local import resolve_path
from finetune_trainer.storage.location import parse_location

if TYPE_CHECKING:
    from finetune_contract.run_config import NamedModel, RunConfig

_MANIFEST = "model.json"


def open_model(run: RunConfig, index: int) -> RemoteModel:
    """Return one of the run's further models at its source."""
    model = run.evaluation.models[index]
    own = dataclasses.replace(run, model=Source(model.source, model.revision))
    return RemoteModel(own, pathlib.Path(run.workspace), _access(model, index))


def _access(model: NamedModel, index: int) -> Access:
    return Access(f"spec.evaluation.models[{index}]", "model", model.secret_prefix)


def fetch_models(run: RunConfig) -> dict[str, pathlib.Path]:
    """Return the folder of each further model, by name; what is not on this machine is downloaded."""
    return {model.name: _fetch(run, index) for index, model in enumerate(run.evaluation.models)}


def _fetch(run: RunConfig, index: int) -> pathlib.Path:
    model = run.evaluation.models[index]
    access = _access(model, index)
    location = parse_location(model.source, access)
    if location.scheme in ("pvc", "file"):
        folder = resolve_path(location, access, pathlib.Path(run.workspace))
        if not (folder / "config.json").is_file():
            raise access.not_found(f"config.json in {model.source}", "Name a folder in Hugging Face layout.")
        return folder
    folder = Workspace(pathlib.Path(run.workspace)).evaluated_model(model.name)
    remote = open_model(run, index)
    wanted = {"source": model.source, "revision": remote.revision}
    manifest = folder / _MANIFEST
    files = remote.list_files()
    # Downloads resume by size alone, so files of another source or revision must not be there.
    if manifest.exists() and json.loads(manifest.read_text(encoding="utf-8")) != wanted:
        for path in folder.iterdir():
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(manifest, wanted)
    with ProgressBar(f"fetching model {model.name}", sum(max(file.size, 0) for file in files), "B") as bar:
        remote.download(folder, files, bar.advance)
    emit("a model to score is here", model=model.name, source=model.source, revision=remote.revision)
    return folder
