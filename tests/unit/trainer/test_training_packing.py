"""Which examples share a row: dense, complete, and the same every time."""

import builtins
import inspect
import math
import pathlib
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune_trainer.training.packing import choose_batch, pack_lengths

ROLEPLAY = pathlib.Path(__file__).resolve().parents[2] / "data" / "instructions" / "roleplay-lengths.txt"
MODULES = (builtins, inspect, math, pathlib, random, st, pytest)


def read_documentation():
    """Return the lengths in tokens of text that people wrote: about four characters a token."""
    owners = {*MODULES, *(each for module in MODULES for each in vars(module).values() if inspect.isclass(each))}
    texts = {inspect.getdoc(each) or "" for owner in owners for each in vars(owner).values() if callable(each)}
    return sorted(10 + len(text) // 4 for text in texts)


def draw_lengths(count):
    """Return lengths as the recipe's rows have them: lognormal, 530 tokens on average."""
    draw = random.Random(1).lognormvariate
    return [max(8, round(draw(math.log(400), 0.72))) for _ in range(count)]


def share_of(lengths, max_length):
    lengths = [min(length, max_length) for length in lengths]
    return sum(lengths) / (len(pack_lengths(lengths, max_length)) * max_length)


def test_rows_of_real_lengths_are_full():
    assert share_of(draw_lengths(10_000), 2048) >= 0.999
    documentation = read_documentation()
    assert len(documentation) > 1000
    assert share_of(documentation, 512) >= 0.995


def test_rows_of_a_real_instruction_set_are_full():
    lines = ROLEPLAY.read_text(encoding="utf-8").splitlines()[1:]
    # Four characters to a token, and ten tokens of the prompt's own.
    assert share_of([10 + int(number) // 4 for line in lines for number in line.split()], 2048) >= 0.995


@pytest.mark.parametrize("lengths", [[18, 13, 10, 7, 6, 6], [20, 11, 11, 8, 5, 4]])
def test_whichever_way_needs_fewer_rows_is_taken(lengths):
    # Best fit alone needs three rows for the first, filling rows exactly three for the second.
    assert len(pack_lengths(lengths, 30)) == 2


@given(st.lists(st.integers(1, 50), max_size=80))
@example([25, 25, 25])
@example([50, 50])
@example([20, 10, 10, 10, 5, 5])
def test_every_example_has_one_place_and_no_row_is_too_long(lengths):
    packs = pack_lengths(lengths, 50)

    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in pack) <= 50 for pack in packs)
    assert packs == pack_lengths(list(lengths), 50)
    # Whatever is left at the end would have fitted the emptiest row.
    assert sum(sum(lengths[index] for index in pack) <= 25 for pack in packs) <= 1


@pytest.mark.parametrize("batch", [1, 4, 8])
@pytest.mark.parametrize("max_length", [512, 2048, 8192])
def test_automatic_accumulation_keeps_the_recipe_s_examples_per_step(batch, max_length):
    for lengths in (draw_lengths(5000), read_documentation()):
        num_rows = len(pack_lengths([min(length, max_length) for length in lengths], max_length))
        examples_per_row = len(lengths) / num_rows

        rows, passes = choose_batch(batch, 0, examples_per_row)

        # As near as whole rows allow: half a row off at most, and half a row a pass where the passes are to be equal.
        assert 1 <= rows <= batch
        assert abs(rows * passes - 4 * batch / examples_per_row) <= max(1.0, 0.5 + passes / 2)


def test_a_step_has_the_passes_that_are_written_and_four_where_each_row_is_an_example():
    assert choose_batch(8, 6, 9.0) == (8, 6)
    assert choose_batch(8, 0, 1.0) == (8, 4)
    # Four examples a row: one pass is a step. Ten: a pass of all rows would be two and a half.
    assert choose_batch(8, 0, 4.0) == (8, 1)
    assert choose_batch(8, 0, 10.0) == (3, 1)
