"""A repository on the Hugging Face Hub, or on any server that speaks its protocol (`HF_ENDPOINT`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx2
import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils._headers import build_hf_headers

from finetune_trainer.storage.access import Access, TemporaryError
from finetune_trainer.storage.base import Listing, RemoteFile
from finetune_trainer.storage.web import stream_url

if TYPE_CHECKING:
    from collections.abc import Iterator

    from finetune_trainer.storage.location import Location

_TIMEOUT_SECONDS = 30.0

HUB_ERRORS = (httpx2.HTTPError, OSError, hub_errors.HFValidationError)
"""What the client raises for answers and connections; anything else is a fault of ours."""


def make_api(access: Access) -> huggingface_hub.HfApi:
    """Return a client with the job's token and endpoint, and never with a token left on the machine."""
    credentials = access.read_credentials()
    return huggingface_hub.HfApi(
        endpoint=credentials.get("HF_ENDPOINT"), token=credentials.get("HF_TOKEN") or False, library_name="finetune"
    )


def explain_hub_error(error: Exception, access: Access, what: str) -> Exception:
    """Return what an error of the client means for the job."""
    if isinstance(error, hub_errors.GatedRepoError):
        return access.refused(what, "it is gated, and the token's account has not been granted access")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return access.not_found(f"the revision of {what}", f"Check {access.field}.revision.")
    if isinstance(error, hub_errors.RepositoryNotFoundError) and status == 401:
        return access.refused(what, "it is private or does not exist")
    if isinstance(error, hub_errors.HFValidationError):
        return access.invalid(what, str(error).splitlines()[0], "Write hf://OWNER/NAME.")
    if isinstance(error, hub_errors.EntryNotFoundError) or status == 404:
        return access.not_found(what)
    if status in (401, 403):
        return access.refused(what, f"HTTP {status}")
    text = (str(error).strip().splitlines() or [""])[0]
    return TemporaryError(f"{type(error).__name__}: {text}")


class HubStore:
    """The files of one repository at one commit."""

    def __init__(self, location: Location, revision: str, access: Access) -> None:
        self._location = location
        self._revision = revision
        self._access = access
        self._repo_type = "dataset" if access.kind == "dataset" else "model"
        self._api = make_api(access)
        self._commit = ""

    def list_files(self) -> Listing:
        try:
            info = self._api.repo_info(
                self._location.container,
                revision=self._revision or None,
                repo_type=self._repo_type,
                files_metadata=True,
                timeout=_TIMEOUT_SECONDS,
            )
        except HUB_ERRORS as error:
            raise explain_hub_error(error, self._access, self._location.text) from error
        self._commit = str(info.sha)
        siblings: list[Any] = getattr(info, "siblings", None) or []
        files = tuple(self._describe(sibling) for sibling in siblings if self._is_wanted(sibling.rfilename))
        if not files:
            raise self._access.not_found(self._location.text)
        return Listing(self._commit, files)

    def stream(self, file: RemoteFile, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        commit, _, path = file.key.partition("/")
        url = huggingface_hub.hf_hub_url(
            self._location.container,
            path,
            repo_type=self._repo_type,
            revision=commit,
            endpoint=self._api.endpoint,
        )
        headers = build_hf_headers(token=self._api.token, library_name="finetune")
        return stream_url(url, headers, self._access, f"{self._location.text} ({path})", (start, length))

    def _is_wanted(self, name: str) -> bool:
        wanted = self._location.path.rstrip("/")
        return not wanted or name == wanted or name.startswith(f"{wanted}/")

    def _describe(self, sibling: Any) -> RemoteFile:
        wanted = self._location.path.rstrip("/")
        name = sibling.rfilename
        shown = name.rpartition("/")[2] if name == wanted else name.removeprefix(f"{wanted}/" if wanted else "")
        lfs = sibling.lfs
        return RemoteFile(
            name=shown,
            size=-1 if sibling.size is None else int(sibling.size),
            version=str(sibling.blob_id or ""),
            sha256=str(lfs.sha256) if lfs is not None else "",
            key=f"{self._commit}/{name}",
        )
