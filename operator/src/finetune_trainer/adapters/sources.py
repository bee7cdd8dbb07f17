"""Adapters brought onto this machine from where a profile or a job says they are. No torch."""

from __future__ import annotations

import pathlib
import re
from typing import TYPE_CHECKING

from finetune_trainer.adapters.folder import CONFIG, WEIGHTS
from finetune_trainer.reporting import emit
from finetune_trainer.storage import open_store
from finetune_trainer.storage.local import LocalStore
from finetune_trainer.storage.publish import PROVENANCE
from finetune_trainer.storage.transfer import download_files, list_with_retries

if TYPE_CHECKING:
    from finetune_trainer.storage import Access

_WANTED = re.compile(rf"(?:adapter/)?(?:{re.escape(CONFIG)}|{re.escape(WEIGHTS)})|{re.escape(PROVENANCE)}")


def fetch_adapter(
    source: str, revision: str, access: Access, downloads: pathlib.Path, root: pathlib.Path = pathlib.Path()
) -> pathlib.Path:
    """Return the folder of an adapter, or of a promoted model with one, on this machine.

    Of a remote source the adapter's files and its provenance are fetched into `downloads`, not the model beside them.
    `root` is where pvc:// begins. Raises TrainerError in the words of `access`.
    """
    store = open_store(source, revision, access, root)
    if isinstance(store, LocalStore):
        if not store.path.is_dir():
            raise access.not_found(source, "Name the folder of a LoRA adapter.")
        return store.path
    listing = list_with_retries(store, access, source)
    files = [file for file in listing.files if _WANTED.fullmatch(file.name)]
    if not any(file.name.endswith(CONFIG) for file in files):
        raise access.not_found(f"{CONFIG} in {source}", "Name the folder of a LoRA adapter that PEFT wrote.")
    download_files(store, files, downloads, access)
    emit("fetched an adapter", source=source, revision=listing.revision, files=len(files))
    return downloads
