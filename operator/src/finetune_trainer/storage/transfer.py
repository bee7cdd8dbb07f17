"""Downloads that survive interruption: a partial file grows, is verified, and only then gets its name."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import threading
from typing import TYPE_CHECKING

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage import retry
from finetune_trainer.storage.access import Access, TemporaryError
from finetune_trainer.storage.local import LocalStore

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable, Sequence

    from finetune_trainer.storage.base import Listing, RemoteFile, Store

NUM_PARALLEL = 4
_CHUNK = 1 << 20


def list_with_retries(store: Store, access: Access, what: str) -> Listing:
    """Return a source's files, trying for a while when it does not answer."""
    return retry.call_with_retries(store.list_files, access, what)


def download_files(
    store: Store,
    files: Sequence[RemoteFile],
    folder: pathlib.Path,
    access: Access,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
    """Download files into a folder, several at a time; return the SHA-256 of each by name.

    A file that is there already with the right size is kept. `advance` is told of bytes as they are dealt with.
    """
    lock = threading.Lock()
    stop = threading.Event()

    def advance_locked(amount: int) -> None:
        if stop.is_set():
            raise _StoppedError
        with lock:
            advance(amount)

    with concurrent.futures.ThreadPoolExecutor(NUM_PARALLEL) as pool:
        waiting = {
            pool.submit(
                download_file, store, file, resolve_name(folder, file.name, access), access, advance_locked
            ): file
            for file in files
        }
        try:
            return {waiting[done].name: done.result() for done in concurrent.futures.as_completed(waiting)}
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class DamagedFileError(TrainerError):
    """What arrived is not what the source was said to hold."""


class _StoppedError(Exception):
    """Another file has failed for good."""


def resolve_name(folder: pathlib.Path, name: str, access: Access) -> pathlib.Path:
    """Return where a remote file goes; a name that would leave the folder is refused."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise access.invalid(name, "the file's name leaves the folder", "Remove that file from the source.")
    return path


def download_file(
    store: Store, file: RemoteFile, path: pathlib.Path, access: Access, advance: Callable[[int], None]
) -> str:
    """Download one file and return its SHA-256; carries on where an earlier try stopped."""
    if path.is_file() and path.stat().st_size == file.size:
        digest = hash_file(path)
        if digest == (file.sha256 or digest):
            advance(file.size)
            return digest
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(store, LocalStore) and store.link_file(file, path):
        advance(file.size)
        return hash_file(path)
    partial = _partial_path(path, file)
    attempts = retry.Attempts(access, f"{file.name} of {access.field}", retry.DEFAULT)
    if partial.exists():
        advance(min(partial.stat().st_size, max(file.size, 0)))
    while True:
        try:
            _append(store, file, partial, attempts, advance)
            digest = _verify(file, partial, access)
        except TemporaryError as error:
            attempts.wait_after(error)
            # Nothing more is done; this lets the caller end the download while the server is down.
            advance(0)
            continue
        partial.replace(path)
        return digest


def _partial_path(path: pathlib.Path, file: RemoteFile) -> pathlib.Path:
    # The version is part of the name, so that bytes of two versions never meet in one file.
    mark = hashlib.sha256(f"{file.version} {file.size}".encode()).hexdigest()[:12]
    for other in path.parent.glob(f".{path.name}.*.partial"):
        if other.name != f".{path.name}.{mark}.partial":
            other.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{mark}.partial")


def _append(
    store: Store, file: RemoteFile, partial: pathlib.Path, attempts: retry.Attempts, advance: Callable[[int], None]
) -> None:
    # Without a version there is no telling whether the rest belongs to the beginning.
    start = partial.stat().st_size if partial.exists() and file.version and file.size >= 0 else 0
    with open(partial, "r+b" if start else "wb") as out:
        out.seek(start)
        if file.size < 0 or start < file.size:
            for chunk in store.stream(file, start):
                out.write(chunk)
                attempts.note_progress()
                advance(len(chunk))
        out.truncate()
        out.flush()
        os.fsync(out.fileno())


def _verify(file: RemoteFile, partial: pathlib.Path, access: Access) -> str:
    size = partial.stat().st_size
    if 0 <= size < file.size:
        raise TemporaryError(f"the connection ended after {size} of {file.size} bytes")
    digest = hash_file(partial)
    wrong_size = file.size >= 0 and size != file.size
    if wrong_size or (file.sha256 and digest != file.sha256):
        partial.unlink()
        found = f"{size} bytes" if wrong_size else f"SHA-256 {digest}"
        wanted = f"{file.size} bytes" if wrong_size else f"SHA-256 {file.sha256}"
        raise DamagedFileError(
            Reason.SOURCE_UNAVAILABLE,
            ExitCode.UNAVAILABLE,
            f"{access.field}.{access.source_field}: {file.name} arrived with {found}, expected {wanted}",
            "The file is damaged at its source or on its way; it is downloaded anew when the phase runs again.",
        )
    return digest


def hash_file(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
