"""Bringing a run's model and data onto this machine, and looking at them from afar.

`inspect` looks, `prepare` fetches. A model is there when `models/base.json` is, which is written last; what an
interrupted run has downloaded is used by the next. Called by the commands only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune_trainer.data.prepare import SourceFile, SourceRows
from finetune_trainer.model_files import ModelFacts, choose_model_files, read_model_facts
from finetune_trainer.reporting import emit, write_json
from finetune_trainer.storage import Access, Listing, RemoteFile, Store, open_store
from finetune_trainer.storage.base import read_bytes
from finetune_trainer.storage.local import LocalStore
from finetune_trainer.storage.retry import call_with_retries
from finetune_trainer.storage.transfer import download_files, hash_file, list_with_retries

if TYPE_CHECKING:
    from finetune_contract.run_config import DatasetConfig, JudgeConfig, RunConfig, Source
    from finetune_contract.workspace import Workspace

Advance = Callable[[int], None]
"""Told of bytes as they are dealt with."""

_DATA_FILE = re.compile(r".*\.(?:json|jsonl|ndjson|parquet)(?:\.(?:gz|bz2|xz|zst|zstd))?", re.IGNORECASE)
_NO_DATA = re.compile(r"(?:.*/)?(?:\..*|dataset_infos?\.json|dataset_dict\.json|state\.json|config\.json)")
_TRAIN_SPLIT = re.compile(r"(?:.*[/_.-])?train(?:[/_.-].*)?", re.IGNORECASE)
_SMALL_MODEL_FILES = re.compile(r"[^/]+\.(?:json|jinja|model|txt)")


def model_access(run: RunConfig) -> Access:
    """Return how the base model is opened."""
    return Access("spec.model", "model", run.model.secret_prefix)


def dataset_access(dataset: DatasetConfig, index: int) -> Access:
    """Return how one source of the data set is opened."""
    field = "spec.dataset" if len(dataset.sources) == 1 else f"spec.dataset.sources[{index}]"
    return Access(field, "dataset", dataset.sources[index].secret_prefix)


class RemoteModel:
    """A base model at its source."""

    def __init__(self, run: RunConfig, root: pathlib.Path, access: Access | None = None) -> None:
        self._source = run.model
        self._trust_remote_code = run.trust_remote_code
        self._access = access or model_access(run)
        self._store = open_store(run.model.source, run.model.revision, self._access, root)
        self._listing: Listing | None = None

    @property
    def revision(self) -> str:
        """What pins the model's files."""
        return self._list().revision

    def list_files(self) -> tuple[RemoteFile, ...]:
        """Return the files that make the model. Raises TrainerError when they do not."""
        return choose_model_files(self._list().files, self._access, self._trust_remote_code)

    def read_facts(self) -> ModelFacts:
        """Read the headers."""

        def read_range(file: RemoteFile, start: int, length: int) -> bytes:
            return call_with_retries(
                lambda: read_bytes(self._store, file, start, length), self._access, self._source.source
            )

        return read_model_facts(self.list_files(), read_range, self._access)

    def download(self, folder: pathlib.Path, files: Sequence[RemoteFile], advance: Advance) -> dict[str, str]:
        """Download some of the files; return their SHA-256 by name."""
        return download_files(self._store, files, folder, self._access, advance)

    def _list(self) -> Listing:
        if self._listing is None:
            self._listing = list_with_retries(self._store, self._access, self._source.source)
        return self._listing


