"""The folder of a promoted model: its content digest, its manifest, and whether it is whole. Needs no torch.

Promotion writes it, evaluation, serving and publishing read it. A promoted model is never changed: the name of its
folder is the digest of its content.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import RunConfig
from finetune_contract.workspace import Workspace
from finetune_trainer.checkpoints.manifest import FileEntry, seal_files, sync_folder
from finetune_trainer.errors import TrainerError
from finetune_trainer.reporting import write_json
from finetune_trainer.storage.publish import ACCOUNTS

MANIFEST = "finetune-model.json"
ADAPTER = "adapter"
"""Folder of a LoRA job's adapter beside the merged weights."""
NOT_CONTENT = frozenset((MANIFEST, *ACCOUNTS))
"""Files at the top of the folder that lie beside the model: they tell of it, and may be written anew."""


def list_content(folder: pathlib.Path) -> list[str]:
    """List the files that make up the model, as relative paths."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name not in NOT_CONTENT)


def make_digest(files: Mapping[str, FileEntry]) -> str:
    """Return the digest of a model's content: equal files under equal names, equal digest."""
    lines = (f"{entry.sha256} {entry.size} {name}\n" for name, entry in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_manifest(folder: pathlib.Path) -> str:
    """Make a finished folder durable, write its manifest last, and return the digest."""
    files = seal_files(folder, list_content(folder))
    digest = make_digest(files)
    entries = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in files.items()}
    write_json(folder / MANIFEST, {"version": 1, "digest": digest, "files": entries})
    sync_folder(folder)
    return digest


def read_manifest(folder: pathlib.Path, *, is_whole: bool = True) -> dict[str, Any]:
    """Read the manifest of a promoted model after checking that every file is there. Raises TrainerError.

    With `is_whole` false the files are yet to come.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: FileEntry(**entry) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _invalid(folder, f"{MANIFEST} is missing or not whole") from error
    if make_digest(files) != manifest.get("digest"):
        raise _invalid(folder, f"{MANIFEST} does not match its own digest")
    for name, entry in files.items() if is_whole else ():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry.size:
            raise _invalid(folder, f"{name} is missing or has another size")
    return manifest


def find_promoted(run: RunConfig) -> pathlib.Path:
    """Return the folder of the promoted model: by digest, or the only one there is. Raises TrainerError."""
    workspace = Workspace(pathlib.Path(run.workspace))
    folder = workspace.promoted_model(run.promotion.digest) if run.promotion.digest else None
    if folder is None:
        found = sorted(path.parent for path in workspace.output.glob(f"*/{MANIFEST}"))
        if len(found) != 1:
            raise TrainerError(
                Reason.MODEL_NOT_FOUND,
                ExitCode.NO_INPUT,
                f"{workspace.output} has {len(found)} promoted models and no digest was given",
                "Run `finetune-trainer promote` first, or add --set promotion.digest=DIGEST.",
            )
        folder = found[0]
    read_manifest(folder)
    return folder


def _invalid(folder: pathlib.Path, problem: str) -> TrainerError:
    return TrainerError(
        Reason.PROMOTION_INVALID,
        ExitCode.NO_INPUT,
        f"{folder} is no whole promoted model: {problem}",
        "Promote again; if the folder is damaged, remove it first.",
    )
