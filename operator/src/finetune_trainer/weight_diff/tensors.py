"""The tensors of a model folder, found by the headers of its safetensors files and read in stretches."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, BinaryIO

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.errors import TrainerError
from finetune_trainer.safetensors_header import ITEM_BYTES, LENGTH_BYTES, HeaderError, parse_header, parse_length

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Mapping

STRETCH_ELEMENTS = 1 << 20
"""Elements read at once. Memory is a few stretches, however large a tensor or a file is."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: pathlib.Path
    start: int
    """Its first byte in the file."""

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return self.num_elements * ITEM_BYTES[self.dtype]


def list_tensors(folder: pathlib.Path, option: str) -> dict[str, Tensor]:
    """Return the tensors of a model folder by name, in the order of files and of offsets. Raises TrainerError.

    `option` is the command-line option that named the folder, for messages.
    """
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not files:
        raise invalid(option, f"{folder} holds no *.safetensors", "Name a model folder in Hugging Face layout.")
    found: dict[str, Tensor] = {}
    for path in files:
        for tensor in _read_header(path, option):
            if tensor.name in found:
                both = f"{found[tensor.name].file.name} and {path.name}"
                raise invalid(option, f"{folder}: tensor {tensor.name} stands in {both}", "Remove the stale file.")
            found[tensor.name] = tensor
    return found


def read_stretch(file: BinaryIO, tensor: Tensor, first: int, count: int) -> bytearray:
    """Return `count` elements of a tensor from the element `first` on; fewer where it ends. Raises TrainerError."""
    width = ITEM_BYTES[tensor.dtype]
    count = max(0, min(count, tensor.num_elements - first))
    buffer = bytearray(count * width)
    file.seek(tensor.start + first * width)
    if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
        raise TrainerError(Reason.MODEL_INVALID, ExitCode.DATA, f"{tensor.file} ended inside {tensor.name}")
    return buffer


def invalid(option: str, why: str, hint: str) -> TrainerError:
    """Return the error for a folder that an option names and that cannot be used."""
    return TrainerError(Reason.MODEL_INVALID, ExitCode.NO_INPUT, f"{option}: {why}", hint)


def _read_header(path: pathlib.Path, option: str) -> list[Tensor]:
    hint = "Download or copy the file again."
    with open(path, "rb") as file:
        try:
            length = parse_length(file.read(LENGTH_BYTES))
            header = parse_header(file.read(length))
        except HeaderError as error:
            raise invalid(option, f"{path}: {error}", hint) from error
    size = path.stat().st_size
    if header.file_bytes != size:
        raise invalid(option, f"{path} has {size} bytes, its header says {header.file_bytes}", hint)
    unknown = sorted({dtype for dtype in header.dtypes.values() if dtype not in ITEM_BYTES})
    if unknown:
        raise invalid(option, f"{path}: tensors of type {unknown[0]}", f"Use one of {', '.join(ITEM_BYTES)}.")
    tensors = [
        Tensor(name, header.dtypes[name], shape, path, LENGTH_BYTES + length + header.offsets[name][0])
        for name, shape in header.shapes.items()
    ]
    if wrong := _find_wrong_size(tensors, header.offsets):
        raise invalid(option, f"{path}: the size of tensor {wrong} is not that of its shape", hint)
    return sorted(tensors, key=lambda tensor: tensor.start)


def _find_wrong_size(tensors: list[Tensor], offsets: Mapping[str, tuple[int, int]]) -> str:
    for tensor in tensors:
        start, end = offsets[tensor.name]
        if end - start != tensor.num_bytes:
            return tensor.name
    return ""
