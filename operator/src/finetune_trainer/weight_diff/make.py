"""Make a weight diff: read both models in stretches, subtract their bits, compress, record digests."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from typing import TYPE_CHECKING, Self

from finetune_trainer.reporting import emit_warning, write_json
from finetune_trainer.safetensors_header import LENGTH_BYTES, parse_length
from finetune_trainer.weight_diff import bits
from finetune_trainer.weight_diff.ahead import map_ahead
from finetune_trainer.weight_diff.files import HashedFile, copy_file, fresh_folder
from finetune_trainer.weight_diff.record import COMPANIONS, NAME, FileFacts, Record, Side, TensorDiff, make_digest
from finetune_trainer.weight_diff.tensors import STRETCH_ELEMENTS, Tensor, invalid, list_tensors, read_stretch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

_LEVEL = 1
"""Of Zstandard: the planes of zeros pack well at any level, and this one keeps up with a disk."""
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")


@dataclasses.dataclass(frozen=True)
class Made:
    """A diff that was written."""

    record: Record
    diff_bytes: int
    tuned_bytes: int
    """Size of the tuned weights; the ratio of both is what the diff saves."""
    dropped: tuple[str, ...]
    """Tensors that only the base has."""


def make_diff(
    base: pathlib.Path,
    tuned: pathlib.Path,
    out: pathlib.Path,
    advance: Callable[[int], None] = lambda _: None,
    *,
    skipped: Collection[str] = (),
) -> Made:
    """Write the difference of two model folders into `out`, which must not exist. Raises TrainerError.

    `advance` is told of each number of tuned bytes that are done; `skipped` names files of the tuned folder, other than
    weights, that the diff is to leave out.
    """
    ours, theirs = list_tensors(tuned, "--tuned"), list_tensors(base, "--base")
    _check_pair(theirs, ours, base, tuned)
    with fresh_folder(out) as beside:
        with _Writer(beside, advance) as writer:
            tensors = {
                name: writer.add(tensor, theirs.get(name), f"{tensor.file.name}.diff.zst")
                for name, tensor in ours.items()
            }
        dropped = tuple(name for name in theirs if name not in ours)
        sides = {name: each.base for name, each in tensors.items() if each.base is not None}
        sides |= {name: hash_tensor(theirs[name]) for name in dropped}
        record = Record(
            base_name=base.resolve().name,
            base_digest=make_digest(sides.items()),
            tuned_name=tuned.resolve().name,
            tuned_digest=make_digest((name, each.tuned) for name, each in tensors.items()),
            tensors=tensors,
            shards={path.name: _read_header_text(path) for path in sorted({tensor.file for tensor in ours.values()})},
            companions=_copy_companions(tuned, beside / COMPANIONS, skipped),
            files=writer.files,
        )
        write_json(beside / NAME, record.to_json())
    diff_bytes = sum(facts.size for facts in record.files.values())
    return Made(record, diff_bytes, sum(tensor.num_bytes for tensor in ours.values()), dropped)


def hash_tensor(tensor: Tensor) -> Side:
    """Return a tensor's type, shape and digest."""
    digest = hashlib.sha256()
    with open(tensor.file, "rb") as file:
        for first in range(0, tensor.num_elements, STRETCH_ELEMENTS):
            digest.update(read_stretch(file, tensor, first, STRETCH_ELEMENTS))
    return Side(tensor.dtype, tensor.shape, digest.hexdigest())


def _check_pair(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], *folders: pathlib.Path) -> None:
    """Refuse two models of which one cannot have come from the other."""
    both = [name for name in tuned if name in base]
    names = " and ".join(str(folder) for folder in folders)
    hint = "Name the model that was tuned as --base."
    if not both:
        raise invalid("--base", f"{names} have no tensor of the same name", hint)
    for name in both:
        ours, theirs = tuned[name], base[name]
        # Embeddings may gain or lose rows; everything else is another architecture.
        if ours.shape[1:] != theirs.shape[1:] or len(ours.shape) != len(theirs.shape):
            shapes = f"{list(theirs.shape)} and {list(ours.shape)}"
            raise invalid("--base", f"{names} are of different architectures: {name} has shapes {shapes}", hint)
        if not bits.can_convert(theirs.dtype, ours.dtype):
            raise invalid("--base", f"{name} is {theirs.dtype} in the base and {ours.dtype} in the tuned model", hint)


