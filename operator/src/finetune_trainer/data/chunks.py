"""Files of rows cut into chunks of raw bytes that any process can parse: JSON arrays, JSON Lines and Parquet.

One process cuts, which costs little, many parse (`rows`). Where a file is cut depends on its bytes alone. Memory is
bounded by the longest row (`MAX_ROW_BYTES`), never by the file. What makes a whole file unreadable from some place on
raises `UnreadableFileError`, after the rows before that place.
"""

from __future__ import annotations

import array
import dataclasses
import io
import re
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from finetune_trainer.data.compression import PlainStream, UnreadableFileError

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterator

MAX_ROW_BYTES = 8 << 20
"""A longer row is bad: no context is that long, and memory has to be bounded by something."""

CHUNK_BYTES = 1 << 19
_PARQUET_MAGIC = b"PAR1"
_BATCH_ROWS = 64
"""Rows of Parquet decoded at once: so many times the longest value is what memory has to hold."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A stretch of one file."""

    kind: Literal["lines", "elements", "table", "oversized"]
    """JSON lines; elements of an array at `spans`; an Arrow stream; or one row that is longer than MAX_ROW_BYTES."""
    line: int
    """Line on which it begins, from 1; in Parquet the number of its first row, from 1."""
    num_rows: int
    data: bytes = b""
    spans: array.array[int] | None = None
    """Start and end of each element in `data`, in turns."""


class ChunkReader:
    """One file of rows. Iterate once; `share` says how far the reading is."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._size = max(path.stat().st_size, 1)
        self._raw: BinaryIO | None = None
        self._share = 0.0

    @property
    def share(self) -> float:
        """The part of the file that has been read, from 0 to 1."""
        return self._share if self._raw is None else min(self._raw.tell() / self._size, 1.0)

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the chunks in order. Raises UnreadableFileError."""
        with open(self._path, "rb") as raw:
            if raw.read(4) == _PARQUET_MAGIC:
                yield from self._list_tables()
                return
            raw.seek(0)
            self._raw = raw
            try:
                yield from _list_text_chunks(self._path, io.BufferedReader(PlainStream(self._path, raw), CHUNK_BYTES))
            finally:
                self._raw, self._share = None, 1.0

    def _list_tables(self) -> Iterator[Chunk]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # Page after page: a row group can be as large as the file.
            file = pq.ParquetFile(self._path, buffer_size=CHUNK_BYTES, pre_buffer=False)
            _refuse_huge_rows(self._path, file.metadata)
            total = max(file.metadata.num_rows, 1)
            line = 1
            for pieces in _gather(file.iter_batches(batch_size=_BATCH_ROWS)):
                yield _pack_table(pieces, line)
                line += sum(piece.num_rows for piece in pieces)
                self._share = min(line / total, 1.0)
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise UnreadableFileError(self._path, 0, f"not readable as Parquet: {why}") from error


def _refuse_huge_rows(path: pathlib.Path, metadata: Any) -> None:
    """Refuse what would have to be read whole only to be found too long."""
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if group.total_byte_size > max(group.num_rows, 1) * MAX_ROW_BYTES:
            raise UnreadableFileError(path, 0, f"rows of row group {index} are longer than {MAX_ROW_BYTES} bytes")


def _gather(batches: Iterator[Any]) -> Iterator[list[Any]]:
    """Yield batches and pieces of batches that together make about a chunk; an overlong row comes alone."""
    gathered: list[Any] = []
    for batch in batches:
        for piece in _halve(_decode_dictionaries(batch)):
            if gathered and (_is_oversized(piece) or sum(one.nbytes for one in gathered) >= CHUNK_BYTES):
                yield gathered
                gathered = []
            gathered.append(piece)
            if _is_oversized(piece):
                yield gathered
                gathered = []
    if gathered:
        yield gathered


def _decode_dictionaries(batch: Any) -> Any:
    """Return the batch with plain columns: with each piece its whole dictionary would travel."""
    import pyarrow as pa

    columns = [column.dictionary_decode() if pa.types.is_dictionary(column.type) else column for column in batch]
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


def _halve(batch: Any) -> Iterator[Any]:
    """Yield a batch in pieces of bounded size; values that a dictionary repeats can be longer than the file says."""
    if batch.num_rows <= 1 or batch.nbytes <= 2 * CHUNK_BYTES:
        if batch.num_rows:
            yield batch
        return
    middle = batch.num_rows // 2
    yield from _halve(batch.slice(0, middle))
    yield from _halve(batch.slice(middle))


def _is_oversized(piece: Any) -> bool:
    return bool(piece.num_rows == 1 and piece.nbytes > MAX_ROW_BYTES)


def _pack_table(pieces: list[Any], line: int) -> Chunk:
    import pyarrow as pa

    if _is_oversized(pieces[0]):
        return Chunk("oversized", line, 1)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pieces[0].schema) as writer:
        for piece in pieces:
            writer.write_batch(piece)
    return Chunk("table", line, sum(piece.num_rows for piece in pieces), sink.getvalue().to_pybytes())


def _list_text_chunks(path: pathlib.Path, stream: io.BufferedReader) -> Iterator[Chunk]:
    line, first = _skip_to_first_character(stream)
    if first == b"[":
        yield from _ArraySplitter(path, stream, line).list_chunks()
    elif first:
        yield from _list_line_chunks(stream, line)


def _skip_to_first_character(stream: io.BufferedReader) -> tuple[int, bytes]:
    """Skip a byte-order mark and empty lines; return the line, and its first byte that is no space, unconsumed."""
    if stream.peek(3)[:3] == b"\xef\xbb\xbf":
        stream.read(3)
    line = 1
    while ahead := stream.peek(1):
        text = ahead.lstrip()
        line += ahead.count(b"\n", 0, len(ahead) - len(text))
        stream.read(len(ahead) - len(text))
        if text:
            return line, text[:1]
    return line, b""


