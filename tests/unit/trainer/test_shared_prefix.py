"""Rows that hold sequences as a tree: what a token sees is its own sequence, and shared beginnings stand there once."""

import random

import pytest

from finetune_trainer.evaluation.shared_prefix import Request, build_rows


def read_back(row, places):
    """Return the tokens that the last place sees, itself included, and check their positions."""
    last = places[-1]
    seen = [place for place in range(last + 1) if last < row.ends[place]]
    assert [row.positions[place] for place in seen] == list(range(len(seen)))
    return [row.tokens[place] for place in seen]


def draw(seed, count):
    rng = random.Random(seed)
    contexts = [[rng.randrange(3) for _ in range(rng.randint(1, 9))] for _ in range(count // 3)]
    return [Request(rng.choice(contexts), [rng.randrange(3) for _ in range(rng.randint(1, 4))]) for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("row_tokens", [1, 12, 1000])
def test_each_request_sees_its_own_tokens_and_is_scored_where_they_are_predicted(seed, row_tokens):
    requests = draw(seed, 40)

    rows = build_rows(requests, max_length=100, row_tokens=row_tokens)

    found = {index: (row, places) for row in rows for index, places in row.scored.items()}
    assert sorted(found) == list(range(len(requests)))
    for index, (row, places) in found.items():
        request = requests[index]
        assert read_back(row, places) == [*request.context, *request.continuation][:-1]
        assert len(places) == len(request.continuation)
        assert row.positions[places[0]] == len(request.context) - 1


def test_choices_share_their_question_and_questions_their_examples():
    examples, questions = list(range(50)), ([100, 101], [110, 111, 112])
    requests = [Request([*examples, *question], [200 + n, 300]) for question in questions for n in range(4)]

    (row,) = build_rows(requests, max_length=1000)

    assert len(row.tokens) == 50 + (2 + 4) + (3 + 4)


def test_continuations_of_one_token_need_no_place_of_their_own():
    (row,) = build_rows([Request([1, 2, 3], [n]) for n in range(4)], max_length=10)

    assert row.tokens == [1, 2, 3]
    assert [row.scored[n] for n in range(4)] == [[2]] * 4


def test_a_row_grows_to_its_limit_only_and_strangers_have_rows_of_their_own():
    shared = list(range(10))
    requests = [Request([*shared, 20 + n], [1, 2, 3]) for n in range(10)]

    assert [len(row.scored) for row in build_rows(requests, 100, row_tokens=30)] == [6, 4]
    assert len(build_rows([Request([n] * 5, [1]) for n in range(3)], 100)) == 3


def test_a_context_too_long_is_cut_from_the_left():
    (row,) = build_rows([Request(list(range(20)), [97, 98, 99])], max_length=8)

    assert row.tokens == [14, 15, 16, 17, 18, 19, 97, 98]
    assert row.scored == {0: [5, 6, 7]}
