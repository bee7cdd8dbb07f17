"""Rows stream out of every kind of file, and damage is told with its place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.data import rows
from finetune_trainer.data.rows import BadRow, Row, RowFile, UnreadableFileError

VALUES = [{"a": 1}, {"a": "zwei\n"}, {"a": [None, "é", "\u2028"]}]


def read(folder: pathlib.Path, content: bytes, name: str = "data") -> list[Row | BadRow]:
    path = folder / name
    path.write_bytes(content)
    return list(RowFile(path))


def values(found: list[Row | BadRow]) -> list[object]:
    return [row.value for row in found if isinstance(row, Row)]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress], ids=["plain", "gz", "bz2", "xz"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_whatever_its_layout_and_compression(tmp_path, pack, indent):
    assert values(read(tmp_path, pack(json.dumps(VALUES, indent=indent).encode()))) == VALUES


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_lines_are_read_and_empty_lines_are_no_rows(tmp_path, pack):
    content = "\n\n".join(json.dumps(value) for value in VALUES).encode()
    assert values(read(tmp_path, pack(content))) == VALUES


def test_parquet_is_read(tmp_path):
    table = pa.Table.from_pylist([{"instruction": "a", "output": "b"}] * 1000)
    pq.write_table(table, tmp_path / "data.parquet")
    found = list(RowFile(tmp_path / "data.parquet"))
    assert len(found) == 1000
    assert found[999] == Row(1000, {"instruction": "a", "output": "b"})


def test_a_line_that_was_encoded_twice_is_decoded_twice(tmp_path):
    assert values(read(tmp_path, json.dumps(json.dumps({"a": 1})).encode())) == [{"a": 1}]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    assert values(read(tmp_path, b'\xef\xbb\xbf[{"a": 1}]')) == [{"a": 1}]


@pytest.mark.parametrize("content", [b"", b" \n\n", b"[]", b"[ ]", gzip.compress(b"", mtime=0)], ids=range(5))
def test_a_file_without_rows_has_none(tmp_path, content):
    assert read(tmp_path, content) == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"a": ', "not JSON"),
        (b"plain words", "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a":' * 20_000, "nested too deeply"),
    ],
    ids=range(4),
)
def test_a_bad_line_is_told_with_its_number_and_the_rest_is_read(tmp_path, line, why):
    found = read(tmp_path, b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    assert values(found) == [{"a": 1}, {"a": 2}]
    bad = found[1]
    assert isinstance(bad, BadRow)
    assert bad.line == 2
    assert why in bad.why


def test_a_line_beyond_the_limit_is_a_bad_row_and_not_a_full_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 1000)
    found = read(tmp_path, b'{"a": 1}\n{"a": "' + b"x" * 5000 + b'"}\n{"a": 2}\n')
    assert values(found) == [{"a": 1}, {"a": 2}]
    assert found[1] == BadRow(2, "longer than 1000 bytes")


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b'[\n {"a": 1},\n {"a": tru},\n {}\n]', "line 3"),
        (b'[\n {"a": 1},\n {"a": "x', "line 3"),
        (b'[{"a": 1} {"a": 2}]', "line 1: expected a comma"),
        (b'[{"a": 1}] tail', "text after the end"),
        (b'[{"a": "\xff"}]', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:40], "damaged"),
        (b"PAR1 and no more", "Parquet"),
        (b"\x28\xb5\x2f\xfd rest", "Zstandard"),
    ],
    ids=range(9),
)
def test_a_file_that_cannot_be_read_on_says_where(tmp_path, content, place):
    with pytest.raises(UnreadableFileError, match=place):
        read(tmp_path, content)


def test_an_array_element_beyond_the_limit_ends_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 100_000)
    with pytest.raises(UnreadableFileError, match="longer than"):
        read(tmp_path, b'[{"a": "' + b"x" * 1_000_000 + b'"}]')


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(json_values, max_size=8), st.sampled_from([None, 1]), st.integers(1, 40))
def test_an_array_reads_the_same_in_chunks_of_any_size(tmp_path_factory, elements, indent, chunk):
    path = tmp_path_factory.mktemp("rows") / "data.json"
    path.write_text(json.dumps(elements, indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_CHUNK_CHARS", chunk)
        assert values(list(RowFile(path))) == elements


def test_the_share_read_grows_to_one(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\n' * 500_000)
    reader = RowFile(path)
    shares = [reader.share for number, _ in enumerate(reader) if number % 100_000 == 0]
    assert shares == sorted(shares)
    assert 0 < shares[1] < 1
    assert reader.share == 1