def _list_line_chunks(stream: io.BufferedReader, line: int) -> Iterator[Chunk]:
    while data := stream.read(CHUNK_BYTES):
        if not data.endswith(b"\n"):
            data += _read_rest_of_line(stream, MAX_ROW_BYTES + 1)
        num_rows = sum(1 for text in data.split(b"\n") if text and not text.isspace())
        if num_rows:
            yield Chunk("lines", line, num_rows, data)
        line += data.count(b"\n")


def _read_rest_of_line(stream: io.BufferedReader, limit: int) -> bytes:
    """Return what is left of a line; of an overlong one only so much that it is seen to be overlong, and its end."""
    rest = stream.readline(limit)
    if len(rest) == limit and not rest.endswith(b"\n"):
        while (more := stream.readline(CHUNK_BYTES)) and not more.endswith(b"\n"):
            pass
        rest += b"\n" if more else b""
    return rest


_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
# Possessive throughout: a match takes time in proportion to its length, and no memory, whatever the text.
_WHOLE_STRING = re.compile(_STRING, re.DOTALL)
_FLAT_OBJECT = re.compile(rb'\{(?:[^"{}\[\]]++|' + _STRING + rb")*+\}", re.DOTALL)
_STRING_OR_BRACKET = re.compile(_STRING + rb'|[{}\[\]"]', re.DOTALL)
_SCALAR = re.compile(rb'[^,\]\[{}"\s]++')
_SPACE = re.compile(rb"[ \t\r\n]*+")


class _ArraySplitter:
    """Finds where the elements of one JSON array begin and end, without parsing them."""

    def __init__(self, path: pathlib.Path, stream: io.BufferedReader, line: int) -> None:
        self._path = path
        self._stream = stream
        self._buffer = b""
        self._position = 0
        self._line = line
        """Line on which the buffer begins."""
        self._ended = False

    def list_chunks(self) -> Iterator[Chunk]:
        """Yield all elements, also those before an error. Raises UnreadableFileError."""
        spans: array.array[int] = array.array("q")
        try:
            for start, end in self._list_elements():
                spans.extend((start, end))
                if end >= CHUNK_BYTES:
                    yield self._cut(spans)
                    spans = array.array("q")
        except UnreadableFileError:
            if spans:
                yield self._cut(spans)
            raise
        if spans:
            yield self._cut(spans)

    def _cut(self, spans: array.array[int]) -> Chunk:
        end = spans[-1]
        chunk = Chunk("elements", self._line, len(spans) // 2, self._buffer[:end], spans)
        self._line += chunk.data.count(b"\n")
        self._buffer = self._buffer[end:]
        self._position -= end
        return chunk

    def _list_elements(self) -> Iterator[tuple[int, int]]:
        """Yield where the next element lies in the buffer, which `_cut` may shorten meanwhile."""
        self._next_byte()
        self._position += 1
        separator = b"," if self._next_byte() != b"]" else b"]"
        self._position += separator == b"]"
        while separator == b",":
            self._next_byte()
            start, self._position = self._position, self._find_end()
            yield start, self._position
            separator = self._next_byte()
            if separator not in (b",", b"]"):
                raise self._error("expected a comma or the end of the array")
            self._position += 1
        if self._next_byte():
            raise self._error("text after the end of the array")

    def _find_end(self) -> int:
        start = self._position
        while True:
            end = _match_element(self._buffer, start)
            if (end or len(self._buffer)) - start > MAX_ROW_BYTES:
                raise self._error(f"a row is longer than {MAX_ROW_BYTES} bytes")
            # A number at the very end of the buffer may go on.
            if end is not None and (end < len(self._buffer) or self._ended):
                if end == start:
                    raise self._error("expected a value")
                return end
            if self._ended:
                raise self._error("the file ends in the middle of the array")
            # Doubling keeps the cost of looking at one long row again and again linear in its length.
            self._fill(max(CHUNK_BYTES, len(self._buffer) - start))

    def _next_byte(self) -> bytes:
        """Move to the next byte that is no space and return it; empty at the end of the file."""
        start = self._position
        while True:
            self._position = _SPACE.match(self._buffer, self._position).end()  # type: ignore[union-attr]
            if self._position < len(self._buffer) or self._ended:
                return self._buffer[self._position : self._position + 1]
            if self._position - start > MAX_ROW_BYTES:
                raise self._error(f"more than {MAX_ROW_BYTES} bytes of space")
            self._fill(CHUNK_BYTES)

    def _fill(self, size: int) -> None:
        more = self._stream.read(size)
        self._ended = not more
        self._buffer += more

    def _error(self, why: str) -> UnreadableFileError:
        line = self._line + self._buffer.count(b"\n", 0, self._position)
        return UnreadableFileError(self._path, line, why)


def _match_element(text: bytes, start: int) -> int | None:
    """Return where the JSON value ends that begins at `start`; None when the text ends first."""
    first = text[start : start + 1]
    if first == b"{":
        flat = _FLAT_OBJECT.match(text, start)
        return flat.end() if flat else _find_closing_bracket(text, start)
    if first == b"[":
        return _find_closing_bracket(text, start)
    if first == b'"':
        whole = _WHOLE_STRING.match(text, start)
        return whole.end() if whole else None
    scalar = _SCALAR.match(text, start)
    return scalar.end() if scalar else start if first else None


def _find_closing_bracket(text: bytes, start: int) -> int | None:
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text, start):
        kind = text[match.start()]
        if kind == 0x22:
            if match.end() - match.start() == 1:
                return None
        elif kind in b"{[":
            depth += 1
        else:
            depth -= 1
            if not depth:
                return match.end()
    return None
