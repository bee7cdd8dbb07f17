"""Rows out of chunks of raw bytes: parsed, or found to be bad with a line and a reason.

`chunks` cuts files; this is what every worker does with a chunk. A row that cannot be read is a `BadRow`, so that the
caller decides whether it ends the run.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import orjson

from finetune_trainer.data import chunks
from finetune_trainer.data.chunks import ChunkReader
from finetune_trainer.data.compression import UnreadableFileError

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterator

    from finetune_trainer.data.chunks import Chunk

__all__ = ["BadRow", "Row", "UnreadableFileError", "list_rows", "parse_chunk"]

_NESTED_TOO_DEEPLY = "nested too deeply"


@dataclasses.dataclass(slots=True)
class Row:
    """One parsed row."""

    line: int
    """Line on which it begins, from 1; in Parquet its number, from 1."""
    value: Any


@dataclasses.dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used."""

    line: int
    why: str


def list_rows(path: pathlib.Path) -> Iterator[Row | BadRow]:
    """Yield the rows of a file in order. Raises UnreadableFileError."""
    for chunk in ChunkReader(path):
        yield from parse_chunk(chunk)


def parse_chunk(chunk: Chunk) -> Iterator[Row | BadRow]:
    """Yield the rows of a chunk, as many as it says."""
    if chunk.kind == "lines":
        return _parse_lines(chunk)
    if chunk.kind == "elements":
        return _parse_elements(chunk)
    if chunk.kind == "table":
        return _list_table_rows(chunk)
    return iter((_make_oversized_row(chunk.line),))


def _make_oversized_row(line: int) -> BadRow:
    return BadRow(line, f"longer than {chunks.MAX_ROW_BYTES} bytes")


def _parse_lines(chunk: Chunk) -> Iterator[Row | BadRow]:
    for line, text in enumerate(chunk.data.split(b"\n"), start=chunk.line):
        if not text or text.isspace():
            continue
        row = _parse(line, text)
        if isinstance(row, Row) and isinstance(row.value, str):
            # Some tools encode each line twice.
            row = _parse(line, row.value.encode("utf-8", "surrogatepass"))
        yield row


def _parse_elements(chunk: Chunk) -> Iterator[Row | BadRow]:
    spans, data = chunk.spans or (), chunk.data
    line, counted = chunk.line, 0
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        line += data.count(b"\n", counted, start)
        counted = start
        yield _parse(line, data[start:end])


def _parse(line: int, text: bytes) -> Row | BadRow:
    if len(text) > chunks.MAX_ROW_BYTES:
        return _make_oversized_row(line)
    try:
        return Row(line, orjson.loads(text))
    except orjson.JSONDecodeError as error:
        if error.msg.startswith("depth limit"):
            return BadRow(line, _NESTED_TOO_DEEPLY)
    # The standard library takes a little more, such as NaN, and explains better what is wrong.
    return _parse_slowly(line, text)


def _parse_slowly(line: int, text: bytes) -> Row | BadRow:
    try:
        return Row(line, json.loads(text.decode("utf-8", "strict")))
    except UnicodeDecodeError as error:
        return BadRow(line, f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return BadRow(line + error.lineno - 1, f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return BadRow(line, _NESTED_TOO_DEEPLY)
    except ValueError as error:
        return BadRow(line, f"not JSON: {str(error).partition(';')[0]}")


def _list_table_rows(chunk: Chunk) -> Iterator[Row | BadRow]:
    import pyarrow as pa

    table = pa.ipc.open_stream(chunk.data).read_all()
    try:
        values = table.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError):
        # A value that Python cannot hold spoils the whole table; one by one the others can be had.
        for index in range(table.num_rows):
            yield _read_table_row(table, index, chunk.line + index)
        return
    for line, value in enumerate(values, start=chunk.line):
        yield Row(line, value)


def _read_table_row(table: Any, index: int, line: int) -> Row | BadRow:
    import pyarrow as pa

    try:
        return Row(line, table.slice(index, 1).to_pylist()[0])
    except (pa.ArrowException, ValueError, OverflowError) as error:
        return BadRow(line, f"not readable: {(str(error).splitlines() or [type(error).__name__])[0]}")
