"""A single file behind an https:// URL, and the HTTP client that the hub's store shares."""

from __future__ import annotations

import os
import ssl
import urllib.parse
from typing import TYPE_CHECKING, Any

import httpx

from finetune_trainer.storage.access import Access, TemporaryError
from finetune_trainer.storage.base import Listing, RemoteFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from finetune_trainer.storage.location import Location

TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_TEMPORARY = {408, 425, 429, 500, 502, 503, 504}


def make_client() -> httpx.Client:
    """Return a client that follows redirects, and honours proxies and SSL_CERT_FILE."""
    return httpx.Client(follow_redirects=True, timeout=TIMEOUT)


def raise_for_status(response: httpx.Response, access: Access, what: str) -> None:
    """Raise what a status means for the job."""
    if response.status_code < 400:
        return
    status = f"HTTP {response.status_code}"
    if response.status_code in (401, 403, 407):
        raise access.refused(what, status)
    if response.status_code in (404, 410):
        raise access.not_found(what)
    if response.status_code in _TEMPORARY:
        raise TemporaryError(status)
    raise access.invalid(what, f"the server answered {status}", f"Check {access.field}.{access.source_field}.")


def explain_transport_error(error: httpx.HTTPError, access: Access, what: str) -> Exception:
    """Return what a failed connection means: a wrong certificate stays wrong, the rest may pass."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            hint = "Ask the administrator to add the CA to the operator's caBundle, or put it into the Secret."
            return access.invalid(what, f"its certificate is not trusted: {cause.verify_message}", hint)
        cause = cause.__cause__ or cause.__context__
    return TemporaryError(f"{type(error).__name__}: {error}")


def stream_url(
    url: str, headers: Mapping[str, str], access: Access, what: str, span: tuple[int, int | None] = (0, None)
) -> Iterator[bytes]:
    """Yield the bytes behind a URL; `span` is where to start, and how many to read or None for all."""
    start, length = span
    wanted = dict(headers)
    if start or length is not None:
        wanted["Range"] = f"bytes={start}-{'' if length is None else start + length - 1}"
    # Compressed transfer would make sizes and ranges speak of other bytes than the file's.
    wanted["Accept-Encoding"] = "identity"
    try:
        with make_client() as client, client.stream("GET", url, headers=wanted) as response:
            if response.status_code == 416:
                return
            raise_for_status(response, access, what)
            skip = start if response.status_code != 206 else 0
            # As they arrive: a chunk that is being collected would be lost with the connection.
            yield from _cut(response.iter_raw(), skip, length)
    except httpx.InvalidURL as error:
        raise access.invalid(what, f"no valid URL: {error}", "Write https://HOST/PATH.") from error
    except httpx.HTTPError as error:
        raise explain_transport_error(error, access, what) from error


def _cut(chunks: Iterator[bytes], skip: int, length: int | None) -> Iterator[bytes]:
    """Yield `length` bytes after the first `skip`, for servers that ignore ranges."""
    left = length
    for chunk in chunks:
        piece = chunk[skip:]
        skip = max(skip - len(chunk), 0)
        if left is not None:
            piece = piece[:left]
            left -= len(piece)
        if piece:
            yield piece
        if left == 0:
            return


class WebStore:
    """One file behind a URL."""

    def __init__(self, location: Location, revision: str, access: Access) -> None:
        self._location = location
        self._revision = revision
        self._access = access

    def list_files(self) -> Listing:
        headers = self._read_headers()
        name = os.path.basename(urllib.parse.urlparse(self._location.path).path) or "data"
        etag = headers.get("etag", "").removeprefix("W/").strip('"')
        modified = headers.get("last-modified", "")
        revision = f"etag:{etag}" if etag else f"modified:{modified}" if modified else ""
        if self._revision and revision != self._revision:
            raise self._access.not_found(
                f"revision {self._revision} of {self._location.text}",
                f"The file has changed since; remove {self._access.field}.revision, or name {revision!r}.",
            )
        size = int(headers.get("content-length") or -1)
        return Listing(revision, (RemoteFile(name, size, revision, key=self._location.path),))

    def stream(self, file: RemoteFile, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        return stream_url(file.key, {}, self._access, self._location.text, (start, length))

    def _read_headers(self) -> Mapping[str, Any]:
        what = self._location.text
        try:
            with make_client() as client:
                response = client.head(self._location.path, headers={"Accept-Encoding": "identity"})
                if response.status_code in (403, 405, 501):
                    # Signed URLs and simple servers may allow GET only.
                    with client.stream("GET", self._location.path, headers={"Accept-Encoding": "identity"}) as opened:
                        raise_for_status(opened, self._access, what)
                        return opened.headers
                raise_for_status(response, self._access, what)
                return response.headers
        except httpx.InvalidURL as error:
            raise self._access.invalid(what, f"no valid URL: {error}", "Write https://HOST/PATH.") from error
        except httpx.HTTPError as error:
            raise explain_transport_error(error, self._access, what) from error
