"""Duplicates: which rows count as equal or nearly equal, and an index on disk that survives growth and crashes."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_contract.run_config import QualityConfig
from finetune_trainer.data import duplicate_index
from finetune_trainer.data.duplicate_index import DamagedIndexError, DuplicateIndex
from finetune_trainer.data.duplicates import NUM_HASHES, choose_banding, fingerprint
from finetune_trainer.data.formats import Conversation, Turn

EXACT = QualityConfig(duplicates="remove-row")
NEAR = QualityConfig(duplicates="remove-row", similarity=0.8)
WORDS = [f"word{number}" for number in range(5000)]


def ask(question: str, answer: str) -> Conversation:
    return Conversation((Turn("user", question, "instruction"), Turn("assistant", answer, "output")))


def make_pair(similarity: float, size: int, rng: random.Random) -> tuple[Conversation, Conversation]:
    """Two rows whose sets of word triples overlap by about this Jaccard similarity."""
    shared = round(2 * size * similarity / (1 + similarity))
    words = rng.choices(WORDS, k=2 * size)
    one, other = words[:size], words[:shared] + words[size : 2 * size - shared]
    return ask("Tell me.", " ".join(one)), ask("Tell me.", " ".join(other))


def random_prints(count: int, config: QualityConfig, seed: int = 1) -> list[bytes]:
    size = choose_banding(config.similarity).size
    data = np.random.Generator(np.random.PCG64(seed)).bytes(size * count)
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize("config", [EXACT, NEAR])
@pytest.mark.parametrize(
    "other",
    [
        ("What is it?", "It's a boat."),
        ("what is it?", "IT\u2019S a boat."),
        ("What  is it?", "It's a\u00a0boat."),
        ("What is it?\n", "It's a boat."),
    ],
)
def test_rows_that_differ_in_case_quotes_and_spaces_are_equal(config, other):
    assert fingerprint(ask(*other), config) == fingerprint(ask("What is it?", "It's a boat."), config)


@pytest.mark.parametrize("config", [EXACT, NEAR])
@pytest.mark.parametrize(
    "other",
    [
        ("What is it?", "It's a ship."),
        ("What was it?", "It's a boat."),
        ("What is it? It's a boat.", ""),
        ("It's a boat.", "What is it?"),
    ],
)
def test_rows_that_say_other_things_are_not_equal(config, other):
    banding = choose_banding(config.similarity)
    one, two = fingerprint(ask(*other), config), fingerprint(ask("What is it?", "It's a boat."), config)
    assert not banding.is_duplicate(one, two)


def test_a_fingerprint_is_the_same_in_every_process_and_for_a_long_row():
    row = ask("Count.", " ".join(WORDS) * 3)
    assert len(fingerprint(row, NEAR)) == NUM_HASHES
    assert hashlib.sha256(fingerprint(row, NEAR)).hexdigest().startswith("ccd6f4f28ec4b171")
    assert fingerprint(row, EXACT).hex().startswith("3368b0a95a765511")


@pytest.mark.parametrize(("similarity", "bands", "width"), [(1.0, 1, 16), (0.9, 7, 9), (0.8, 10, 6), (0.5, 32, 2)])
def test_bands_are_as_wide_as_the_wanted_similarity_allows(similarity, bands, width):
    banding = choose_banding(similarity)
    assert (banding.bands, banding.width) == (bands, width)


@pytest.mark.parametrize(("similarity", "least", "most"), [(0.95, 0.97, 1.0), (0.6, 0.0, 0.03), (0.2, 0.0, 0.0)])
def test_near_rows_are_found_and_others_are_not(tmp_path, similarity, least, most):
    rng, found, pairs = random.Random(3), 0, 100
    with DuplicateIndex(tmp_path, NEAR) as index:
        for number in range(pairs):
            one, other = make_pair(similarity, 200, rng)
            assert index.find_or_add(fingerprint(one, NEAR), 2 * number) is None
            found += index.find_or_add(fingerprint(other, NEAR), 2 * number + 1) == 2 * number
    assert least <= found / pairs <= most


@pytest.mark.parametrize("config", [EXACT, NEAR])
def test_the_first_place_is_told_also_after_the_table_has_grown(tmp_path, config, monkeypatch):
    monkeypatch.setattr(duplicate_index, "FIRST_BITS", 6)
    monkeypatch.setattr(duplicate_index, "_CHUNK", 64)
    prints = random_prints(1500, config)
    with DuplicateIndex(tmp_path, config) as index:
        assert [index.find_or_add(each, place) for place, each in enumerate(prints)] == [None] * len(prints)
        again = [index.find_or_add(each, place) for place, each in enumerate(prints, start=len(prints))]
        assert again == list(range(len(prints)))
        assert index.num_rows == len(prints)
    assert (
        np.count_nonzero(np.fromfile(tmp_path / "table", "<u8"))
        == len(prints) * choose_banding(config.similarity).bands
    )
    assert (tmp_path / "table").stat().st_size > 8 * (1 << 10)


def test_only_what_was_committed_is_there_after_a_crash(tmp_path):
    prints = random_prints(30, EXACT)
    with DuplicateIndex(tmp_path, EXACT) as index:
        for place, each in enumerate(prints):
            if place == 10:
                index.commit()
            index.find_or_add(each, place)
    with DuplicateIndex(tmp_path, EXACT) as index:
        assert index.num_rows == 10
        answers = [index.find_or_add(each, 100 + place) for place, each in enumerate(prints)]
    assert answers == [*range(10), *[None] * 20]


def test_rows_that_are_asked_for_again_are_no_duplicates_of_themselves(tmp_path):
    prints = random_prints(5, EXACT)
    with DuplicateIndex(tmp_path, EXACT) as index:
        for place, each in enumerate([*prints, prints[0]]):
            index.find_or_add(each, place)
        index.commit()
    with DuplicateIndex(tmp_path, EXACT) as index:
        again = [index.find_or_add(each, place) for place, each in enumerate([*prints, prints[0]])]
        assert again == [*[None] * 5, 0]
        assert index.num_rows == 5


def test_a_later_row_makes_no_earlier_one_a_duplicate(tmp_path):
    (mark,) = random_prints(1, EXACT)
    with DuplicateIndex(tmp_path, EXACT) as index:
        assert index.find_or_add(mark, 5) is None
        assert index.find_or_add(mark, 3) is None


def test_rows_that_were_forgotten_leave_no_trace(tmp_path):
    asked = bytearray(random_prints(1, NEAR)[0])
    kept, forgotten = bytearray(asked), bytes(asked[:6]) + random_prints(1, NEAR, seed=2)[0][6:]
    for band in range(10):
        kept[6 * band] ^= 1
    with DuplicateIndex(tmp_path, NEAR) as index:
        index.find_or_add(random_prints(1, NEAR, seed=3)[0], 0)
        index.commit()
        index.find_or_add(forgotten, 1)
        index.rollback()
        index.find_or_add(bytes(kept), 2)
        # Alike enough, but in no band: only a slot of the forgotten row could lead there.
        assert index.find_or_add(bytes(asked), 3) is None


def test_another_similarity_begins_anew(tmp_path):
    with DuplicateIndex(tmp_path, EXACT) as index:
        index.find_or_add(random_prints(1, EXACT)[0], 0)
        index.commit()
    with DuplicateIndex(tmp_path, NEAR) as index:
        assert index.num_rows == 0


@pytest.mark.parametrize("name", ["records", "table", "state.json"])
def test_files_that_lost_rows_are_refused(tmp_path, name):
    with DuplicateIndex(tmp_path, EXACT) as index:
        for place, each in enumerate(random_prints(5, EXACT)):
            index.find_or_add(each, place)
        index.commit()
    (tmp_path / name).write_bytes(b"" if name != "state.json" else b"{")
    with pytest.raises(DamagedIndexError):
        DuplicateIndex(tmp_path, EXACT)


def test_many_rows_from_one_template_stay_within_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicate_index, "MAX_CHAIN", 4)
    rng = random.Random(5)
    prints = [bytes(48) + rng.randbytes(16) for _ in range(300)]
    near = QualityConfig(duplicates="flag", similarity=0.9)
    with DuplicateIndex(tmp_path, near) as index:
        for place, each in enumerate(prints):
            index.find_or_add(each, place)
        slots = np.fromfile(tmp_path / "table", "<u8")
        assert index.num_rows == 300
    assert np.count_nonzero(slots) < 300 * 7 - 4 * 296


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12) | st.just("commit") | st.just("rollback") | st.just("reopen"), max_size=60))
def test_the_index_answers_as_a_dictionary_would(tmp_path_factory, steps):
    prints = random_prints(13, NEAR)
    path = tmp_path_factory.mktemp("index")
    known: dict[int, int] = {}
    committed: dict[int, int] = {}
    index = DuplicateIndex(path, NEAR)
    for place, step in enumerate(steps):
        if step == "commit":
            index.commit()
            committed = dict(known)
        elif step == "rollback":
            index.rollback()
            known = dict(committed)
        elif step == "reopen":
            index.close()
            index = DuplicateIndex(path, NEAR)
            known = dict(committed)
        else:
            assert index.find_or_add(prints[step], place) == known.get(step)
            known.setdefault(step, place)
    index.close()
