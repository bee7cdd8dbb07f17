"""Publishing to a hub repository: one commit of all files, verified, then tagged with the model's digest."""

from __future__ import annotations

import hashlib
import io
import pathlib
import tempfile
from typing import TYPE_CHECKING

import huggingface_hub
from huggingface_hub import CommitOperationAdd

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.errors import TrainerError
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
                _commit(api, repository, digest, files, access)
        except HUB_ERRORS as error:
            raise explain_hub_error(error, access, location.text) from error

    call_with_retries(publish, access, url)
    emit("published", destination=url, files=len(files), bytes=sum(file.size for file in files))
    return url


def _has_tag(
    api: huggingface_hub.HfApi, repository: str, digest: str, files: Sequence[LocalFile], access: Access
) -> bool:
    """Is the model there already? Raises TrainerError when the tag names something else."""
    tags = [tag.name for tag in api.list_repo_refs(repository).tags]
    if digest not in tags:
        return False
    named = [file for file in files if file.name not in ACCOUNTS]
    is_whole = COMPLETE in api.list_repo_files(repository, revision=digest)
    if not is_whole or _find_difference(api, repository, digest, named) is not None:
        raise refuse_other_content(access, f"tag {digest} of {repository}")
    return True


def _find_difference(
    api: huggingface_hub.HfApi, repository: str, revision: str, files: Sequence[LocalFile]
) -> LocalFile | None:
    """Return the first file that the hub does not have as it left, by size and digest; None when all arrived."""
    siblings = api.model_info(repository, revision=revision, files_metadata=True).siblings or []
    there = {sibling.rfilename: sibling for sibling in siblings}
    for file in files:
        found = there.get(file.name)
        if found is None or found.size != file.size:
            return file
        if (found.lfs.sha256 if found.lfs else found.blob_id) != (file.sha256 if found.lfs else _hash_as_git(file)):
            return file
    return None


def _hash_as_git(file: LocalFile) -> str:
    """Return the id under which Git keeps a file's content; of small files, the large ones go by SHA-256."""
    content = file.path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _commit(
    api: huggingface_hub.HfApi, repository: str, digest: str, files: Sequence[LocalFile], access: Access
) -> None:
    mark = io.BytesIO(build_complete(digest, files))
    is_card_kept = _has_own_card(api, repository)
    sent = [file for file in files if not (file.name == MODEL_CARD and is_card_kept)]
    operations = [CommitOperationAdd(file.name, str(file.path)) for file in sent]
    commit = api.create_commit(
        repository,
        [*operations, CommitOperationAdd(COMPLETE, mark)],
        commit_message=f"Publish model {digest}",
    )
    different = _find_difference(api, repository, commit.oid, sent)
    if different is not None:
        # The tag alone says that the model is published; without it the commit is none.
        raise TrainerError(
            Reason.DESTINATION_UNAVAILABLE,
            ExitCode.UNAVAILABLE,
            f"{access.field}.{access.source_field}: {different.name} arrived in {repository} with other content",
            "The commit was not tagged; the model is sent anew when the phase runs again.",
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
