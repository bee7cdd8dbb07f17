"""Raw rows out of files: JSON arrays, JSON Lines and Parquet, plain or compressed, one row at a time.

What a file is follows from its first bytes, not from its name. Rows stream: memory is bounded by the longest row
(`MAX_ROW_BYTES`), never by the file. A row that cannot be read is yielded as `BadRow`, so that the caller decides
whether it ends the run; a file that cannot be read any further raises `UnreadableFileError`.
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import zlib
from typing import TYPE_CHECKING, Any, BinaryIO, cast

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterator

MAX_ROW_BYTES = 32 * 1024 * 1024
"""A longer row is bad: no instruction is that long, and memory has to be bounded by something."""

_CHUNK_CHARS = 1 << 16
_SPACE = " \t\r\n"
_DECOMPRESSORS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_DECOMPRESSION_ERRORS = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
_PARQUET_MAGIC = b"PAR1"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_NESTED_TOO_DEEPLY = "nested too deeply"


@dataclasses.dataclass(frozen=True)
class Row:
    """One parsed row."""

    line: int
    """Line on which it begins, from 1; in Parquet its number, from 1."""
    value: Any


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    line: int
    why: str


class UnreadableFileError(Exception):
    """The file cannot be parsed from some place on."""

    def __init__(self, path: pathlib.Path, line: int, why: str) -> None:
        self.place = f", line {line}" if line else ""
        self.why = why
        super().__init__(f"{path.name}{self.place}: {why}")


class RowFile:
    """One file of rows. Iterate once; `share` says how far the reading is."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._size = max(path.stat().st_size, 1)
        self._raw: BinaryIO | None = None
        self._parquet_share = 0.0

    @property
    def share(self) -> float:
        """The part of the file that has been read, from 0 to 1."""
        return self._parquet_share if self._raw is None else min(self._raw.tell() / self._size, 1.0)

    def __iter__(self) -> Iterator[Row | BadRow]:
        """Yield the rows in order. Raises UnreadableFileError."""
        with open(self._path, "rb") as raw:
            start = raw.read(8)
            raw.seek(0)
            if start.startswith(_PARQUET_MAGIC):
                yield from self._list_parquet_rows()
                return
            if start.startswith(_ZSTD_MAGIC):
                raise UnreadableFileError(self._path, 0, "compressed with Zstandard; use gzip, bzip2 or xz")
            self._raw = raw
            try:
                yield from _list_text_rows(self._path, _open_stream(raw, start))
            except _DECOMPRESSION_ERRORS as error:
                raise UnreadableFileError(self._path, 0, f"its compressed data is damaged: {error}") from error
            finally:
                self._raw, self._parquet_share = None, 1.0

    def _list_parquet_rows(self) -> Iterator[Row | BadRow]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(self._path)
            total = max(file.metadata.num_rows, 1)
            line = 0
            for batch in file.iter_batches(batch_size=512):
                for value in batch.to_pylist():
                    line += 1
                    yield Row(line, value)
                self._parquet_share = line / total
        except (pa.ArrowException, OSError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise UnreadableFileError(self._path, 0, f"not readable as Parquet: {why}") from error


def _open_stream(raw: BinaryIO, start: bytes) -> io.BufferedReader:
    for magic, opener in _DECOMPRESSORS.items():
        if start.startswith(magic):
            return io.BufferedReader(opener(raw, "rb"), 1 << 20)
    return cast("io.BufferedReader", raw)


def _list_text_rows(path: pathlib.Path, stream: io.BufferedReader) -> Iterator[Row | BadRow]:
    first = _first_character(stream)
    if first == b"[":
        yield from _ArrayReader(path, stream).list_elements()
    elif first:
        yield from _list_line_rows(stream)


def _first_character(stream: io.BufferedReader) -> bytes:
    """Skip a byte-order mark, and return the first byte that is no space without consuming it."""
    if stream.peek(3)[:3] == b"\xef\xbb\xbf":
        stream.read(3)
    while ahead := stream.peek(1):
        stripped = ahead.lstrip()
        if stripped:
            return stripped[:1]
        # Newlines before the first row are rare enough to lose from the count only when they fill a whole buffer.
        stream.read(len(ahead))
    return b""


def _list_line_rows(stream: io.BufferedReader) -> Iterator[Row | BadRow]:
    line = 0
    while raw := stream.readline(MAX_ROW_BYTES + 1):
        line += 1
        if len(raw) > MAX_ROW_BYTES:
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(MAX_ROW_BYTES)
            yield BadRow(line, f"longer than {MAX_ROW_BYTES} bytes")
        elif raw.strip():
            yield _parse_line(line, raw)


def _parse_line(line: int, raw: bytes) -> Row | BadRow:
    try:
        value = json.loads(raw.decode("utf-8"))
        if isinstance(value, str):
            # Some tools encode each line twice.
            value = json.loads(value)
    except UnicodeDecodeError as error:
        return BadRow(line, f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return BadRow(line, f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return BadRow(line, _NESTED_TOO_DEEPLY)
    except ValueError as error:
        return BadRow(line, f"not JSON: {error}")
    return Row(line, value)


class _ArrayReader:
    """Reads the elements of one JSON array from a stream of text, a buffer at a time."""

    def __init__(self, path: pathlib.Path, stream: io.BufferedReader) -> None:
        self._path = path
        self._text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._position = 0
        self._line = 1
        self._ended = False

    def list_elements(self) -> Iterator[Row]:
        self._expect("[")
        if self._next_character() == "]":
            self._position += 1
        else:
            while True:
                self._next_character()
                line = self._line
                yield Row(line, self._read_element())
                separator = self._next_character()
                if separator not in (",", "]"):
                    raise self._error("expected a comma or the end of the array")
                self._position += 1
                if separator == "]":
                    break
        if self._next_character():
            raise self._error("text after the end of the array")

    def _read_element(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                incomplete = error.msg.startswith("Unterminated string") or error.pos >= len(self._buffer) - 8
                if self._ended or not incomplete:
                    self._consume(min(error.pos, len(self._buffer)))
                    raise self._error(error.msg) from error
            except RecursionError:
                raise self._error(_NESTED_TOO_DEEPLY) from None
            else:
                # A number at the very end of the buffer may go on.
                if end < len(self._buffer) or self._ended:
                    self._consume(end)
                    return value
            if len(self._buffer) - self._position > MAX_ROW_BYTES:
                raise self._error(f"a row is longer than {MAX_ROW_BYTES} characters")
            # Doubling keeps the cost of parsing one long row again and again linear in its length.
            self._fill(max(_CHUNK_CHARS, len(self._buffer) - self._position))

    def _next_character(self) -> str:
        while True:
            while self._position < len(self._buffer):
                character = self._buffer[self._position]
                if character not in _SPACE:
                    return character
                self._line += character == "\n"
                self._position += 1
            if self._ended:
                return ""
            self._fill(_CHUNK_CHARS)

    def _expect(self, wanted: str) -> None:
        if self._next_character() != wanted:
            raise self._error(f"expected {wanted}")
        self._position += 1

    def _consume(self, end: int) -> None:
        self._line += self._buffer.count("\n", self._position, end)
        self._position = end

    def _fill(self, size: int) -> None:
        try:
            more = self._text.read(size)
        except UnicodeDecodeError as error:
            raise self._error("not UTF-8 at or soon after this line") from error
        self._ended = not more
        self._buffer = self._buffer[self._position :] + more
        self._position = 0

    def _error(self, why: str) -> UnreadableFileError:
        return UnreadableFileError(self._path, self._line, why)
