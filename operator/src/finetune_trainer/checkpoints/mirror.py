"""The copy of a run's checkpoints in object storage: which to send, which to delete there, how one is fetched back.

The mirror process (`training.mirroring`) sends, the start of an attempt fetches. A checkpoint counts there as it does
on the workspace: from the moment its manifest is in place, which is written last and deleted first.

The place is `<destination>/<namespace>/<name>/<run>/checkpoint-<step>/`. `<run>` is a digest of what decides what the
model becomes: data, base model, settings. So a job that is made again under the same name finds its checkpoints, and
one with other data finds none of them and overwrites none; the manifests carry the same facts and are compared too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from finetune_contract.reports import ExitCode
from finetune_contract.run_config import RunConfig
from finetune_trainer.checkpoints import disk, retention
from finetune_trainer.checkpoints.identity import RUN
from finetune_trainer.checkpoints.layout import (
    MANIFEST,
    Folder,
    checkpoint_name,
    is_being_deleted,
    list_folders,
    parse_step,
)
from finetune_trainer.checkpoints.manifest import (
    Manifest,
    ManifestError,
    parse,
    read_manifest,
    sync_folder,
    to_text,
    write_manifest,
)
from finetune_trainer.checkpoints.resume import choose_resume, move_to_quarantine, observe_checkpoints
from finetune_trainer.errors import TrainerError
from finetune_trainer.reporting import emit, emit_warning
from finetune_trainer.storage.access import Access
from finetune_trainer.storage.base import RemoteFile
from finetune_trainer.storage.location import parse_location
from finetune_trainer.storage.publish import LocalFile
from finetune_trainer.storage.retry import RetryPolicy, call_with_retries
from finetune_trainer.storage.s3 import S3Store
from finetune_trainer.storage.s3_upload import S3Folder
from finetune_trainer.storage.transfer import DamagedFileError, download_files

RESTORING = "finetune-restoring"
"""Lies in a folder while it is filled from the mirror; holds the digest of the manifest that it will get."""
PART_BYTES = 16 * 1024 * 1024
"""Small parts: the mirror process holds a handful of them in memory, beside the ranks."""
LOST_WORKSPACE = RetryPolicy(patience_seconds=300.0)
"""How long the mirror may fail to answer where only it can hold the checkpoints."""
SPARE = RetryPolicy(patience_seconds=10.0)
"""How long where the workspace has one to go on from."""


@dataclasses.dataclass(frozen=True)
class Copy:
    """What the mirror holds of one checkpoint."""

    step: int
    manifest: Manifest | None
    """None: it has not been sent completely, or the manifest is damaged."""
    files: Mapping[str, RemoteFile]
    """By path relative to the checkpoint, the manifest included."""


class DamagedCopyError(Exception):
    """A copy is not what its manifest says."""


class CheckpointGoneError(Exception):
    """The checkpoint was deleted from the workspace while it was sent."""


def read_own(root: pathlib.Path, identity: Mapping[str, str]) -> dict[int, Manifest]:
    """Read the manifests of the committed checkpoints of this run below `root`, by step."""
    found = {}
    for folder in list_folders(root):
        manifest = None if is_being_deleted(folder.path) else _read_quietly(folder.path)
        if manifest is not None and manifest.step == folder.step and manifest.extra.get(RUN) == identity:
            found[folder.step] = manifest
    return found


def _read_quietly(folder: pathlib.Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except ManifestError:
        return None


def select_upload(
    local: Sequence[retention.Committed],
    mirrored: Sequence[retention.Committed],
    sent: Collection[int],
    limits: retention.Limits,
) -> int | None:
    """Return the step to send next: the newest, then the best ones; None when they are all there.

    `sent` are the steps whose copy is the local checkpoint itself. What came between the last one sent and the newest
    is left out: a slow mirror must not fall further behind with every checkpoint.
    """
    if not local:
        return None
    newest = max(each.step for each in local)
    every = {each.step: each for each in (*mirrored, *local)}
    surplus = retention.select_surplus(list(every.values()), dataclasses.replace(limits, latest=1))
    wanted = {newest} | (set(every) - set(surplus))
    waiting = [each.step for each in local if each.step in wanted and each.step not in sent]
    return max(waiting, default=None)


def list_committed(manifests: Iterable[Manifest], metric: str) -> list[retention.Committed]:
    """Return manifests as retention sees them."""
    return [retention.Committed(each.step, each.metrics.get(metric), each.num_bytes) for each in manifests]


class Mirror:
    """The mirror of one run. Methods raise TrainerError for good, TemporaryError for now."""

    def __init__(self, run: RunConfig, identity: Mapping[str, str]) -> None:
        self.identity = dict(identity)
        destination = run.checkpoint.mirror
        self.access = Access("spec.checkpoint.mirror", "destination", destination.secret_prefix, "destination")
        self._location = parse_location(destination.destination, self.access)
        if self._location.scheme != "s3":
            hint = "Write s3://, a bucket and a prefix, as in s3://bucket/checkpoints."
            raise self.access.invalid(destination.destination, "checkpoints are mirrored to S3 only", hint)
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        name = "/".join(part for part in (run.job.namespace, run.job.name, digest) if part)
        self._folder = S3Folder(self._location, name, self.access, PART_BYTES)
        self.url = self._folder.url
        """Where the checkpoints of this run are found."""

    def list_copies(self) -> list[Copy]:
        """Return the checkpoints of this run, oldest first, incomplete ones included."""
        steps: dict[int, dict[str, RemoteFile]] = {}
        for file in self._folder.list_files():
            folder, _, name = file.name.partition("/")
            step = parse_step(folder)
            if step is not None and name:
                steps.setdefault(step, {})[name] = file
        copies = [
            Copy(step, self._read_manifest(step) if MANIFEST in steps[step] else None, steps[step]) for step in steps
        ]
        # What somebody put here from another run is left alone.
        ours = [copy for copy in copies if copy.manifest is None or copy.manifest.extra.get(RUN) == self.identity]
        return sorted(ours, key=lambda copy: copy.step)

    def _read_manifest(self, step: int) -> Manifest | None:
        content = self._folder.read(f"{checkpoint_name(step)}/{MANIFEST}")
        try:
            manifest = parse((content or b"").decode())
        except (ManifestError, UnicodeDecodeError):
            return None
        return manifest if manifest.step == step else None

    def send(self, folder: pathlib.Path, manifest: Manifest, fence: Callable[[], None]) -> int:
        """Send a committed checkpoint, its manifest last; return the bytes that had to be sent.

        `fence` raises when the workspace has a newer owner. Raises CheckpointGoneError when the checkpoint is deleted
        meanwhile.
        """
        num_sent = 0
        for name, entry in sorted(manifest.files.items()):
            _require_there(folder, manifest)
            fence()
            file = LocalFile(folder / name, f"{folder.name}/{name}", entry.size, entry.sha256)
            if self._folder.read_digest(file.name) == (entry.size, entry.sha256):
                continue
            try:
                self._folder.upload(file)
            except Exception:
                # A file that cannot be read because its checkpoint is being deleted is no failure.
                _require_there(folder, manifest)
                raise
            num_sent += entry.size
        _require_there(folder, manifest)
        fence()
        self._folder.write(f"{folder.name}/{MANIFEST}", to_text(manifest).encode())
        return num_sent

    def withdraw(self, copy: Copy, fence: Callable[[], None]) -> None:
        """Make a copy incomplete, before it is overwritten or deleted."""
        if MANIFEST in copy.files:
            fence()
            self._folder.delete(f"{checkpoint_name(copy.step)}/{MANIFEST}")

    def delete(self, copy: Copy, fence: Callable[[], None]) -> None:
        """Delete a copy, its manifest first."""
        self.withdraw(copy, fence)
        for name in sorted(copy.files):
            fence()
            self._folder.delete(f"{checkpoint_name(copy.step)}/{name}")

    def abort_uploads(self) -> None:
        """Remove what uploads that were killed have left behind."""
        self._folder.abort_uploads()

    def fetch(self, copy: Copy, root: pathlib.Path) -> None:
        """Fetch a copy into `root`; every file is verified, and the manifest is written last.

        A fetch that was interrupted is carried on. Raises DamagedCopyError; what was fetched of such a copy is removed.
        """
        manifest = copy.manifest
        if manifest is None:
            raise DamagedCopyError("it has no manifest")
        folder = root / checkpoint_name(copy.step)
        _make_place(root, folder, manifest)
        try:
            download_files(S3Store(self._location, "", self.access), _list_wanted(copy, manifest), folder, self.access)
        except TrainerError as error:
            if not isinstance(error, DamagedFileError) and error.exit_code != ExitCode.NO_INPUT:
                raise
            retention.delete_checkpoint(folder)
            raise DamagedCopyError(error.message) from error
        except DamagedCopyError:
            retention.delete_checkpoint(folder)
            raise
        for parent in {(folder / name).parent for name in manifest.files}:
            sync_folder(parent)
        (folder / RESTORING).unlink(missing_ok=True)
        write_manifest(folder, manifest)


def _require_there(folder: pathlib.Path, manifest: Manifest) -> None:
    if is_being_deleted(folder) or _read_quietly(folder) != manifest:
        raise CheckpointGoneError(folder.name)


def _list_wanted(copy: Copy, manifest: Manifest) -> list[RemoteFile]:
    wanted = []
    for name, entry in manifest.files.items():
        found = copy.files.get(name)
        if found is None or found.size != entry.size:
            size = "is missing" if found is None else f"has {found.size} bytes, not {entry.size}"
            raise DamagedCopyError(f"{name} {size}")
        wanted.append(dataclasses.replace(found, name=name, sha256=entry.sha256))
    return wanted


def _make_place(root: pathlib.Path, folder: pathlib.Path, manifest: Manifest) -> None:
    """Make the folder to fetch into; what lies there and is not an earlier fetch of the same copy is set aside."""
    digest = hashlib.sha256(to_text(manifest).encode()).hexdigest()
    mark = folder / RESTORING
    if folder.exists() and not (mark.is_file() and mark.read_text() == digest):
        move_to_quarantine(root, Folder(manifest.step, folder))
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    root.mkdir(parents=True, exist_ok=True)
    disk.require_room(root, max(manifest.num_bytes - there, 0))
    folder.mkdir(exist_ok=True)
    mark.write_text(digest)


def restore_newest(mirror: Mirror, root: pathlib.Path) -> int | None:
    """Fetch the newest whole checkpoint of the mirror when it is newer than the workspace's; return its step.

    A damaged copy is passed over for an older one. A mirror that does not answer is an error only where the workspace
    has no checkpoint: training would begin anew, although the mirror may hold days of work.
    """
    newest = choose_resume(observe_checkpoints(root))
    policy = LOST_WORKSPACE if newest is None else SPARE
    try:
        copies = call_with_retries(mirror.list_copies, mirror.access, mirror.url, policy)
        candidates = [
            copy for copy in copies if copy.manifest is not None and (newest is None or copy.step > newest.step)
        ]
        return _fetch_first_whole(mirror, root, candidates[::-1])
    except TrainerError as error:
        if newest is None or error.exit_code == ExitCode.STORAGE_FULL:
            raise
        emit_warning("the mirror cannot be read; going on from the workspace", mirror=mirror.url, why=error.message)
        return None


def _fetch_first_whole(mirror: Mirror, root: pathlib.Path, copies: Sequence[Copy]) -> int | None:
    for copy in copies:
        name = checkpoint_name(copy.step)
        emit("fetching a checkpoint from the mirror", checkpoint=name, mirror=mirror.url)
        try:
            mirror.fetch(copy, root)
        except DamagedCopyError as error:
            emit_warning("a copy on the mirror is damaged; trying an older one", checkpoint=name, problem=str(error))
            continue
        emit("checkpoint fetched from the mirror", checkpoint=name)
        return copy.step
    return None
