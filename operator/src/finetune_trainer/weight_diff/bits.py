"""The difference of two stretches of a tensor as integers, exact to the bit, and its packing.

The bits of both sides are read as unsigned integers and subtracted with wrap-around: addition with wrap-around gives
the tuned bits back exactly, which a difference of floating-point numbers does not promise. Fine-tuning moves most
weights by a few units in the last place; zigzag coding makes those differences small numbers of either sign. What has
equal significance is stored together, so that the compressor sees runs of zeros: first the bits of the lowest bytes, in
which those numbers end, then the other bytes whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_trainer.safetensors_header import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_FLOATS = ("F32", "F16", "BF16")
_BLOCK_ELEMENTS = 1 << 16
"""A multiple of eight."""
NUM_BIT_PLANES = {1: 1, 2: 1, 4: 2, 8: 0}
"""By the bytes of an element: how many of its lowest bytes are stored bit by bit. A fine-tune moves a number of 16 bits
within its lowest byte, and one of 32 bits within its lowest two."""
_SWAPS = (
    (7, np.uint64(0x00AA00AA00AA00AA)),
    (14, np.uint64(0x0000CCCC0000CCCC)),
    (28, np.uint64(0x00000000F0F0F0F0)),
)

Bits = Any
"""An array of unsigned integers, one for each element of a tensor."""


def view_bits(data: bytes | bytearray | memoryview, dtype: str) -> Bits:
    """Return the elements of a stretch of a tensor as unsigned integers, without a copy."""
    return np.frombuffer(data, dtype=f"<u{ITEM_BYTES[dtype]}")


def can_convert(dtype: str, wanted: str) -> bool:
    """Return whether a base of one type can be compared with a tuned tensor of another."""
    return dtype == wanted or (dtype in _FLOATS and wanted in _FLOATS)


def convert(bits: Bits, dtype: str, wanted: str) -> Bits:
    """Return the bits of the same numbers in another floating-point type, rounded to nearest even on any machine."""
    if dtype == wanted:
        return bits
    if dtype == "BF16":
        single = (bits.astype("<u4") << 16).view("<f4")
    else:
        single = bits.view(f"<f{ITEM_BYTES[dtype]}").astype("<f4")
    # Machines differ in what a conversion makes of a NaN's payload.
    single = np.where(np.isnan(single), np.float32(np.nan), single)
    if wanted == "F32":
        return single.view("<u4")
    if wanted == "F16":
        with np.errstate(over="ignore"):
            return single.astype("<f2").view("<u2")
    wide = single.view("<u4")
    # Just under half of the dropped range, and one more where the kept part is odd: ties go to the even neighbour.
    return ((wide + np.uint32(0x7FFF) + ((wide >> 16) & np.uint32(1))) >> 16).astype("<u2")


def count_packed(num_elements: int, dtype: str) -> int:
    """Return the length of what `encode` makes of a stretch."""
    return sum(length for _, length in _list_planes(num_elements, ITEM_BYTES[dtype]))


def encode(base: Bits, tuned: Bits) -> NDArray[np.uint8]:
    """Return the difference of two stretches, packed as the module says. `base` may be the shorter: zeros follow."""
    width = tuned.dtype.itemsize
    planes = _list_planes(len(tuned), width)
    packed = np.zeros(sum(length for _, length in planes), "u1")
    for block in _cut(len(tuned)):
        before, coded = base[block], tuned[block].copy()
        coded[: len(before)] -= before
        sign = (coded.view(f"<i{width}") >> (8 * width - 1)).view(coded.dtype)
        coded <<= 1
        coded ^= sign
        for index, (start, length) in enumerate(planes):
            if index < NUM_BIT_PLANES[width]:
                bits = packed[start : start + length].reshape(8, -1)[:, block.start // 8 : -(-block.stop // 8)]
                bits[:] = _transpose(_pad(coded.astype("u1"))).reshape(-1, 8).T
            else:
                np.copyto(packed[start : start + length][block], coded, casting="unsafe")
            if width > 1:
                coded >>= 8
    return packed


def decode(base: Bits, packed: bytes, num_elements: int, dtype: str) -> Bits:
    """Return the tuned bits from a base's and what `encode` made of them. Raises ValueError when sizes disagree."""
    width = ITEM_BYTES[dtype]
    planes = _list_planes(num_elements, width)
    whole = np.frombuffer(packed, dtype="u1")
    tuned: NDArray[Any] = np.zeros(num_elements, f"<u{width}")
    for block in _cut(num_elements):
        coded, before = tuned[block], base[block]
        for index, (start, length) in reversed(list(enumerate(planes))):
            if width > 1:
                coded <<= 8
            if index < NUM_BIT_PLANES[width]:
                bits = whole[start : start + length].reshape(8, -1)[:, block.start // 8 : -(-block.stop // 8)]
                coded |= _transpose(bits.T.flatten())[: len(coded)]
            else:
                coded |= whole[start : start + length][block]
        sign = coded & 1
        coded >>= 1
        coded ^= np.negative(sign, out=sign)
        coded[: len(before)] += before
    return tuned


def _list_planes(num_elements: int, width: int) -> list[tuple[int, int]]:
    """Return where the bytes of each significance lie, the lowest first; bits are in eight planes of equal length."""
    planes, start = [], 0
    for index in range(width):
        length = 8 * -(-num_elements // 8) if index < NUM_BIT_PLANES[width] else num_elements
        planes.append((start, length))
        start += length
    return planes


def _pad(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.pad(values, (0, -len(values) % 8)) if len(values) % 8 else values


def _transpose(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return each eight bytes as a matrix of bits, transposed: Warren, Hacker's Delight, 7-3. It is its own inverse."""
    whole = np.ascontiguousarray(values).view("<u8")
    swapped = np.empty_like(whole)
    for distance, mask in _SWAPS:
        np.right_shift(whole, distance, out=swapped)
        swapped ^= whole
        swapped &= mask
        whole ^= swapped
        swapped <<= distance
        whole ^= swapped
    return whole.view("u1")


def _cut(length: int) -> Iterator[slice]:
    """Yield blocks that stay in a processor's cache while they are worked on."""
    for first in range(0, length, _BLOCK_ELEMENTS):
        yield slice(first, min(first + _BLOCK_ELEMENTS, length))
