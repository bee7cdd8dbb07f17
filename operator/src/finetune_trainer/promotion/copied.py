"""A promoted model's copy at one of its destinations, brought onto this machine for a server. Needs no torch.

Called by `serve`. The copy is the model only if its content has the digest that was asked for: every file is compared
with the manifest, and that with the digest.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import RunConfig
from finetune_trainer.errors import TrainerError
from finetune_trainer.promotion.promoted import MANIFEST, read_manifest
from finetune_trainer.reporting import ProgressBar, emit
from finetune_trainer.storage import Access, RemoteFile, open_store
from finetune_trainer.storage.publish import COMPLETE
from finetune_trainer.storage.transfer import download_files, list_with_retries


def fetch_copy(run: RunConfig, downloads: pathlib.Path) -> pathlib.Path:
    """Return the folder of the model on this machine; what an earlier try downloaded is used. Raises TrainerError."""
    digest = run.promotion.digest
    source, folder = f"{run.serving.source}/{digest}", downloads / digest
    access = Access(run.serving.source_field, "model", run.serving.secret_prefix, source_field="destination")
    store = open_store(f"{source}/", "", access, downloads)
    files = {file.name: file for file in list_with_retries(store, access, source).files}
    # The mark is written last, so what is without it is still being copied, or never was to the end.
    _require(files, (MANIFEST, COMPLETE), source)
    (folder / MANIFEST).unlink(missing_ok=True)
    download_files(store, (files[MANIFEST],), folder, access)
    try:
        manifest = read_manifest(folder, is_whole=False)
    except TrainerError as error:
        raise _damaged(source, f"{MANIFEST} does not match its own digest, or is not whole") from error
    if manifest["digest"] != digest:
        raise _damaged(source, f"{MANIFEST} is that of another model, {manifest['digest']}")
    _require(files, manifest["files"], source)
    wanted = [files[name] for name in manifest["files"]]
    with ProgressBar("loading the model", sum(file.size for file in wanted), "B") as bar:
        found = download_files(store, wanted, folder, access, bar.advance)
    for name, entry in manifest["files"].items():
        if found[name] != entry["sha256"]:
            (folder / name).unlink()
            raise _damaged(source, f"the content of {name} is not what was promoted (SHA-256 differs)")
    emit("the model is here", source=source, folder=str(folder), files=len(wanted))
    return folder


def _require(files: dict[str, RemoteFile], names: Iterable[str], source: str) -> None:
    for name in names:
        if name not in files:
            raise _damaged(source, f"{name} is missing")


def _damaged(source: str, problem: str) -> TrainerError:
    return TrainerError(
        Reason.PROMOTION_INVALID,
        ExitCode.NO_INPUT,
        f"{source} is no whole copy of the promoted model: {problem}",
        "Write inference.loadFrom: Workspace, or copy the model from /workspace/output there again.",
    )
