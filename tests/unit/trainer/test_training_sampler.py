"""The order of the rows: shuffled, the same for every number of ranks, and reached from anywhere without a replay."""

import collections
import itertools
import random

import pytest

from finetune_trainer.training.sampler import ReadPlan, RowLoader, make_permutation
from finetune_trainer.training.tokens import IGNORED


class CountedRows:
    """A data set of any length whose rows are made when they are read."""

    def __init__(self, length):
        self.length = length
        self.num_reads = 0

    def __len__(self):
        return self.length

    def __getitem__(self, number):
        self.num_reads += 1
        return {"input_ids": [number] * 3, "labels": [number] * 3, "seq_lengths": [3]}


def plan_of(rank, num_rows=37, batch_size=2, num_ranks=3):
    return ReadPlan(num_rows, batch_size, num_ranks, rank, seed=7)


def collate(rows):
    return [(row["input_ids"][0], row["labels"][0]) for row in rows]


def read_epoch(loader, epoch):
    loader.set_epoch(epoch)
    return list(loader)


def rows_of_step(plans, epoch, step, accumulation):
    """Return all rows that the ranks read in one optimizer step."""
    passes = range(step * accumulation, min((step + 1) * accumulation, plans[0].num_passes))
    return sorted(itertools.chain.from_iterable(plan.rows(epoch, index) for index in passes for plan in plans))


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 1000])
def test_an_epoch_holds_every_row_once(length):
    order = make_permutation(length, seed=1, epoch=0)
    assert sorted(order[place] for place in range(length)) == list(range(length))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [
        tuple(make_permutation(50, seed, epoch)[place] for place in range(50)) for seed in (1, 2) for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4


def test_the_order_never_changes_between_releases():
    # A running job is resumed by the next release's image: another order would repeat some rows and drop others.
    order = make_permutation(10, seed=42, epoch=3)
    assert [order[place] for place in range(10)] == [7, 0, 3, 8, 1, 4, 2, 6, 5, 9]


def test_every_order_of_few_rows_occurs_about_equally_often():
    counts = collections.Counter(
        tuple(make_permutation(4, seed, 0)[place] for place in range(4)) for seed in range(24 * 200)
    )
    assert len(counts) == 24
    # Chi-square with 23 degrees of freedom: 49.7 is the 99.9 % point, and the seeds are fixed.
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 49.7


def test_neighbours_in_the_data_are_strangers_in_the_order():
    length = 997
    distances = []
    for epoch in range(10):
        order = make_permutation(length, seed=5, epoch=epoch)
        distances += [abs(order[place + 1] - order[place]) for place in range(length - 1)]
    # Two random rows are a third of the length apart on average.
    assert abs(sum(distances) / len(distances) / length - 1 / 3) < 0.01


@pytest.mark.parametrize("num_rows", [1, 5, 36, 37, 42])
def test_the_ranks_share_an_epoch_without_overlap_in_equally_many_passes(num_rows):
    plans = [plan_of(rank, num_rows) for rank in range(3)]
    read = [number for plan in plans for index in range(plan.num_passes) for number in plan.rows(0, index)]
    assert sorted(read) == list(range(num_rows))
    assert len({plan.num_passes for plan in plans}) == 1


@pytest.mark.parametrize(("batch_size", "num_ranks", "accumulation"), [(8, 1, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2)])
def test_an_optimizer_step_takes_the_same_rows_however_they_are_split(batch_size, num_ranks, accumulation):
    whole = [ReadPlan(37, 2, 4, rank, 7) for rank in range(4)]
    split = [ReadPlan(37, batch_size, num_ranks, rank, 7) for rank in range(num_ranks)]
    for epoch, step in itertools.product(range(2), range(5)):
        assert rows_of_step(split, epoch, step, accumulation) == rows_of_step(whole, epoch, step, 1)


def test_a_loader_that_starts_anywhere_goes_on_as_one_that_did_not_stop():
    chance = random.Random(3)
    rows = CountedRows(37)
    for rank, epoch in itertools.product(range(3), range(4)):
        loader = RowLoader(rows, collate, plan_of(rank))
        whole = read_epoch(loader, epoch)
        assert len(loader) == len(whole)
        for first in (0, chance.randrange(len(whole)), len(whole) - 1):
            resumed = loader.starting_at(first)
            assert read_epoch(resumed, epoch) == whole[first:]
            assert len(resumed) == len(whole) - first


def test_a_rank_without_rows_left_takes_part_with_a_row_that_teaches_nothing():
    loader = RowLoader(CountedRows(5), collate, ReadPlan(5, 2, 4, rank=3, seed=0))
    assert read_epoch(loader, 0) == [[(0, IGNORED)]]


def test_resuming_far_into_a_huge_data_set_reads_the_rows_of_one_batch():
    rows = CountedRows(10**12)
    loader = RowLoader(rows, collate, ReadPlan(10**12, 4, 2, rank=1, seed=0)).starting_at(10**5)
    loader.set_epoch(2)
    assert len(next(iter(loader))) == 4
    assert rows.num_reads == 4
