"""Rows of every format become the same conversations."""

from __future__ import annotations

import pytest

from finetune_trainer.data.formats import RowError, detect_format, parse_row

ALPACA = {"instruction": "Sort.", "input": "2, 1", "output": "1, 2"}
EVOL = {"instruction": "Sort 2, 1.", "output": "1, 2"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (ALPACA, "alpaca"),
        (EVOL, "evol"),
        (SHAREGPT, "sharegpt"),
        (MESSAGES, "messages"),
        ({"text": "x"}, None),
        ([], None),
    ],
)
def test_the_format_is_told_from_the_keys(row, name):
    assert detect_format(row, {}) == name


def test_mapped_names_tell_the_format_too():
    fields = {"instruction": "question", "output": "response"}
    row = {"question": "Hi", "response": "Hello"}
    assert detect_format(row, fields) == "evol"
    assert parse_row(row, "evol", fields).to_messages() == HELLO


@pytest.mark.parametrize("name", ["alpaca", "evol"])
def test_an_input_is_never_dropped(name):
    user, assistant = parse_row(ALPACA, name, {}).to_messages()
    assert user == {"role": "user", "content": "Sort.", "input": "2, 1"}
    assert assistant == {"role": "assistant", "content": "1, 2"}


def test_an_input_without_instruction_is_the_instruction():
    row = {"instruction": " ", "input": "Sort 2, 1.", "output": "1, 2"}
    assert parse_row(row, "alpaca", {}).to_messages()[0] == {"role": "user", "content": "Sort 2, 1."}


def test_conversations_become_messages():
    assert parse_row(SHAREGPT, "sharegpt", {}).to_messages() == HELLO
    assert parse_row(MESSAGES, "messages", {}).to_messages() == HELLO


def test_each_turn_knows_where_it_stood():
    assert [turn.field for turn in parse_row(ALPACA, "alpaca", {}).turns] == ["instruction", "output"]
    assert [turn.field for turn in parse_row(SHAREGPT, "sharegpt", {}).turns] == [
        "conversations[0].value",
        "conversations[1].value",
    ]


@pytest.mark.parametrize(
    ("row", "name", "why"),
    [
        ([], "alpaca", "expected an object, found a list"),
        ({"instruction": "x"}, "alpaca", "output is missing; found instruction"),
        ({"instruction": "x", "output": None}, "alpaca", "output: expected text, found null"),
        ({"instruction": "x", "output": 3}, "alpaca", "output: expected text, found a number"),
        ({"instruction": "", "output": "y"}, "alpaca", "instruction is empty"),
        ({"instruction": "x", "output": "\ud800"}, "alpaca", "output: half a surrogate pair at character 0"),
        ({"instr\ud800uction": "x"}, "alpaca", r"found instr\\ud800uction"),
        ({"messages": []}, "messages", "messages is empty"),
        ({"messages": "Hi"}, "messages", "messages: expected a list, found text"),
        ({"messages": ["Hi"]}, "messages", r"messages\[0\]: expected an object, found text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", r"messages\[0\].role: expected one of user"),
        ({"messages": [{"role": "x" * 50, "content": ""}]}, "messages", r"found 'x{40}'\.\.\.$"),
        ({"messages": [{"role": None, "content": ""}]}, "messages", "found null"),
        ({"messages": [{"role": "user"}]}, "messages", r"messages\[0\].content is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            r"messages\[0\].content\[0\]: only parts of type text",
        ),
        (MESSAGES, "sharegpt", "conversations is missing; found messages"),
        ({"conversations": [{"from": "human", "value": 1}]}, "sharegpt", r"conversations\[0\].value: expected text"),
    ],
)
def test_a_row_that_fits_not_says_which_field_is_at_fault(row, name, why):
    with pytest.raises(RowError, match=why):
        parse_row(row, name, {})
