"""Labelled rows for a judge: read in every format, and refused by line and field."""

from __future__ import annotations

import json

import pytest

from finetune_trainer.data.labelled import read_labelled
from finetune_trainer.errors import TrainerError

KEEP = {"instruction": "Add.", "input": "1, 2", "output": "3", "label": "keep"}
REMOVE = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Help."},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why?"},
    ],
    "label": "remove",
}


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_rows_of_every_format_are_read_as_the_text_that_a_judge_sees(tmp_path):
    paths = [write(tmp_path / "a.jsonl", KEEP), write(tmp_path / "b.jsonl", REMOVE)]
    rows = read_labelled(paths, "{instruction}|{output}", seed=1)
    assert [(row.text, row.label) for row in rows] == [("Add.\n1, 2|3", 0), ("Help.|No.", 1)]


def test_rows_of_one_prompt_are_held_back_together(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{**KEEP, "output": str(n)} for n in range(5)], REMOVE)
    rows = read_labelled([path], "{output}", seed=1)
    assert len({row.share for row in rows[:5]}) == 1
    assert read_labelled([path], "{output}", seed=2)[0].share != rows[0].share


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 2: "),
        ({"instruction": "a", "output": "b"}, "line 2: label: expected keep or remove, found None"),
        ({**KEEP, "label": "maybe"}, "line 2: label: expected keep or remove, found 'maybe'"),
        ({**KEEP, "label": ["x"]}, "line 2: label: expected keep or remove"),
        ({**KEEP, "output": 3}, "line 2: output: expected text, found a number"),
        (
            {"text": "a", "label": "keep"},
            "line 2: neither instruction and output nor a conversation; found text, label",
        ),
        ({"messages": [{"role": "user", "content": "a"}], "label": "keep"}, "line 2: no answer to judge"),
    ],
)
def test_a_row_that_cannot_be_learned_from_is_named_by_line_and_field(tmp_path, row, said):
    path = write(tmp_path / "a.jsonl", KEEP, row)
    with pytest.raises(TrainerError) as refused:
        read_labelled([path], "{output}", seed=1)
    assert refused.value.message.startswith(f"--data {path} {said}")


def test_rows_of_one_label_teach_nothing(tmp_path):
    with pytest.raises(TrainerError, match="no row is labelled remove"):
        read_labelled([write(tmp_path / "a.jsonl", KEEP)], "{output}", seed=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--text", "{answer}"), "Write {output}"),
        (("--held-back", "1"), "less than 1"),
        (("--epochs", "0"), "Write 1 or more"),
        (("--learning-rate", "2"), "less than 1"),
        (("--out", "."), "Name a new folder"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused_before_anything_is_read(run_command, capsys, options, said):
    outcome = run_command("judge", "train", "--data", "none", "--base", "none", "--out", "none", *options)
    assert outcome.code == 64
    assert said in capsys.readouterr().err