class BaseModel:
    """The base model in the workspace: found there, or downloaded in two steps, small files first."""

    def __init__(self, run: RunConfig, workspace: Workspace) -> None:
        self._run = run
        self._workspace = workspace
        self._remote: RemoteModel | None = None
        self.manifest = _read_model_manifest(workspace, run.model)
        """Facts of the whole model; None until it is there."""

    @property
    def num_bytes(self) -> int:
        """Bytes that are yet to be dealt with."""
        if self.manifest is not None:
            return 0
        return sum(max(file.size, 0) for file in self._open_remote().list_files())

    def download_small_files(self) -> None:
        """Fetch configuration and tokenizer, so that the data can be counted before the weights arrive."""
        if self.manifest is None:
            self._clear_other_model()
            small = [file for file in self._open_remote().list_files() if _SMALL_MODEL_FILES.fullmatch(file.name)]
            # Counted when everything is downloaded: these are then found to be there.
            self._open_remote().download(self._workspace.base_model, small, lambda _: None)

    def download_rest(self, advance: Advance) -> dict[str, Any]:
        """Fetch what is missing, check that the model is whole, and return its manifest."""
        if self.manifest is not None:
            return self.manifest
        remote = self._open_remote()
        digests = remote.download(self._workspace.base_model, remote.list_files(), advance)
        self.manifest = self._write_manifest(digests)
        return self.manifest

    def _open_remote(self) -> RemoteModel:
        if self._remote is None:
            self._remote = RemoteModel(self._run, self._workspace.root)
        return self._remote

    def _clear_other_model(self) -> None:
        """Remove what was downloaded of another source or revision."""
        marker = self._workspace.base_model.with_name(".base-source.json")
        wanted = {"source": self._run.model.source, "revision": self._open_remote().revision}
        if _read_json(marker) != wanted and not self._is_own_source():
            shutil.rmtree(self._workspace.base_model, ignore_errors=True)
            self._workspace.base_model_manifest.unlink(missing_ok=True)
        self._workspace.base_model.mkdir(parents=True, exist_ok=True)
        write_json(marker, wanted)

    def _is_own_source(self) -> bool:
        """Whether the model is to be read from the very folder that it is to be put into."""
        scheme, _, path = self._run.model.source.partition("://")
        own = self._workspace.base_model
        return scheme == "pvc" and (self._workspace.root / path.strip("/")).resolve() == own.resolve()

    def _write_manifest(self, digests: Mapping[str, str]) -> dict[str, Any]:
        folder = self._workspace.base_model
        access = model_access(self._run)
        files = [_describe_local(folder, name) for name in sorted(digests)]
        facts = read_model_facts(files, _read_local, access)
        listed = [{"name": file.name, "size": file.size, "sha256": digests[file.name]} for file in files]
        content = json.dumps([[entry["name"], entry["sha256"]] for entry in listed]).encode()
        manifest = {
            "source": self._run.model.source,
            "revision": self._run.model.revision,
            "resolvedRevision": self._open_remote().revision,
            "digest": hashlib.sha256(content).hexdigest()[:32],
            "modelType": facts.model_type,
            "parameters": facts.num_parameters,
            "pickled": facts.is_pickled,
            "files": listed,
        }
        write_json(self._workspace.base_model_manifest, manifest)
        return manifest


def _describe_local(folder: pathlib.Path, name: str) -> RemoteFile:
    path = folder / name
    return RemoteFile(name, path.stat().st_size, key=str(path))


