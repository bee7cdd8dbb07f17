"""Recover a tuned model from its base and a weight diff, and verify either: every tensor by its digest."""

from __future__ import annotations

import hashlib
import math
import os
import struct
from typing import TYPE_CHECKING, BinaryIO

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.checkpoints import disk
from finetune_trainer.errors import TrainerError
from finetune_trainer.safetensors_header import LENGTH_BYTES, HeaderError, parse_header
from finetune_trainer.storage.transfer import hash_file
from finetune_trainer.weight_diff import bits
from finetune_trainer.weight_diff.ahead import map_ahead
from finetune_trainer.weight_diff.files import copy_file, fresh_folder
from finetune_trainer.weight_diff.make import hash_tensor
from finetune_trainer.weight_diff.record import COMPANIONS, FileFacts, Record, TensorDiff, make_digest, read_record
from finetune_trainer.weight_diff.tensors import STRETCH_ELEMENTS, Tensor, invalid, list_tensors, read_stretch

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable, Iterator, Mapping


def recover_model(
    base: pathlib.Path, diff: pathlib.Path, out: pathlib.Path, advance: Callable[[int], None] = lambda _: None
) -> Record:
    """Write the tuned model into `out`, which must not exist; its files are those of the tuned folder to the byte.

    Nothing appears under `out` unless every tensor has the digest that was recorded. Raises TrainerError: for another
    base than the diff's, by the names of both; for a damaged diff, by the tensor.
    """
    record = read_record(diff)
    theirs = list_tensors(base, "--base")
    _check_base_headers(record, theirs, base)
    with fresh_folder(out) as beside:
        _require_room(beside, sum(_count_bytes(text) for text in record.shards.values()))
        for shard, text in record.shards.items():
            with open(beside / shard, "xb") as file:
                _write_shard(file, text, _Sources(record, theirs, base, diff), advance)
        _copy_companions(record, diff, beside)
    return record


def verify_diff(diff: pathlib.Path) -> Record:
    """Read every byte of a diff and compare it with its record. Raises TrainerError."""
    record = read_record(diff)
    wanted = dict(record.files) | {f"{COMPANIONS}/{name}": facts for name, facts in record.companions.items()}
    for name, facts in wanted.items():
        _check_file(diff / name, facts)
    return record


def verify_side(record: Record, folder: pathlib.Path, side: str, advance: Callable[[int], None]) -> None:
    """Compare a folder's tensors with the `base` or `tuned` side of a diff. Raises TrainerError with the first."""
    tensors = list_tensors(folder, f"--{side}")
    if side == "base":
        _check_base_headers(record, tensors, folder)
    found = {}
    for name, tensor in tensors.items():
        found[name] = hash_tensor(tensor)
        advance(tensor.num_bytes)
        entry = record.tensors.get(name)
        wanted = None if entry is None else getattr(entry, side)
        if wanted is not None and wanted != found[name]:
            raise _wrong_side(record, folder, side, name)
    if make_digest(found.items()) != getattr(record, f"{side}_digest"):
        names = sorted({name for name in record.tensors if getattr(record.tensors[name], side)} ^ set(found))
        raise _wrong_side(record, folder, side, names[0] if names else "")


class _Sources:
    """What a tensor is recovered from."""

    def __init__(
        self, record: Record, base: Mapping[str, Tensor], base_folder: pathlib.Path, diff: pathlib.Path
    ) -> None:
        import pyarrow as pa

        self._record = record
        self._base = base
        self._base_folder = base_folder
        self._diff = diff
        self._codec = pa.Codec("zstd")

    def read(self, name: str) -> Iterator[memoryview]:
        """Yield the tuned bytes of a tensor in stretches; raises TrainerError before the last if they are wrong."""
        entry = self._record.tensors[name]
        base = self._base.get(name) if entry.base is not None else None
        base_digest, tuned_digest = hashlib.sha256(), hashlib.sha256()
        last: memoryview | None = None
        for theirs, ours in self._decode(entry, base, name):
            base_digest.update(theirs)
            tuned_digest.update(ours)
            if last is not None:
                yield last
            last = ours
        if entry.base is not None and base_digest.hexdigest() != entry.base.sha256:
            raise _wrong_side(self._record, self._base_folder, "base", name)
        if tuned_digest.hexdigest() != entry.tuned.sha256:
            raise _damaged(self._diff / entry.file, f"tensor {name} does not come out as it was recorded")
        if last is not None:
            yield last

    def _decode(self, entry: TensorDiff, base: Tensor | None, name: str) -> Iterator[tuple[bytearray, memoryview]]:
        dtype = entry.tuned.dtype
        num_elements = math.prod(entry.tuned.shape)
        path = self._diff / entry.file
        with open(path, "rb") as packed, open(base.file if base else path, "rb") as file:
            packed.seek(entry.offset)

            def read_all() -> Iterator[tuple[bytearray, bytes, int]]:
                for index, length in enumerate(entry.frames):
                    first = index * STRETCH_ELEMENTS
                    theirs = bytearray() if base is None else read_stretch(file, base, first, STRETCH_ELEMENTS)
                    yield theirs, packed.read(length), max(0, min(STRETCH_ELEMENTS, num_elements - first))

            def unpack(item: tuple[bytearray, bytes, int]) -> tuple[bytearray, memoryview]:
                theirs, frame, count = item
                try:
                    plain = self._codec.decompress(frame, bits.count_packed(count, dtype), asbytes=True)
                except (OSError, ValueError) as error:
                    raise _damaged(path, f"a stretch of tensor {name} cannot be decompressed") from error
                before = bits.view_bits(b"", dtype)
                if base is not None:
                    before = bits.convert(bits.view_bits(theirs, base.dtype), base.dtype, dtype)[:count]
                return theirs, memoryview(bits.decode(before, plain, count, dtype)).cast("B")

            yield from map_ahead(unpack, read_all())


