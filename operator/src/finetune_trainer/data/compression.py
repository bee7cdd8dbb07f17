"""Streams of plain bytes out of files that may be compressed, in bounded memory whatever the file declares.

What a file is follows from its first bytes, not from its name.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable

    from _typeshed import WriteableBuffer

BOMB_BYTES = 1 << 30
BOMB_RATIO = 200
"""Text shrinks to a tenth; what unpacks to more than BOMB_BYTES and BOMB_RATIO times its size is refused."""

MAX_WINDOW_BYTES = 192 << 20
"""Memory that unpacking xz may take; the highest preset needs 65 MiB. Zstandard's own limit is 128 MiB."""

_BLOCK = 1 << 18
_NO_ROWS = {
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"Rar!": "a rar archive; unpack it first",
    b"\x00\x00\xfe\xff": "encoded as UTF-32; save it as UTF-8",
    b"\xff\xfe": "encoded as UTF-16; save it as UTF-8",
    b"\xfe\xff": "encoded as UTF-16; save it as UTF-8",
    b"ARROW1": "an Arrow file; save it as Parquet or JSON Lines",
    b"\x89HDF": "an HDF5 file; save it as Parquet or JSON Lines",
}
_TAR_MAGIC = (257, b"ustar")


class UnreadableFileError(Exception):
    """The file cannot be parsed from some place on."""

    def __init__(self, path: pathlib.Path, line: int, why: str) -> None:
        super().__init__(path, line, why)
        self.place = f", line {line}" if line else ""
        self.why = why

    def __str__(self) -> str:
        return f"{self.args[0].name}{self.place}: {self.why}"


class PlainStream(io.RawIOBase):
    """The plain bytes of one file. Damage and bombs raise UnreadableFileError."""

    def __init__(self, path: pathlib.Path, raw: BinaryIO) -> None:
        self._path = path
        self._raw = raw
        start = raw.read(8)
        raw.seek(0)
        opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)
        self._is_packed = opener is not None
        self._source: BinaryIO = raw if opener is None else opener(raw)
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        if not self._is_packed and self._num_bytes:
            return self._raw.readinto(view)  # type: ignore[attr-defined, no-any-return]
        try:
            data = self._source.read(min(len(view), _BLOCK))
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            # Only what is packed can be damaged; a disk that fails is no fault of the file's.
            if not self._is_packed or getattr(error, "errno", None):
                raise
            why = str(error).partition(" Detail: ")[0]
            raise UnreadableFileError(self._path, 0, f"its compressed data is damaged: {why}") from error
        if not self._num_bytes:
            self._refuse_what_holds_no_rows(data)
        self._num_bytes += len(data)
        self._refuse_bomb()
        view[: len(data)] = data
        return len(data)

    def _refuse_what_holds_no_rows(self, data: bytes) -> None:
        why = next((why for magic, why in _NO_ROWS.items() if data.startswith(magic)), "")
        offset, magic = _TAR_MAGIC
        if data[offset : offset + len(magic)] == magic:
            why = "a tar archive; unpack it first"
        if why:
            raise UnreadableFileError(self._path, 0, why)

    def _refuse_bomb(self) -> None:
        if self._is_packed and self._num_bytes > BOMB_BYTES and self._num_bytes > BOMB_RATIO * self._raw.tell():
            why = f"it unpacks to more than {BOMB_RATIO} times its size; if that is meant, unpack it first"
            raise UnreadableFileError(self._path, 0, why)


class _XzReader:
    """Unpacks xz within MAX_WINDOW_BYTES, which Python's own reader cannot be told."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._decoder = self._make_decoder()

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes; none at the end. Raises LZMAError, EOFError."""
        while True:
            packed = b""
            if self._decoder.eof:
                packed = self._skip_padding(self._decoder.unused_data)
                if not packed:
                    return b""
                self._decoder = self._make_decoder()
            elif self._decoder.needs_input:
                packed = self._raw.read(_BLOCK)
                if not packed:
                    raise EOFError("it ends in the middle")
            data = self._decoder.decompress(packed, size)
            if data:
                return data

    def _skip_padding(self, packed: bytes) -> bytes:
        """Return the beginning of the next stream, which may follow one with zeros between them."""
        while not (packed := packed.lstrip(b"\0")):
            packed = self._raw.read(_BLOCK)
            if not packed:
                break
        return packed

    @staticmethod
    def _make_decoder() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_WINDOW_BYTES)


def _open_zstd(raw: BinaryIO) -> BinaryIO:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")  # type: ignore[no-any-return]


_OPENERS: dict[bytes, Callable[[BinaryIO], BinaryIO]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),  # type: ignore[dict-item, return-value]
    b"BZh": bz2.BZ2File,  # type: ignore[dict-item]
    b"\xfd7zXZ\x00": _XzReader,  # type: ignore[dict-item]
    b"\x28\xb5\x2f\xfd": _open_zstd,
}
