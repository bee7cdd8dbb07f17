"""Rows stream out of every kind of file, and damage is told with its place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pathlib
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.data import chunks, compression
from finetune_trainer.data.chunks import ChunkReader
from finetune_trainer.data.rows import BadRow, Row, UnreadableFileError, list_rows

PACKS = [bytes, gzip.compress, bz2.compress, lzma.compress, lambda data: pa.compress(data, "zstd", asbytes=True)]
VALUES = [{"a": 1}, {"a": "zwei\n"}, {"a": [None, "é", "\u2028"]}]


def read(folder: pathlib.Path, content: bytes, name: str = "data") -> list[Row | BadRow]:
    path = folder / name
    path.write_bytes(content)
    return list(list_rows(path))


def values(found: list[Row | BadRow]) -> list[object]:
    return [row.value for row in found if isinstance(row, Row)]


@pytest.mark.parametrize("pack", PACKS, ids=["plain", "gz", "bz2", "xz", "zst"])
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
    found = list(list_rows(tmp_path / "data.parquet"))
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
    monkeypatch.setattr(chunks, "MAX_ROW_BYTES", 1000)
    found = read(tmp_path, b'{"a": 1}\n{"a": "' + b"x" * 5000 + b'"}\n{"a": 2}\n')
    assert values(found) == [{"a": 1}, {"a": 2}]
    assert found[1] == BadRow(2, "longer than 1000 bytes")


def test_a_bad_element_of_an_array_is_a_bad_row_and_the_rest_is_read(tmp_path):
    found = read(tmp_path, b'[\n {"a": 1},\n {"a":\n tru},\n {"a": "\xff"}, {"a": [1 2]}, [[{}]], 7\n]')
    assert values(found) == [{"a": 1}, [[{}]], 7]
    assert [(row.line, row.why) for row in found if isinstance(row, BadRow)] == [
        (4, "not JSON: Expecting value at column 2"),
        (5, "not UTF-8 at byte 7"),
        (5, "not JSON: Expecting ',' delimiter at column 10"),
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'{"a": NaN, "b": 1}', {"b": 1}),
        (b'{"a": 1e999}', {"a": float("inf")}),
        (b'{"a": "\\ud800"}', {"a": "\ud800"}),
        (b'{"a": 1, "a": 2}', {"a": 2}),
        (b'{"a": 9007199254740993}', {"a": 9007199254740993}),
        (b'{"a": 1}\r', {"a": 1}),
        (b'{"a":\x0b1}', None),
        (b'{"a": "\x00"}', None),
        (b'{"a": ' + b"9" * 5000 + b"}", None),
        (b'{"a": 01}', None),
        (b"\x00\x00", None),
    ],
    ids=range(11),
)
def test_what_the_standard_library_takes_is_taken(tmp_path, text, value):
    (found,) = read(tmp_path, text + b"\n")
    if value is None:
        assert isinstance(found, BadRow)
    else:
        assert isinstance(found, Row)
        assert {key: found.value[key] for key in value} == value


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b'[\n {"a": 1},\n {"a": "x', "line 3"),
        (b'[{"a": 1} {"a": 2}]', "line 1: expected a comma"),
        (b'[{"a": 1}] tail', "text after the end"),
        (b"[1,]", "expected a value"),
        (b"[,1]", "expected a value"),
        (b"[" * 100_000, "line 1: the file ends in the middle"),
        (gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:40], "damaged"),
        (lzma.compress(b'{"a": 1}\n' * 1000)[:60], "damaged"),
        (bz2.compress(b'{"a": 1}\n' * 1000)[:40], "damaged"),
        (pa.compress(b'{"a": 1}\n' * 1000, "zstd", asbytes=True)[:20], "damaged"),
        (gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-6] + b"broken", "damaged"),
        (b"PAR1 and no more", "Parquet"),
        (b"\x28\xb5\x2f\xfd rest", "damaged"),
        ('{"a": 1}\n'.encode("utf-16"), "UTF-16"),
        (gzip.compress('{"a": 1}\n'.encode("utf-16")), "UTF-16"),
        (b"PK\x03\x04 and so on", "zip archive"),
        (b"rows.json" + bytes(248) + b"ustar\x0000", "tar archive"),
    ],
    ids=range(17),
)
def test_a_file_that_cannot_be_read_on_says_where(tmp_path, content, place):
    with pytest.raises(UnreadableFileError, match=place):
        read(tmp_path, content)


def test_rows_before_the_place_where_an_array_breaks_are_read(tmp_path):
    (tmp_path / "data").write_bytes(b'[{"a": 1}, {"a": 2} oops')
    found = []
    with pytest.raises(UnreadableFileError):
        found += iter(list_rows(tmp_path / "data"))
    assert values(found) == [{"a": 1}, {"a": 2}]


def test_an_array_element_beyond_the_limit_ends_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "MAX_ROW_BYTES", 100_000)
    for content in (b'[{"a": "' + b"x" * 1_000_000 + b'"}]', b"[1" + b"0" * 1_000_000, b"[" + b" " * 1_000_000 + b"]"):
        with pytest.raises(UnreadableFileError, match=r"longer than|more than"):
            read(tmp_path, content)


def test_a_parquet_row_beyond_the_limit_is_a_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "MAX_ROW_BYTES", 100_000)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)
    table = pa.Table.from_pylist([{"a": "x"}, {"a": "y" * 200_000}, {"a": "z"}])
    pq.write_table(table, tmp_path / "data.parquet")
    found = list(list_rows(tmp_path / "data.parquet"))
    assert values(found) == [{"a": "x"}, {"a": "z"}]
    assert found[1] == BadRow(2, "longer than 100000 bytes")


def test_parquet_whose_rows_are_all_too_long_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "MAX_ROW_BYTES", 100_000)
    pq.write_table(pa.Table.from_pylist([{"a": "y" * 200_000}]), tmp_path / "data.parquet", use_dictionary=False)
    with pytest.raises(UnreadableFileError, match="row group 0 are longer"):
        list(list_rows(tmp_path / "data.parquet"))


def test_a_long_value_that_a_dictionary_repeats_takes_no_more_memory_than_its_rows_may(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "MAX_ROW_BYTES", 100_000)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 20_000)
    values = pa.DictionaryArray.from_arrays(pa.array([0, 1, 1, 1, 0] * 100, pa.int32()), pa.array(["x", "y" * 200_000]))
    pq.write_table(pa.table({"a": values}), tmp_path / "data.parquet")
    found = list(list_rows(tmp_path / "data.parquet"))
    assert [row.line for row in found] == list(range(1, 501))
    assert sum(isinstance(row, BadRow) for row in found) == 300
    assert max(len(chunk.data) for chunk in ChunkReader(tmp_path / "data.parquet")) < 100_000


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress], ids=["gz", "bz2", "xz"])
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(compression, "BOMB_BYTES", 1 << 20)
    with pytest.raises(UnreadableFileError, match="200 times its size"):
        read(tmp_path, pack(b" " * (8 << 20)))


def test_an_xz_file_that_wants_gigabytes_of_memory_is_refused(tmp_path):
    packer = lzma.LZMACompressor(lzma.FORMAT_XZ, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 12}])
    content = bytearray(packer.compress(b'{"a": 1}\n') + packer.flush())
    # The size of the dictionary stands in the block header, which has a checksum of its own.
    properties = 12 + 4
    assert content[properties - 2 : properties] == b"\x21\x01"
    content[properties] = 36
    header = bytes(content[12 : 12 + (content[12] + 1) * 4 - 4])
    content[12 + len(header) : 16 + len(header)] = zlib.crc32(header).to_bytes(4, "little")
    with pytest.raises(UnreadableFileError, match=r"[Mm]emory"):
        read(tmp_path, bytes(content))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress], ids=["gz", "bz2", "xz"])
def test_packed_files_may_be_joined(tmp_path, pack):
    assert values(read(tmp_path, pack(b'{"a": 1}\n') + pack(b'{"a": 2}\n'))) == [{"a": 1}, {"a": 2}]


def test_lines_are_numbered_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 7)
    found = read(tmp_path, b'\n\n{"a": 1}\n\n \n{"a": 2}\n\nbad\n{"a": 3}')
    assert [row.line for row in found] == [3, 6, 8, 9]


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
        patch.setattr(chunks, "CHUNK_BYTES", chunk)
        assert values(list(list_rows(path))) == elements


def test_the_share_read_grows_to_one(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\n' * 500_000)
    reader = ChunkReader(path)
    shares = [reader.share for _ in reader]
    assert shares == sorted(shares)
    assert 0 < shares[1] < 1
    assert reader.share == 1
