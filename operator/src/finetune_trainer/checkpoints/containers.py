"""Whether one file of a checkpoint is whole, told from the file alone: torch's zip files, safetensors, JSON.

Used by the doctor where no manifest says what the file should be. Nothing is unpickled, nothing is loaded.
"""

from __future__ import annotations

import contextlib
import copy
import json
import pathlib
import zipfile
import zlib
from typing import IO, Any

from finetune_trainer.checkpoints.pickles import PickleError, list_imports, read_pickle
from finetune_trainer.safetensors_header import LENGTH_BYTES, Header, HeaderError, parse_header, parse_length

_ZIP_START = b"PK\x03\x04"
_OLD_TORCH_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""Pickled magic number of files from before torch 1.6: they carry no sizes, only their presence can be checked."""
_CHUNK = 1 << 20


class DamagedFileError(ValueError):
    """A file is not whole; the message says how one knows."""


def check_torch_file(path: pathlib.Path, full: bool) -> None:
    """Check a file of `torch.save`: its table of contents, and with `full` the checksum of every record.

    Raises DamagedFileError.
    """
    with path.open("rb") as file:
        start = file.read(len(_OLD_TORCH_START))
    if start == _OLD_TORCH_START:
        return
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            _check_records(archive, size)
            if full:
                _check_sums(archive)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
        if isinstance(error, DamagedFileError):
            raise
        raise DamagedFileError(_say_why(path, start, size)) from error


def _say_why(path: pathlib.Path, start: bytes, size: int) -> str:
    if start.startswith(_ZIP_START):
        return f"is truncated: it ends after {size} bytes, before torch.save's table of contents"
    if not start.strip(b"\0") and _is_all_zeros(path):
        return f"holds {size} zero bytes: its content never reached the disk"
    return "is no file that torch.save wrote"


def _is_all_zeros(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        return all(not chunk.strip(b"\0") for chunk in iter(lambda: file.read(_CHUNK), b""))


def _check_records(archive: zipfile.ZipFile, size: int) -> None:
    records = archive.infolist()
    if not any(record.filename.endswith("data.pkl") for record in records):
        raise DamagedFileError("is a zip file without data.pkl: torch.save did not write it")
    for record in records:
        if record.header_offset + record.compress_size > size:
            raise DamagedFileError(f"is truncated: record {record.filename} ends past its {size} bytes")


def _check_sums(archive: zipfile.ZipFile) -> None:
    for record in archive.infolist():
        try:
            with _open_record(archive, record) as stream:
                while stream.read(_CHUNK):
                    pass
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DamagedFileError(f"record {record.filename} is not what was saved (CRC-32 differs)") from error


def _open_record(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> IO[bytes]:
    """Open a record. One whose checksum is 0 has none: PyTorch leaves it out where it is told to, and so do we."""
    if not record.CRC:
        record = copy.copy(record)
        del record.CRC
    return archive.open(record)


def _read_record(archive: zipfile.ZipFile, name: str) -> bytes:
    with _open_record(archive, archive.getinfo(name)) as stream:
        return stream.read()


def read_torch_pickle(path: pathlib.Path) -> tuple[Any, dict[str, int]]:
    """Return what a torch file describes, as plain data, and the sizes of its storages by name.

    Raises DamagedFileError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
            if name is None:
                return None, {}
            folder = name.removesuffix("data.pkl") + "data/"
            sizes = {
                record.filename.removeprefix(folder): record.file_size
                for record in archive.infolist()
                if record.filename.startswith(folder)
            }
            return read_pickle(_read_record(archive, name)), sizes
    except (zipfile.BadZipFile, NotImplementedError, EOFError, PickleError, zlib.error) as error:
        raise DamagedFileError(f"cannot be read: {error}") from error


def read_imports(path: pathlib.Path) -> frozenset[str]:
    """Return what loading a torch file would import, each as "module attribute"."""
    with contextlib.suppress(zipfile.BadZipFile, PickleError), zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return frozenset().union(*(list_imports(_read_record(archive, name)) for name in names))
    return frozenset({"(unreadable) pickle"})


def read_safetensors_header(path: pathlib.Path) -> Header:
    """Read the header of a safetensors file and check it against the file's size. Raises DamagedFileError."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = parse_length(file.read(LENGTH_BYTES))
            text = file.read(length)
        if len(text) < length:
            raise DamagedFileError(f"is truncated: its {size} bytes end inside the header")
        header = parse_header(text)
    except HeaderError as error:
        raise DamagedFileError(f"is no whole safetensors file: {error}") from error
    if size < header.file_bytes:
        raise DamagedFileError(f"is truncated: it has {size} bytes, its header says {header.file_bytes}")
    if size > header.file_bytes or header.tensor_bytes > size:
        raise DamagedFileError(f"does not fit its header: it has {size} bytes, the header says {header.file_bytes}")
    return header


def read_through(path: pathlib.Path) -> None:
    """Read every byte of a file that has no checksum: a bad block shows as an OSError."""
    with path.open("rb") as file:
        while file.read(_CHUNK):
            pass


def read_json_object(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object. Raises DamagedFileError."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedFileError(f"is not whole JSON: {error}") from error
    if not isinstance(value, dict):
        raise DamagedFileError("is no JSON object")
    return value
