"""The files of one save, taken out of the model: drawn without their tensors, then copied into the writer's buffer.

`torch.save` writes the frame of each file and leaves holes where the tensors go; the tensors are then copied straight
from where they live into the holes, and training goes on. What lies in the buffer are the very bytes of the files, so
that everything that reads DeepSpeed's checkpoints reads ours. Only the zip entries' own checksums are missing, which
PyTorch does not look at: the manifest has a digest of each file.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import io
import pathlib
import pickle
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from finetune_trainer.checkpoints.attempt import Fence
from finetune_trainer.checkpoints.files import round_up
from finetune_trainer.checkpoints.writer import Extent, Write, Writer

_PIECE_BYTES = 64 << 20
"""Tensors are copied in pieces of at most this, so that a buffer of any size can hold them."""


@dataclasses.dataclass
class Image:
    """One file as it will be."""

    name: str
    """Path relative to the checkpoint."""
    size: int = 0
    pieces: list[tuple[int, Any]] = dataclasses.field(default_factory=list)
    """Offset and content: bytes, or a storage of PyTorch."""


class _Frame(io.RawIOBase):
    """Takes what `torch.save` writes; a hole arrives as a seek."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self.holes: list[tuple[int, int]] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._image.pieces.append((self._image.size, bytes(data)))
        self._image.size += len(data)
        return len(data)

    def seek(self, offset: int, _whence: int = 0) -> int:
        self.holes.append((self._image.size, offset))
        self._image.size += offset
        return self._image.size

    def tell(self) -> int:
        return self._image.size


def draw_state(name: str, state: Any) -> Image:
    """Return the image of `torch.save(state)`. Its tensors are read when it is copied, not before."""
    storages: dict[int, torch.UntypedStorage] = {}

    class Recorder(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            # Storages get their places in the file in the order in which the pickler meets them.
            if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes():
                storage = value.untyped_storage()
                storages.setdefault(storage._cdata, storage)  # noqa: SLF001 - torch.save tells them apart by it
            return NotImplemented

    module = types.SimpleNamespace(__name__="pickle", Pickler=Recorder, Unpickler=pickle.Unpickler)
    image = Image(name)
    frame = _Frame(image)
    with torch.serialization.skip_data():
        torch.save(state, frame, pickle_module=module)
    if [size for _, size in frame.holes] != [storage.nbytes() for storage in storages.values()]:
        raise RuntimeError(f"{name}: the tensors found are not those that torch.save left room for")
    image.pieces += [(offset, storage) for (offset, _), storage in zip(frame.holes, storages.values(), strict=True)]
    image.pieces.sort(key=lambda piece: piece[0])
    return image


def draw_bytes(name: str, content: bytes) -> Image:
    """Return the image of a small file."""
    return Image(name, len(content), [(0, content)])


def draw_folder(folder: pathlib.Path) -> list[Image]:
    """Return the images of the files below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [draw_bytes(path.relative_to(folder).as_posix(), path.read_bytes()) for path in paths]


class Buffer:
    """The writer's buffer as a target of copies; page-locked for the accelerator where there is one."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._memory: Any = None
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self.address = 0

    @property
    def num_bytes(self) -> int:
        """Size of the buffer."""
        return 0 if self._memory is None else len(self._memory)

    def grow(self, num_bytes: int) -> None:
        """Make it at least this large. What it held before is void."""
        memory = self._writer.map_buffer(num_bytes)
        if memory is self._memory:
            return
        self._lock(is_locked=False)
        self._memory = memory
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._lock(is_locked=True)

    def _lock(self, is_locked: bool) -> None:
        """Register the memory with CUDA, for copies at the full speed of the bus; where it refuses, they are slower."""
        if self._memory is None or not torch.cuda.is_initialized():
            return
        runtime = torch.cuda.cudart()
        if not is_locked:
            runtime.cudaHostUnregister(self.address)
        elif runtime.cudaHostRegister(self.address, self.num_bytes, 0) != runtime.cudaError.success:
            # CUDA keeps the error for whoever looks next, which would be a kernel of the training.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda")

    def put(self, offset: int, content: Any, first: int, length: int) -> None:
        """Copy `length` bytes of some content, from byte `first` on, to `offset`."""
        if isinstance(content, bytes):
            self._memory[offset : offset + length] = content[first : first + length]
        elif content.device.type == "cpu":
            # Twice as fast as a tensor's `copy_`, and it starts no threads.
            ctypes.memmove(self.address + offset, content.data_ptr() + first, length)
        else:
            source = torch.empty(0, dtype=torch.uint8, device=content.device).set_(content)
            self._bytes[offset : offset + length].copy_(source[first : first + length], non_blocking=True)

    def finish(self) -> None:
        """Wait until all copies have been made."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()


def count_buffer_bytes(images: Sequence[Image]) -> int:
    """Return the size of a buffer that holds all of the files, each from a new page on."""
    return sum(round_up(image.size) for image in images)


def copy_images(images: Sequence[Image], buffer: Buffer, writer: Writer, target: tuple[pathlib.Path, Fence]) -> None:
    """Copy the files into the buffer and order them written to the target folder.

    Returns when the last byte has been copied: at once where the buffer holds everything, else once the writer has
    written what did not fit. Where it fails in between, `writer.failure` says so.
    """
    extents: list[Extent] = []
    used = 0

    def order_written() -> None:
        nonlocal used
        buffer.finish()
        writer.submit(Write(*target, buffer.num_bytes, tuple(extents)))
        extents.clear()
        used = 0

    for image in images:
        begin = 0
        while begin < image.size or not image.size:
            if buffer.num_bytes - used < min(round_up(image.size - begin), _PIECE_BYTES):
                order_written()
                writer.wait()
            if writer.failure is not None:
                return
            length = min(image.size - begin, buffer.num_bytes - used)
            for offset, content, first, size in _cut(image, begin, begin + length):
                buffer.put(used + offset - begin, content, first, size)
            extents.append(Extent(image.name, used, length, begin + length == image.size))
            begin += length
            used += round_up(length)
            if not image.size:
                break
    order_written()


def _cut(image: Image, begin: int, end: int) -> Iterator[tuple[int, Any, int, int]]:
    """Yield what lies between two offsets: offset in the file, content, its first byte, number of bytes."""
    for offset, content in image.pieces:
        size = len(content) if isinstance(content, bytes) else content.nbytes()
        first, last = max(begin, offset), min(end, offset + size)
        if first < last:
            yield first, content, first - offset, last - first
