"""The difference of two stretches of a tensor as integers, exact to the bit, and its packing.

The bits of both sides are read as unsigned integers and subtracted with wrap-around: addition with wrap-around gives
the tuned bits back exactly, which a difference of floating-point numbers does not promise. Fine-tuning moves most
weights by a few units in the last place; zigzag coding makes those differences small numbers of either sign, and
storing the bytes of equal significance together lets the compressor see runs of zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_trainer.safetensors_header import ITEM_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FLOATS = ("F32", "F16", "BF16")

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


def encode(base: Bits, tuned: Bits) -> bytes:
    """Return the difference of two stretches as planes of bytes. `base` may be the shorter: zeros follow."""
    difference = tuned.copy()
    difference[: len(base)] -= base
    width = difference.dtype.itemsize
    sign = _spread_sign(difference)
    difference <<= 1
    difference ^= sign
    return bytes(difference.view("u1").reshape(-1, width).T.tobytes())


def decode(base: Bits, packed: bytes, dtype: str) -> Bits:
    """Return the tuned bits from a base's and what `encode` made of them. Raises ValueError when sizes disagree."""
    width = ITEM_BYTES[dtype]
    planes = np.frombuffer(packed, dtype="u1").reshape(width, -1)
    coded = np.ascontiguousarray(planes.T).view(f"<u{width}").reshape(-1)
    one = coded.dtype.type(1)
    tuned: NDArray[Any] = (coded >> one) ^ (~(coded & one) + one)
    tuned[: len(base)] += base
    return tuned


def _spread_sign(values: Bits) -> Bits:
    """Return all ones where the highest bit is set, all zeros elsewhere."""
    signed = values.view(f"<i{values.dtype.itemsize}")
    return (signed >> (8 * values.dtype.itemsize - 1)).view(values.dtype)