def _read_local(file: RemoteFile, start: int, length: int) -> bytes:
    with open(file.key, "rb") as opened:
        opened.seek(start)
        return opened.read(length)


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _read_model_manifest(workspace: Workspace, model: Source) -> dict[str, Any] | None:
    """Return the manifest of the model in the workspace, if it is this one and all its files are there."""
    manifest = _read_json(workspace.base_model_manifest)
    try:
        is_same = manifest["source"] == model.source and model.revision in (
            manifest["revision"],
            manifest["resolvedRevision"],
        )
        sizes = {entry["name"]: entry["size"] for entry in manifest["files"]}
        is_whole = all((workspace.base_model / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, KeyError, TypeError):
        return None
    return manifest if is_same and is_whole else None


@dataclasses.dataclass(frozen=True)
class RemoteRows:
    """One source of the data set."""

    source: Source
    access: Access
    store: Store
    revision: str
    files: tuple[RemoteFile, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the files, as far as it is known."""
        return sum(max(file.size, 0) for file in self.files)

    @property
    def is_local(self) -> bool:
        """Whether the files can be read where they are."""
        return isinstance(self.store, LocalStore)

    def describe_in_place(self) -> SourceRows:
        """Return the files of this machine where they are; nothing is copied."""
        paths = [(pathlib.Path(file.key), file.name) for file in self.files]
        return self._to_rows([SourceFile(path, name, hash_file(path)) for path, name in paths])

    def download(self, folder: pathlib.Path, advance: Advance) -> SourceRows:
        """Fetch the files."""
        digests = download_files(self.store, self.files, folder, self.access, advance)
        return self._to_rows([SourceFile(folder / file.name, file.name, digests[file.name]) for file in self.files])

    def _to_rows(self, files: Sequence[SourceFile]) -> SourceRows:
        return SourceRows(self.access.field, tuple(files), self.source.format, self.source.weight)


def list_remote_rows(dataset: DatasetConfig, root: pathlib.Path, index: int) -> RemoteRows:
    """Look up the files of one source."""
    source = dataset.sources[index]
    access = dataset_access(dataset, index)
    store = open_store(source.source, source.revision, access, root)
    listing = list_with_retries(store, access, source.source)
    files = choose_data_files(listing.files, access)
    emit("found the data", source=source.source, revision=listing.revision, files=len(files))
    return RemoteRows(source, access, store, listing.revision, files)


def choose_data_files(files: Sequence[RemoteFile], access: Access) -> tuple[RemoteFile, ...]:
    """Return the files that hold rows: the one there is, or those of the train split when names tell splits apart."""
    if len(files) == 1:
        return tuple(files)
    rows = [file for file in files if _DATA_FILE.fullmatch(file.name) and not _NO_DATA.fullmatch(file.name)]
    train = [file for file in rows if _TRAIN_SPLIT.fullmatch(file.name)]
    chosen = tuple(sorted(train or rows, key=lambda file: file.name))
    if not chosen:
        hint = f"Name the file in {access.field}.source, as in .../data.jsonl."
        raise access.not_found("a file of rows (.json, .jsonl or .parquet) in this place", hint)
    return chosen


def fetch_judge(
    judge: JudgeConfig, root: pathlib.Path, downloads: pathlib.Path, advance: Advance
) -> tuple[pathlib.Path, str]:
    """Return the folder of the judge's classifier on this machine, and a digest of its files. Raises TrainerError."""
    access, store, revision, files = _list_judge(judge, root)
    if isinstance(store, LocalStore):
        folder = pathlib.Path(files[0].key).parent
        digests = {file.name: hash_file(pathlib.Path(file.key)) for file in files}
    else:
        mark = hashlib.sha256(f"{judge.source} {revision}".encode()).hexdigest()[:12]
        folder = downloads / f"judge-{mark}"
        digests = download_files(store, files, folder, access, advance)
    emit("found the judge", source=judge.source, revision=revision, files=len(files))
    return folder, hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()[:32]


def measure_judge(judge: JudgeConfig, root: pathlib.Path) -> int:
    """Return the bytes that `fetch_judge` downloads; 0 for one that is read where it is. Raises TrainerError."""
    _, store, _, files = _list_judge(judge, root)
    return 0 if isinstance(store, LocalStore) else sum(max(file.size, 0) for file in files)


def _list_judge(judge: JudgeConfig, root: pathlib.Path) -> tuple[Access, Store, str, tuple[RemoteFile, ...]]:
    """Return how the judge is opened, from where, at which revision, and its files."""
    access = Access("spec.dataset.judge", "model", judge.secret_prefix)
    store = open_store(judge.source, judge.revision, access, root)
    listing = list_with_retries(store, access, judge.source)
    return access, store, listing.revision, choose_model_files(listing.files, access)
