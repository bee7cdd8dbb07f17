"""Publishing to a hub repository: one commit of all files, verified, then tagged with the model's digest."""

from __future__ import annotations

import dataclasses
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

MODEL, ADAPTER = "config.json", "adapter_config.json"
"""Files by which libraries tell that a repository holds a model, or an adapter."""


def publish_to_hub(
    location: Location, digest: str, files: Sequence[LocalFile], access: Access, folder: str = ""
) -> str:
    """Commit the files to the repository's main branch, private if it has to be made; return the tagged URL.

    They go below `folder` of the repository, where one is named.
    """
    if folder:
        files = [dataclasses.replace(file, name=f"{folder}/{file.name}") for file in files]
    repository = _Repository(make_api(access), location.container, access)
    mark = f"{folder}/{COMPLETE}" if folder else COMPLETE
    url = f"{location.text.rstrip('/')}/{digest}"

    def publish() -> None:
        try:
            repository.publish(digest, files, mark)
        except HUB_ERRORS as error:
            raise explain_hub_error(error, access, location.text) from error

    call_with_retries(publish, access, url)
    emit("published", destination=url, files=len(files), bytes=sum(file.size for file in files))
    return url


@dataclasses.dataclass(frozen=True)
class _Repository:
    """One repository that models are published to."""

    api: huggingface_hub.HfApi
    name: str
    access: Access

    def publish(self, digest: str, files: Sequence[LocalFile], mark: str) -> None:
        """Send the files and `mark`, the name under which COMPLETE goes, unless the tag is there already."""
        self.api.create_repo(self.name, private=True, exist_ok=True)
        if not self._has_tag(digest, files, mark):
            self._refuse_mixture({file.name for file in files})
            self._commit(digest, files, mark)

    def _refuse_mixture(self, names: set[str]) -> None:
        """Raise TrainerError where a model would lie beside an adapter: libraries take the one for the other."""
        for own, other, kind in ((MODEL, ADAPTER, "an adapter"), (ADAPTER, MODEL, "a model")):
            if own in names and other not in names and self.api.file_exists(self.name, other):
                why = f"the repository holds {kind}, which libraries would take for what is published"
                raise self.access.invalid(self.name, why, "Write a repository of its own.")

    def _has_tag(self, digest: str, files: Sequence[LocalFile], mark: str) -> bool:
        """Is the model there already? Raises TrainerError when the tag names something else."""
        if digest not in [tag.name for tag in self.api.list_repo_refs(self.name).tags]:
            return False
        named = [file for file in files if file.name not in ACCOUNTS]
        is_whole = mark in self.api.list_repo_files(self.name, revision=digest)
        if not is_whole or self._find_difference(digest, named) is not None:
            raise refuse_other_content(self.access, f"tag {digest} of {self.name}")
        return True

    def _commit(self, digest: str, files: Sequence[LocalFile], mark: str) -> None:
        is_card_kept = self._has_own_card()
        sent = [file for file in files if not (file.name == MODEL_CARD and is_card_kept)]
        operations = [CommitOperationAdd(file.name, str(file.path)) for file in sent]
        operations.append(CommitOperationAdd(mark, io.BytesIO(build_complete(digest, files))))
        commit = self.api.create_commit(self.name, operations, commit_message=f"Publish {digest}")
        different = self._find_difference(commit.oid, sent)
        if different is not None:
            # The tag alone says that the model is published; without it the commit is none.
            where = f"{self.access.field}.{self.access.source_field}"
            raise TrainerError(
                Reason.DESTINATION_UNAVAILABLE,
                ExitCode.UNAVAILABLE,
                f"{where}: {different.name} arrived in {self.name} with other content",
                "The commit was not tagged; the model is sent anew when the phase runs again.",
            )
        self.api.create_tag(self.name, tag=digest, revision=commit.oid, tag_message=f"Published {digest}")

    def _find_difference(self, revision: str, files: Sequence[LocalFile]) -> LocalFile | None:
        """Return the first file that the hub does not have as it left, by size and digest; None when all arrived."""
        siblings = self.api.model_info(self.name, revision=revision, files_metadata=True).siblings or []
        there = {sibling.rfilename: sibling for sibling in siblings}
        for file in files:
            found = there.get(file.name)
            if found is None or found.size != file.size:
                return file
            known, wanted = (found.lfs.sha256, file.sha256) if found.lfs else (found.blob_id, _hash_as_git(file))
            if known != wanted:
                return file
        return None

    def _has_own_card(self) -> bool:
        """Has the repository a model card that somebody wrote or edited?"""
        if not self.api.file_exists(self.name, MODEL_CARD):
            return False
        with tempfile.TemporaryDirectory() as folder:
            path = self.api.hf_hub_download(self.name, MODEL_CARD, local_dir=folder)
            text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
        if CARD_MARK in text:
            return False
        emit("the repository has a model card of its own, which is kept", repository=self.name)
        return True


def _hash_as_git(file: LocalFile) -> str:
    """Return the id under which Git keeps a file's content; of small files, the large ones go by SHA-256."""
    content = file.path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
