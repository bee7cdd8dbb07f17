"""Which examples share a row, and how many rows make a step. Pure.

Whether examples may share a row at all is for the model's own code to show: `probe.py`.
"""

from __future__ import annotations

from collections.abc import Sequence


def pack_lengths(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Return which examples share a row of `max_length` tokens: two ways of packing, the one with fewer rows.

    The same for the same lengths in the same order. Both ways take time that grows with the number of examples only
    (apart from their sorting): sets of lengths are the bits of one integer.
    """
    return min(_fill_exactly(lengths, max_length), _fit_best(lengths, max_length), key=len)


def _fill_exactly(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Begin each row with the longest example left, go on with the longest that fits, and end as soon as one example or
    two fill the row to the last token; of several such pairs the most equal, which leaves the most choice.
    """
    stock = _Stock(lengths, max_length)
    packs: list[list[int]] = []
    while stock.lengths:
        longest = stock.lengths.bit_length() - 1
        packs.append([stock.take(longest)])
        room = max_length - longest
        while room and (fitting := stock.lengths & ((2 << room) - 1)):
            first = stock.find_pair(room)
            # Without a pair the longest that fits, which fills the row if it can be filled by one.
            wanted = [first, room - first] if first and not fitting >> room else [fitting.bit_length() - 1]
            packs[-1] += [stock.take(length) for length in wanted]
            room -= sum(wanted)
    return packs


class _Stock:
    """The examples that have no row yet, by length."""

    def __init__(self, lengths: Sequence[int], max_length: int) -> None:
        self._max_length = max_length
        self._by_length: list[list[int]] = [[] for _ in range(max_length + 1)]
        for index in range(len(lengths) - 1, -1, -1):
            self._by_length[lengths[index]].append(index)
        self.lengths = sum(1 << length for length, held in enumerate(self._by_length) if held)
        """A bit for each length there is."""
        self._mirrored = sum(1 << max_length - length for length, held in enumerate(self._by_length) if held)

    def take(self, length: int) -> int:
        """Return the first example of this length."""
        held = self._by_length[length]
        index = held.pop()
        if not held:
            self.lengths ^= 1 << length
            self._mirrored ^= 1 << self._max_length - length
        return index

    def find_pair(self, total: int) -> int:
        """Return the longer of two lengths with this sum, as equal as there are; 0 if there are none."""
        half = (total + 1) // 2
        # Bit n of the shifted mirror: there is an example of `total - n`.
        pairs = (self.lengths & self._mirrored >> self._max_length - total) >> half
        if pairs & 1 and total == 2 * half and len(self._by_length[half]) < 2:
            pairs ^= 1
        return half + (pairs & -pairs).bit_length() - 1 if pairs else 0


def _fit_best(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Put the longest first, each into the fullest row it fits: best where few examples fit a row."""
    packs: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    rooms = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[index]
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            rooms ^= 0 if by_room[room] else 1 << room
            packs[number].append(index)
        else:
            room, number = max_length, len(packs)
            packs.append([index])
        if left := room - length:
            by_room[left].append(number)
            rooms |= 1 << left
    return packs


RECIPE_ACCUMULATION = 4
"""Accumulation of the recipe of origin; what `0` (automatic) keeps the examples per step of."""


def choose_batch(batch: int, accumulation: int, examples_per_row: float) -> tuple[int, int]:
    """Return the rows per pass and the passes per step of a rank: as written, or for an accumulation of 0 those that
    keep the recipe's examples per step.

    Where rows hold so many examples that one pass would be more than a step, a pass takes fewer rows than `batch`.
    """
    if accumulation > 0:
        return batch, accumulation
    rows = max(1, round(batch * RECIPE_ACCUMULATION / examples_per_row))
    passes = -(-rows // batch)
    return round(rows / passes), passes
