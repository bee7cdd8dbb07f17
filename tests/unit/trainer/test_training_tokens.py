"""Rows as tokens with masked labels, truncation, and packs; with a tokenizer of one token per character."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_contract.reports import ExitCode
from finetune_trainer.errors import TrainerError
from finetune_trainer.training import tokens
from finetune_trainer.training.tokens import IGNORED, TokenizedRows


class Characters:
    """A tokenizer with one token per character; 1 begins and 2 ends a text."""

    bos_token, bos_token_id = "\x01", 1
    eos_token, eos_token_id = "\x02", 2
    chat_template = None

    def __init__(self):
        self.num_calls = 0

    def __call__(self, text, *, add_special_tokens):
        self.num_calls += 1
        if isinstance(text, str):
            return {"input_ids": ([1] if add_special_tokens else []) + [ord(c) for c in text]}
        return {"input_ids": [self(one, add_special_tokens=add_special_tokens)["input_ids"] for one in text]}


def _row(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _tokenize(rows, max_length=1000, template="wizardlm"):
    return tokens.tokenize(rows, template, Characters(), max_length)


def _learned(row):
    return "".join(chr(label) if label > 2 else "$" for label in row.labels if label != IGNORED)


def test_the_loss_is_taken_on_the_answer_and_its_end_only():
    (row,) = _tokenize([_row("Hi?", "Yes.")]).rows

    assert "".join(map(chr, row.input_ids[1:-1])) == "Hi?\n\n### Response:Yes."
    assert (row.input_ids[0], row.input_ids[-1]) == (1, 2)
    assert _learned(row) == "Yes.$"
    assert [label for label in row.labels if label != IGNORED] == list(row.input_ids[-5:])


def test_every_answer_of_a_conversation_is_learned():
    (row,) = _tokenize([_row("A?", "aa") + _row("B?", "bb")]).rows

    assert _learned(row) == "aa$bb$"


def test_a_prompt_that_leaves_no_room_for_an_answer_is_dropped_and_counted():
    prompt = "x" * 50
    whole = 1 + len(prompt + "\n\n### Response:")

    result = _tokenize([_row(prompt, "answer"), _row("short", "answer")], max_length=whole)

    assert (len(result.rows), result.num_dropped, result.num_truncated) == (1, 1, 0)
    assert _learned(result.rows[0]) == "answer$"


def test_a_long_answer_is_cut_and_counted():
    result = _tokenize([_row("q", "a" * 500)], max_length=100)

    assert (len(result.rows[0].input_ids), result.num_truncated, result.num_dropped) == (100, 1, 0)
    assert set(_learned(result.rows[0])) == {"a"}


def test_a_long_conversation_loses_its_end_and_no_answer_the_context_before_it():
    chat = [{"role": "system", "content": "Be brief."}, *_row("A?", "aa"), *_row("B?", "bbbbbb"), *_row("C?", "cc")]
    (whole,) = _tokenize([chat]).rows
    ends = [place + 1 for place, token in enumerate(whole.input_ids) if token == 2]

    for max_length in range(ends[0], len(whole.input_ids)):
        (row,) = _tokenize([chat], max_length).rows

        # A beginning of the whole, up to the last token that is learned within the length.
        assert row.input_ids == whole.input_ids[: len(row.input_ids)]
        assert row.labels == whole.labels[: len(row.input_ids)]
        assert row.labels[-1] != IGNORED
        assert set(whole.labels[len(row.labels) : max_length]) <= {IGNORED}
    assert _tokenize([chat], ends[2]).num_truncated == 0
    assert _tokenize([chat], ends[2] - 1).num_truncated == 1


def test_a_question_without_an_answer_at_the_end_takes_no_room():
    (row,) = _tokenize([_row("A?", "aa") + _row("B?", "")[:1]]).rows

    assert _learned(row) == "aa$"
    assert row.input_ids[-1] == 2


def test_an_empty_answer_teaches_its_end():
    (row,) = _tokenize([_row("A?", "")]).rows

    assert _learned(row) == "$"


turns_strategy = st.lists(st.tuples(st.text("ab", max_size=30), st.text("cd", max_size=30)), max_size=3)


@given(st.lists(turns_strategy, max_size=5), st.integers(1, 60), st.sampled_from(["wizardlm", "{instruction}"]))
def test_no_row_is_without_a_learned_token_and_none_is_lost_uncounted(chats, max_length, template):
    result = _tokenize(
        [[message for turn in turns for message in _row(*turn)] for turns in chats], max_length, template
    )

    assert len(result.rows) + result.num_dropped == len(chats)
    for row in result.rows:
        assert any(label != IGNORED for label in row.labels[1:])
        assert row.labels[0] == IGNORED
        assert len(row.input_ids) == len(row.labels) <= max_length


def test_the_tokenizer_is_called_per_chunk_not_per_row():
    tokenizer = Characters()
    tokenizer.__class__ = type("Counting", (Characters,), {"__call__": _count_outer})

    tokens.tokenize([_row(f"q{i}", f"a{i}") for i in range(500)], "wizardlm", tokenizer, 100)

    assert tokenizer.num_calls <= 4


def _count_outer(self, text, *, add_special_tokens):
    self.num_calls += 1
    return Characters()(text, add_special_tokens=add_special_tokens)


rows_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def _rows_of(lengths):
    return _tokenize([_row("", "abcdefghijklmnopqrstuvwxyz"[: n % 26 + 1] * 2) for n in lengths])


@given(rows_strategy, st.integers(75, 300))
def test_packing_loses_nothing_and_fills_no_row_beyond_its_length(lengths, max_length):
    rows = _rows_of(lengths)

    packed = tokens.pack(rows, max_length)

    assert all(len(row.input_ids) <= max_length for row in packed.rows)
    assert packed.num_tokens == rows.num_tokens
    assert packed.num_examples == len(rows.rows)
    cut = sorted(piece for row in packed.rows for piece in _pieces(row))
    assert cut == sorted((tuple(row.input_ids), tuple(row.labels)) for row in rows.rows)


def _pieces(row):
    start = 0
    for length in row.lengths:
        yield tuple(row.input_ids[start : start + length]), tuple(row.labels[start : start + length])
        start += length


@given(rows_strategy)
def test_packs_are_dense_and_the_same_every_time(lengths):
    rows = _rows_of(lengths)

    packed = tokens.pack(rows, 200)

    # Best fit leaves at most one row less than half full.
    assert sum(len(row.input_ids) <= 100 for row in packed.rows) <= 1
    assert packed == tokens.pack(rows, 200)


def test_labels_of_a_pack_never_cross_from_one_example_to_the_next():
    packed = tokens.pack(_tokenize([_row("q", "aa"), _row("r", "bb")]), 200)
    (row,) = packed.rows

    assert row.labels[0] == row.labels[row.lengths[0]] == IGNORED


def test_a_broken_line_is_named(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"messages": _row("a", "b")}) + "\n{broken\n")

    with pytest.raises(TrainerError) as caught:
        list(tokens.read_conversations(file))

    assert caught.value.exit_code == ExitCode.DATA
    assert f"{file}, line 2" in caught.value.message


def test_missing_rows_say_what_to_run_first(tmp_path):
    with pytest.raises(TrainerError, match="cannot be read") as caught:
        list(tokens.read_conversations(tmp_path / "train.jsonl"))

    assert "finetune-trainer prepare" in caught.value.hint
    assert TokenizedRows([]).num_tokens == 0


@pytest.mark.parametrize("template", ["wizardlm", "tokenizer"])
def test_a_row_that_cannot_be_rendered_is_named(template):
    class Strict(Characters):
        chat_template = "{{ messages }}"

        def apply_chat_template(self, messages, **_options):
            if messages[0]["role"] != "user":
                raise ValueError("roles must alternate")
            return "A?aa"[: 2 * len(messages)]

    rows = [_row("A?", "aa"), [{"role": "nobody"}, _row("A?", "aa")[1]]]
    with pytest.raises(TrainerError, match="line 2 of the prepared rows cannot be rendered") as caught:
        tokens.tokenize(rows, template, Strict(), 100)
    assert caught.value.exit_code == ExitCode.DATA
