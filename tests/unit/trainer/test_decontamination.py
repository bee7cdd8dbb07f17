"""Decontamination: rows that share a run of words with an evaluation task, and rows that merely resemble one."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_contract.run_config import QualityConfig
from finetune_trainer.data.decontamination import MAX_TEXTS, make_index
from finetune_trainer.data.formats import Conversation, Turn

CONFIG = QualityConfig(contamination="remove-row")
TASK = (
    "A baker has seven trays with twelve rolls each and sells half of all the rolls before nine in the morning. "
    "How many rolls are left?"
)
SHORT = "Which planet has the most moons in the solar system?"


def ask(question: str, answer: str = "Thirty.", added: str = "") -> Conversation:
    return Conversation((Turn("user", question, "instruction", added, "input"), Turn("assistant", answer, "output")))


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (ask(TASK), "instruction"),
        (ask("Solve: " + TASK.upper()), "instruction"),
        (ask("Copy.", "He said:\n\n" + TASK.replace(" ", "\n")), "output"),
        (ask("Solve it.", "Yes.", TASK), "input"),
        (ask("Say: seven trays with twelve rolls each, and sells half of all the rolls!"), "instruction"),
        (ask(f"A quiz. {SHORT} Tell me."), "instruction"),
    ],
)
def test_a_row_that_holds_a_task_is_found(row, field):
    found = make_index([TASK, SHORT], CONFIG).find(row)
    assert found is not None
    assert (found.rule, found.category, found.field, found.action) == (
        *("task-overlap", "contamination"),
        *(field, "remove-row"),
    )


@pytest.mark.parametrize(
    "row",
    [
        ask("A baker has seven trays with twelve rolls each and sells a third of them."),
        ask("Which planet has the most moons?"),
        ask("In the solar system, which planet has the most moons in the"),
        ask("", ""),
    ],
)
def test_a_row_that_shares_fewer_words_is_left_alone(row):
    assert make_index([TASK, SHORT], CONFIG).find(row) is None


def test_the_span_is_what_is_shared_in_the_row_as_it_was_read():
    text = "Now \u201cA  Baker has seven trays\u201d with twelve rolls each and sells half of it"
    found = make_index([TASK], CONFIG).find(ask(text))
    assert found is not None
    assert text[slice(*found.span)] == "A  Baker has seven trays\u201d with twelve rolls each and sells half of"


def test_texts_in_scripts_without_spaces_are_compared_by_character():
    task = "\u9762\u5305\u5e08\u6709\u4e03\u4e2a\u70e4\u76d8\u6bcf\u4e2a\u70e4\u76d8\u4e0a\u6709\u5341\u4e8c\u4e2a"
    index = make_index([task], CONFIG)
    assert index.find(ask("\u95ee\u9898\u3002" + task))
    assert not index.find(ask(task[:10]))


def test_boilerplate_of_the_tasks_is_no_contamination():
    header = "The following is a question with four choices of which exactly one is right for every reader. "
    texts = [f"{header}Question {number} about {number * 7} boats." for number in range(MAX_TEXTS + 1)]
    index = make_index(texts, CONFIG)
    assert not index.find(ask(header))
    assert make_index(texts[:2], CONFIG).find(ask(header))


def test_texts_too_short_to_say_anything_are_not_looked_for():
    assert not make_index(["What is the capital of France?"], CONFIG).find(ask("What is the capital of France?"))


def test_the_digest_names_the_texts_and_the_index_travels_to_workers():
    one, other = make_index([TASK], CONFIG), make_index([TASK + " And then?"], CONFIG)
    assert one.digest == make_index([TASK.upper()], CONFIG).digest != other.digest
    assert pickle.loads(pickle.dumps(one)).find(ask(TASK)) == one.find(ask(TASK))


NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


@given(st.lists(st.sampled_from(NUMBERS), max_size=60), st.integers(0, 40))
def test_a_row_is_found_if_and_only_if_it_shares_a_run(words, start):
    config = QualityConfig(contamination="flag", contamination_words=8)
    task = ["one", "three", "five", "seven", "two", "four", "six", "eight", "one", "one", "two", "two"]
    row = words[:start] + task[2:10] + words[start:]
    index = make_index([" ".join(task)], config)
    assert index.find(ask(" ".join(row), "x")) is not None
    runs = {tuple(task[at : at + 8]) for at in range(len(task) - 7)}
    shares = any(tuple(words[at : at + 8]) in runs for at in range(len(words)))
    assert (index.find(ask(" ".join(words), "x")) is not None) == shares