def _write_shard(file: BinaryIO, text: str, sources: _Sources, advance: Callable[[int], None]) -> None:
    raw = text.encode()
    file.write(struct.pack("<Q", len(raw)) + raw)
    header = parse_header(raw)
    for name in sorted(header.offsets, key=lambda name: header.offsets[name]):
        file.seek(LENGTH_BYTES + len(raw) + header.offsets[name][0])
        for stretch in sources.read(name):
            file.write(stretch)
            advance(len(stretch))
    file.flush()
    os.fsync(file.fileno())


def _require_room(folder: pathlib.Path, needed: int) -> None:
    free = disk.read_free_bytes(folder)
    if free < needed:
        sizes = f"the model needs {disk.format_bytes(needed)}, {disk.format_bytes(free)} are free"
        hint = "Name a folder on a larger disk as --out."
        raise TrainerError(Reason.STORAGE_FULL, ExitCode.STORAGE_FULL, f"--out: {sizes}", hint)


def _count_bytes(header_text: str) -> int:
    try:
        return parse_header(header_text.encode()).file_bytes
    except HeaderError as error:
        raise invalid(
            "--diff", f"its record holds a header that is damaged: {error}", "Copy the diff again."
        ) from error


def _copy_companions(record: Record, diff: pathlib.Path, target: pathlib.Path) -> None:
    for name, facts in record.companions.items():
        if copy_file(diff / COMPANIONS / name, target / name) != facts:
            raise _damaged(diff / COMPANIONS / name, "it has other content than recorded")


def _check_base_headers(record: Record, tensors: Mapping[str, Tensor], folder: pathlib.Path) -> None:
    for name, entry in record.tensors.items():
        if entry.base is None:
            continue
        found = tensors.get(name)
        if found is None or (found.dtype, found.shape) != (entry.base.dtype, entry.base.shape):
            raise _wrong_side(record, folder, "base", name)


def _check_file(path: pathlib.Path, wanted: FileFacts) -> None:
    try:
        size, sha256 = path.stat().st_size, hash_file(path)
    except OSError as error:
        raise _damaged(path, f"it cannot be read: {error.strerror}") from error
    if size != wanted.size:
        raise _damaged(path, f"it has {size} bytes, the record says {wanted.size}")
    if sha256 != wanted.sha256:
        raise _damaged(path, "it has other content than recorded")


def _wrong_side(record: Record, folder: pathlib.Path, side: str, tensor: str) -> TrainerError:
    name, digest = getattr(record, f"{side}_name"), getattr(record, f"{side}_digest")
    what = {"base": "base model", "tuned": "tuned model"}[side]
    where = f": tensor {tensor} differs" if tensor else ""
    message = f"--{side}: {folder} is not the {what} of this diff{where}; that is {name!r}, digest {digest[:16]}"
    hint = f"Name the {what} that the diff was made with; weight-diff verify compares a folder with it."
    return TrainerError(Reason.MODEL_INVALID, ExitCode.NO_INPUT, message, hint)


def _damaged(path: pathlib.Path, why: str) -> TrainerError:
    return TrainerError(Reason.MODEL_INVALID, ExitCode.DATA, f"{path}: {why}", "Copy the diff again.")
