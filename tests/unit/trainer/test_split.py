"""The split depends on the rows and the seed alone."""

from __future__ import annotations

from finetune_trainer.data.split import holdout_share, select_copies


def messages(question, answer="a"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_about_the_asked_share_is_held_out():
    held_out = sum(holdout_share(messages(f"question {n}"), 42) < 0.1 for n in range(5000))
    assert 400 < held_out < 600


def test_rows_with_one_prompt_stand_on_one_side():
    assert holdout_share(messages("q", "a"), 1) == holdout_share(messages("q", "b"), 1)
    assert holdout_share(messages("q"), 1) != holdout_share(messages("q"), 2)


def test_an_input_is_part_of_the_prompt():
    with_input = [{"role": "user", "content": "q", "input": "x"}]
    assert holdout_share(with_input, 1) != holdout_share([{"role": "user", "content": "q"}], 1)


def test_weights_take_halves_and_doubles():
    assert {select_copies(2.0, 1, 0, n) for n in range(100)} == {2}
    assert {select_copies(1.0, 1, 0, n) for n in range(100)} == {1}
    assert 400 < sum(select_copies(0.5, 1, 0, n) for n in range(1000)) < 600
    assert 2400 < sum(select_copies(2.5, 1, 0, n) for n in range(1000)) < 2600
    assert sum(select_copies(0.0, 1, 0, n) for n in range(100)) == 0
