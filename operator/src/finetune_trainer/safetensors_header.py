"""The header of a safetensors file: what it holds, and how long the file must be. Standard library only."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Mapping
from typing import Any

LENGTH_BYTES = 8
"""A file begins with the length of its header."""
_LONGEST_HEADER = 100_000_000
ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element, by the names of the format."""


class HeaderError(ValueError):
    """The bytes are no safetensors header."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What a header tells."""

    shapes: Mapping[str, tuple[int, ...]]
    """By the tensor's name."""
    dtypes: Mapping[str, str]
    """In the words of the format: BF16."""
    offsets: Mapping[str, tuple[int, int]]
    """First byte of each tensor, and the one after its last, counted from the end of the header."""
    file_bytes: int
    """Size of the whole file."""
    tensor_bytes: int
    """Size of the tensors by their shapes; 0 for those of a type we do not know."""

    @property
    def num_parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def parse_length(start: bytes) -> int:
    """Return the header's length from the first eight bytes of a file. Raises HeaderError."""
    length = struct.unpack("<Q", start)[0] if len(start) == LENGTH_BYTES else 0
    if not 2 <= length <= _LONGEST_HEADER:
        raise HeaderError("the length of the header is impossible")
    return int(length)


def parse_header(text: bytes) -> Header:
    """Parse the header that follows those eight bytes. Raises HeaderError."""
    try:
        tensors = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        return Header(
            shapes={name: tuple(int(length) for length in entry["shape"]) for name, entry in tensors.items()},
            dtypes={name: str(entry["dtype"]) for name, entry in tensors.items()},
            offsets={name: (entry["data_offsets"][0], entry["data_offsets"][1]) for name, entry in tensors.items()},
            file_bytes=LENGTH_BYTES
            + len(text)
            + max((entry["data_offsets"][1] for entry in tensors.values()), default=0),
            tensor_bytes=sum(_tensor_bytes(entry) for entry in tensors.values()),
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise HeaderError("the header is damaged") from error


def _tensor_bytes(entry: Mapping[str, Any]) -> int:
    return int(math.prod(entry["shape"])) * ITEM_BYTES.get(entry["dtype"], 0)
