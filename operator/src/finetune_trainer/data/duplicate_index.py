"""The index of fingerprints on disk: an open hash table and the records it points to, read and written in place.

Files in its folder: `records`, for each row its place and fingerprint; `table`, slots of 8 bytes (tag and number of the
record), grown by doubling; `state.json`, how many records are committed. Only that number decides what exists: records
after it are cut off when the index is opened, and slots that point to them are skipped. So a crash at any moment leaves
the state of the last commit, and results depend on the rows and their order alone.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from finetune_trainer.checkpoints.manifest import sync_folder
from finetune_trainer.data.duplicates import Fingerprint, choose_banding
from finetune_trainer.reporting import write_json

if TYPE_CHECKING:
    import pathlib
    from types import TracebackType

    from finetune_contract.run_config import QualityConfig

FORMAT = 1
FIRST_BITS = 16
MAX_LOAD = 0.6
MAX_CHAIN = 32
"""Records that are looked at for one band; rows made from a template fill a band, and more are not added to it."""
_TAIL = 1 << 14
"""Slots behind the last home, so that no run of slots has to wrap around."""
_BLOCK = 16
"""Slots read at once."""
_CHUNK = 1 << 17
_SLOTS = struct.Struct(f"<{_BLOCK}Q")
_SLOT = struct.Struct("<Q")
_FREE = bytes(_SLOT.size)
_PLACE = struct.Struct("<q")


class DamagedIndexError(Exception):
    """The files hold less than was committed; delete the folder and begin with the first row."""


class DuplicateIndex:
    """Says for each row whether one like it came before.

    Places are numbers that grow from row to row. Commit before the shard that holds the rows is declared finished: rows
    that are asked for again after a restart are recognized by their place, so they are no duplicates of themselves.
    """

    def __init__(self, path: pathlib.Path, config: QualityConfig) -> None:
        """Open the index of a folder at its last commit, or a new one. Raises DamagedIndexError."""
        path.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._banding = choose_banding(config.similarity)
        self._record = _PLACE.size + self._banding.size
        self._table = self._open("table")
        self._records = self._open("records")
        try:
            self.num_rows = self._read_state()
            self._restore()
        except DamagedIndexError:
            self.close()
            raise

    def _open(self, name: str) -> int:
        return os.open(self._path / name, os.O_RDWR | os.O_CREAT, 0o644)

    def _read_state(self) -> int:
        try:
            state = json.loads((self._path / "state.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return 0
        except ValueError as error:
            raise DamagedIndexError(f"{self._path / 'state.json'}: {error}") from error
        if state.get("settings") != self._describe():
            return 0
        rows = int(state["rows"])
        if os.fstat(self._records).st_size < rows * self._record or not os.fstat(self._table).st_size:
            raise DamagedIndexError(f"{self._path}: fewer than the {rows} rows that were committed")
        return rows

    def _describe(self) -> dict[str, Any]:
        return {"format": FORMAT, "bands": self._banding.bands, "width": self._banding.width}

    def _restore(self) -> None:
        """Take the files to the last commit."""
        os.ftruncate(self._records, self.num_rows * self._record)
        size = os.fstat(self._table).st_size // _SLOT.size
        if not self.num_rows or size <= _TAIL:
            os.ftruncate(self._table, 0)
            size = (1 << FIRST_BITS) + _TAIL
            os.ftruncate(self._table, size * _SLOT.size)
        self._bits = (size - _TAIL).bit_length() - 1
        self._used = sum(int(np.count_nonzero(chunk)) for chunk in self._read_chunks())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; what was not committed is gone."""
        os.close(self._table)
        os.close(self._records)

    def commit(self) -> None:
        """Make sure that every row up to here outlives a crash."""
        os.fsync(self._records)
        os.fsync(self._table)
        write_json(self._path / "state.json", {"settings": self._describe(), "rows": self.num_rows})

    def rollback(self) -> None:
        """Forget the rows since the last commit."""
        self.num_rows = self._read_state()
        self._restore()

    def find_or_add(self, fingerprint: Fingerprint, place: int) -> int | None:
        """Return the place of the first row like this one, or remember this one and return None."""
        if self._used + self._banding.bands > MAX_LOAD * (1 << self._bits):
            self._grow()
        free: list[tuple[int, int]] = []
        candidates: dict[int, tuple[int, Fingerprint]] = {}
        for band in range(self._banding.bands):
            candidates |= self._look_up(fingerprint, band, free)
        for _, (earlier, other) in sorted(candidates.items()):
            if earlier == place:
                return None
            if earlier < place and self._banding.is_duplicate(fingerprint, other):
                return earlier
        self._add(fingerprint, place, free)
        return None

    def _look_up(
        self, fingerprint: Fingerprint, band: int, free: list[tuple[int, int]]
    ) -> dict[int, tuple[int, Fingerprint]]:
        """Return the records, by number, that agree in a band, and add the slot for this row to `free`."""
        part = slice(band * self._banding.width, (band + 1) * self._banding.width)
        key = fingerprint[part]
        tag = zlib.crc32(key, band)
        position = tag >> (32 - self._bits)
        found: dict[int, tuple[int, Fingerprint]] = {}
        while True:
            for slot in self._read_slots(position):
                if not slot:
                    free.append((position, tag))
                    return found
                number = (slot & 0xFFFFFFFF) - 1
                if slot >> 32 == tag and number < self.num_rows:
                    place, other = self._read_record(number)
                    # A tag says little, and a slot may be left over from rows that were forgotten.
                    if other[part] == key:
                        found[number] = place, other
                        if len(found) == MAX_CHAIN:
                            return found
                position += 1

    def _read_slots(self, position: int) -> tuple[int, ...]:
        """Return the next slots; no more than the first when it is free."""
        block = os.pread(self._table, _SLOTS.size, position * _SLOT.size)
        if len(block) < _SLOTS.size:
            raise DamagedIndexError(f"{self._path}: the table has no free slot at its end")
        return (0,) if block.startswith(_FREE) else _SLOTS.unpack(block)

    def _read_record(self, number: int) -> tuple[int, Fingerprint]:
        data = os.pread(self._records, self._record, number * self._record)
        return _PLACE.unpack_from(data)[0], data[_PLACE.size :]

    def _add(self, fingerprint: Fingerprint, place: int, free: list[tuple[int, int]]) -> None:
        _write(self._records, _PLACE.pack(place) + fingerprint, self.num_rows * self._record)
        self.num_rows += 1
        taken: set[int] = set()
        for found, tag in free:
            position = found
            # Two bands of one row may have found the same slot.
            while position in taken or (position != found and self._is_taken(position)):
                position += 1
            taken.add(position)
            _write(self._table, _SLOT.pack(tag << 32 | self.num_rows), position * _SLOT.size)
        self._used += len(taken)

    def _is_taken(self, position: int) -> bool:
        return os.pread(self._table, _SLOT.size, position * _SLOT.size) != _FREE

    def _read_chunks(self) -> Iterator[np.ndarray[Any, np.dtype[np.uint64]]]:
        offset = 0
        while data := os.pread(self._table, _CHUNK * _SLOT.size, offset):
            offset += len(data)
            yield np.frombuffer(data, dtype="<u8")

    def _grow(self) -> None:
        """Write the table anew with twice the slots, from front to back.

        A slot's home is the first bits of its tag, so runs of slots keep their order: each run is sorted and spread by
        itself, and never meets the next.
        """
        path = self._path / "table.new"
        table = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.ftruncate(table, ((2 << self._bits) + _TAIL) * _SLOT.size)
        self._used, rest = 0, np.empty(0, np.uint64)
        for chunk in self._read_chunks():
            gaps = np.flatnonzero(chunk == 0)
            if not len(gaps):
                rest = np.concatenate((rest, chunk))
                continue
            self._spread(table, np.concatenate((rest, chunk[: gaps[-1]])))
            rest = chunk[gaps[-1] + 1 :]
        self._spread(table, rest)
        os.fsync(table)
        path.replace(self._path / "table")
        sync_folder(self._path)
        os.close(self._table)
        self._table, self._bits = table, self._bits + 1

    def _spread(self, table: int, slots: np.ndarray[Any, np.dtype[np.uint64]]) -> None:
        """Write whole runs of slots to where they belong in a table of twice the size."""
        slots = slots[slots != 0]
        if not len(slots):
            return
        homes = (slots >> np.uint64(63 - self._bits)).astype(np.int64)
        order = np.argsort(homes, kind="stable")
        steps = np.arange(len(slots))
        positions = np.maximum.accumulate(homes[order] - steps) + steps
        spread = np.zeros(positions[-1] - positions[0] + 1, "<u8")
        spread[positions - positions[0]] = slots[order]
        _write(table, spread.tobytes(), int(positions[0]) * _SLOT.size)
        self._used += len(slots)


def _write(file: int, data: bytes, offset: int) -> None:
    if os.pwrite(file, data, offset) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