class _Writer:
    """Compresses the stretches of tensors side by side and writes them in order."""

    def __init__(self, folder: pathlib.Path, advance: Callable[[int], None]) -> None:
        import pyarrow as pa

        self.files: dict[str, FileFacts] = {}
        self._folder = folder
        self._advance = advance
        self._codec = pa.Codec("zstd", compression_level=_LEVEL)
        self._out: HashedFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_file()

    def add(self, tuned: Tensor, base: Tensor | None, name: str) -> TensorDiff:
        """Append the difference of one tensor to the file `name`; tensors of one file come one after another."""
        if self._out is None or self._out.name != name:
            self._close_file()
            self._out = HashedFile(self._folder / name)
        out, offset = self._out, self._out.size
        base_digest, tuned_digest = hashlib.sha256(), hashlib.sha256()

        def read_all() -> Iterator[tuple[bytearray, bytearray]]:
            for theirs, ours in _read_pairs(base, tuned):
                base_digest.update(theirs)
                tuned_digest.update(ours)
                self._advance(len(ours))
                yield theirs, ours

        frames = [out.append(frame) for frame in map_ahead(lambda pair: self._pack(base, tuned, *pair), read_all())]
        return TensorDiff(
            tuned=Side(tuned.dtype, tuned.shape, tuned_digest.hexdigest()),
            base=None if base is None else Side(base.dtype, base.shape, base_digest.hexdigest()),
            file=name,
            offset=offset,
            frames=tuple(frames),
        )

    def _pack(self, base: Tensor | None, tuned: Tensor, theirs: bytearray, ours: bytearray) -> bytes:
        after = bits.view_bits(ours, tuned.dtype)
        before = after[:0]
        if base is not None:
            before = bits.convert(bits.view_bits(theirs, base.dtype), base.dtype, tuned.dtype)[: len(after)]
        return bytes(self._codec.compress(bits.encode(before, after), asbytes=True))

    def _close_file(self) -> None:
        if self._out is not None:
            self.files[self._out.name] = self._out.close()
            self._out = None


def _read_pairs(base: Tensor | None, tuned: Tensor) -> Iterator[tuple[bytearray, bytearray]]:
    """Yield the same stretch of both sides until both have ended; one side's may be shorter, or empty."""
    longest = max(tuned.num_elements, 0 if base is None else base.num_elements)
    with open(tuned.file, "rb") as ours, open(tuned.file if base is None else base.file, "rb") as theirs:
        for first in range(0, longest, STRETCH_ELEMENTS):
            before = bytearray() if base is None else read_stretch(theirs, base, first, STRETCH_ELEMENTS)
            yield before, read_stretch(ours, tuned, first, STRETCH_ELEMENTS)


def _read_header_text(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return file.read(parse_length(file.read(LENGTH_BYTES))).decode()


def _copy_companions(model: pathlib.Path, target: pathlib.Path, skipped: Collection[str]) -> dict[str, FileFacts]:
    """Copy the tuned model's other files: configuration, tokenizer, licence. Weights in other formats are left out."""
    copied: dict[str, FileFacts] = {}
    for path in sorted(model.rglob("*")):
        name = path.relative_to(model)
        if not path.is_file() or name.as_posix() in skipped or any(part.startswith(".") for part in name.parts):
            continue
        if len(name.parts) == 1 and path.suffix == ".safetensors":
            continue
        if path.suffix in _OTHER_WEIGHTS:
            emit_warning("left out of the diff: weights in another format", file=name.as_posix())
            continue
        copied[name.as_posix()] = copy_file(path, target / name)
    return copied
