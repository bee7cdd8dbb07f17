"""Which rows a rank reads in which pass: a pure function of seed, epoch and place, addressable anywhere in O(1).

Used by the trainer instead of PyTorch's samplers, which know where they are only by counting from the start of an
epoch. The order of an epoch is a keyed permutation of the row numbers: nothing is drawn in advance, kept or replayed,
no release of a library can change it, and it is the same for every number of ranks. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from finetune_trainer.training.tokens import IGNORED

_ROUNDS = 8
_FILLER_TOKENS = 8
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Permutation:
    """The shuffled order of one epoch: maps each place in `range(length)` to a row number, one to one.

    A Feistel network over the next even power of two; what falls outside `range(length)` is mapped again until it falls
    inside, which takes less than four turns on average.
    """

    length: int
    half_bits: int
    keys: tuple[int, ...]

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self.length:
            raise IndexError(place)
        number = self._scramble(place)
        while number >= self.length:
            number = self._scramble(number)
        return number

    def _scramble(self, number: int) -> int:
        mask = (1 << self.half_bits) - 1
        left, right = number >> self.half_bits, number & mask
        for key in self.keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return left << self.half_bits | right


@functools.lru_cache(maxsize=4)
def make_permutation(length: int, seed: int, epoch: int) -> Permutation:
    """Return the order of one epoch."""
    digest = hashlib.shake_128(f"rows of epoch {epoch} under seed {seed}".encode()).digest(8 * _ROUNDS)
    keys = tuple(int.from_bytes(digest[at : at + 8], "little") for at in range(0, len(digest), 8))
    return Permutation(length, max(1, (max(length - 1, 1).bit_length() + 1) // 2), keys)


def _mix(number: int) -> int:
    """Return 64 bits that all depend on all bits of `number` (two multiply-xorshift rounds)."""
    number = (number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    number = ((number ^ number >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    number = ((number ^ number >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return number ^ number >> 31


@dataclasses.dataclass(frozen=True)
class ReadPlan:
    """What one rank reads in an epoch, pass by pass; a pass is one forward and backward of every rank.

    An optimizer step over `passes x batch_size x num_ranks` rows takes the next so many of the epoch's order, however
    they are split over ranks and passes. The last step of an epoch takes what is left; no row is taken twice.
    """

    num_rows: int
    batch_size: int
    num_ranks: int
    rank: int
    seed: int

    @property
    def num_passes(self) -> int:
        """Passes of an epoch; the same on every rank."""
        return -(-self.num_rows // (self.batch_size * self.num_ranks))

    def rows(self, epoch: int, index: int) -> list[int]:
        """Return the row numbers of one pass: `batch_size` of them, fewer or none at the end of the epoch."""
        order = make_permutation(self.num_rows, self.seed, epoch)
        start = (index * self.num_ranks + self.rank) * self.batch_size
        return [order[place] for place in range(start, min(start + self.batch_size, self.num_rows))]


class RowLoader:
    """Iterates over the collated batches of one rank and epoch, in this process, from any pass on.

    It draws no random numbers, so that loading rows and resuming leave the generators of the training alone.
    """

    def __init__(
        self, dataset: Sequence[Row], collate: Callable[[list[Row]], Any], plan: ReadPlan, first_pass: int = 0
    ) -> None:
        self.dataset = dataset
        self._collate = collate
        self._plan = plan
        self._first_pass = first_pass
        self._epoch = 0

    def __len__(self) -> int:
        return self._plan.num_passes - self._first_pass

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self._epoch = epoch

    def starting_at(self, first_pass: int) -> RowLoader:
        """Return a loader that begins with pass `first_pass` of an epoch; the passes before it cost nothing."""
        return RowLoader(self.dataset, self._collate, self._plan, first_pass)

    def __iter__(self) -> Iterator[Any]:
        for index in range(self._first_pass, self._plan.num_passes):
            rows = [self.dataset[number] for number in self._plan.rows(self._epoch, index)]
            yield self._collate(rows or [self._build_filler()])

    def _build_filler(self) -> Row:
        """Return a row without loss, for a rank that has none left while others do: they pass together."""
        row = self.dataset[0]
        tokens = list(row["input_ids"][:_FILLER_TOKENS])
        return {"input_ids": tokens, "labels": [IGNORED] * len(tokens), "seq_lengths": [len(tokens)]}
