"""Publishing to a hub repository: one commit of all files, tagged with the model's digest."""

from __future__ import annotations

import io
import pathlib
import tempfile
from typing import TYPE_CHECKING

import huggingface_hub
from huggingface_hub import CommitOperationAdd

from finetune_trainer.reporting import emit
from finetune_trainer.storage.hub import HUB_ERRORS, explain_hub_error, make_api
from finetune_trainer.storage.publish import (
    ACCOUNTS,
    CARD_MARK,
    COMPLETE,
    MODEL_CARD,
    LocalFile,
    build_complete,
    refuse_other_content,
)
from finetune_trainer.storage.retry import call_with_retries

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune_trainer.storage.access import Access
    from finetune_trainer.storage.location import Location


def publish_to_hub(location: Location, digest: str, files: Sequence[LocalFile], access: Access) -> str:
    """Commit the files to the repository's main branch, private if it has to be made; return the tagged URL."""
    api = make_api(access)
    repository = location.container
    url = f"{location.text.rstrip('/')}/{digest}"

    def publish() -> None:
        try:
            api.create_repo(repository, private=True, exist_ok=True)
            if not _has_tag(api, repository, digest, files, access):
                _commit(api, repository, digest, files)
        except HUB_ERRORS as error:
            raise explain_hub_error(error, access, location.text) from error

    call_with_retries(publish, access, url)
    emit("published", destination=url, files=len(files), bytes=sum(file.size for file in files))
    return url


def _has_tag(
    api: huggingface_hub.HfApi, repository: str, digest: str, files: Sequence[LocalFile], access: Access
) -> bool:
    tags = [tag.name for tag in api.list_repo_refs(repository).tags]
    if digest not in tags:
        return False
    names = set(api.list_repo_files(repository, revision=digest))
    if not {file.name for file in files if file.name not in ACCOUNTS} <= names or COMPLETE not in names:
        raise refuse_other_content(access, f"tag {digest} of {repository}")
    return True


def _commit(api: huggingface_hub.HfApi, repository: str, digest: str, files: Sequence[LocalFile]) -> None:
    mark = io.BytesIO(build_complete(digest, files))
    is_card_kept = _has_own_card(api, repository)
    operations = [
        CommitOperationAdd(file.name, str(file.path))
        for file in files
        if not (file.name == MODEL_CARD and is_card_kept)
    ]
    commit = api.create_commit(
        repository,
        [*operations, CommitOperationAdd(COMPLETE, mark)],
        commit_message=f"Publish model {digest}",
    )
    api.create_tag(repository, tag=digest, revision=commit.oid, tag_message=f"Model {digest}")


def _has_own_card(api: huggingface_hub.HfApi, repository: str) -> bool:
    """Has the repository a model card that somebody wrote or edited?"""
    if not api.file_exists(repository, MODEL_CARD):
        return False
    with tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(repository, MODEL_CARD, local_dir=folder)
        text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
    if CARD_MARK in text:
        return False
    emit("the repository has a model card of its own, which is kept", repository=repository)
    return True
