"""Prepared rows as tokens with masked labels, and packs of them; needs no torch.

Called once by the supervisor before it forks, so that the ranks share one copy. Rendering is `data.prompts` alone; this
module only batches the calls, truncates, counts what it drops, and packs.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.data.prompts import Message, Stretch, encode_stretches, list_texts, render_examples
from finetune_trainer.errors import TrainerError, first_line
from finetune_trainer.training import packing

IGNORED = -100
"""Label of a token on which no loss is taken."""

_CHUNK_ROWS = 2000


@dataclasses.dataclass(frozen=True)
class TokenRow:
    """One sequence for the model: an example, or several in a pack."""

    input_ids: array.array[int]
    labels: array.array[int]
    lengths: tuple[int, ...]
    """Lengths of the examples in it, in order."""


@dataclasses.dataclass(frozen=True)
class TokenizedRows:
    """Rows ready for training, with what was lost on the way."""

    rows: list[TokenRow]
    num_truncated: int = 0
    """Examples that lost learned tokens at the maximum length."""
    num_dropped: int = 0
    """Examples without a single answer token: the prompt leaves no room for one, or there is no answer."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, padding not counted."""
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def num_examples(self) -> int:
        """Examples of all rows; more than rows once packed."""
        return sum(len(row.lengths) for row in self.rows)


class _BatchTokenizer:
    """A tokenizer that answers from one batched call: thousands of single calls cost more than the tokenization."""

    def __init__(self, tokenizer: Any, texts: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self.eos_token, self.eos_token_id = tokenizer.eos_token, tokenizer.eos_token_id
        wanted = sorted(set(texts))
        encoded = tokenizer(wanted, add_special_tokens=False)["input_ids"] if wanted else []
        self._known = dict(zip(wanted, encoded, strict=True))

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]:
        if text in self._known:
            return {"input_ids": self._known[text]}
        # An answer that would join its prompt, which is known only now.
        return {"input_ids": self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]}


def read_conversations(path: pathlib.Path) -> Iterator[Sequence[Message]]:
    """Read the messages of each row of a prepared file. Raises TrainerError that names the line."""
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise TrainerError(
            Reason.DATASET_NOT_FOUND,
            ExitCode.NO_INPUT,
            f"{path}: the prepared rows cannot be read: {error.strerror}",
            "Run `finetune-trainer prepare` first.",
        ) from error
    with file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)["messages"]
            except (ValueError, KeyError, TypeError) as error:
                raise TrainerError(
                    Reason.DATASET_INVALID, ExitCode.DATA, f"{path}, line {number}: no JSON object with messages"
                ) from error


def tokenize(
    conversations: Iterable[Sequence[Message]], template: str, tokenizer: Any, max_length: int
) -> TokenizedRows:
    """Render and tokenize conversations; the loss is taken on answers only. Raises TrainerError that names the row.

    A conversation that is too long loses its end: every answer keeps all that came before it, and one that is cut in
    its middle still teaches each of its tokens, without an end that is none. What comes after the last learned token
    has no effect on any loss and is left out.
    """
    rows: list[TokenRow] = []
    num_truncated = num_dropped = num_read = 0
    for chunk in _chunks(conversations):
        examples = list(_render(chunk, template, tokenizer, num_read))
        num_read += len(chunk)
        batch: Any = _BatchTokenizer(tokenizer, (text for each in examples for text in list_texts(each, tokenizer)))
        for stretches in examples:
            encoded = encode_stretches(stretches, batch)
            mask = encoded.answer_mask[:max_length]
            # The first token is predicted from nothing, so it never counts as an answer.
            if not any(mask[1:]):
                num_dropped += 1
                continue
            num_truncated += any(encoded.answer_mask[max_length:])
            end = len(mask) - mask[::-1].index(True)
            rows.append(_build_row(encoded.input_ids[:end], mask[:end]))
    return TokenizedRows(rows, num_truncated, num_dropped)


def _build_row(ids: list[int], mask: list[bool]) -> TokenRow:
    labels = [token if wanted else IGNORED for token, wanted in zip(ids, mask, strict=True)]
    labels[0] = IGNORED
    return TokenRow(array.array("i", ids), array.array("i", labels), (len(ids),))


def _chunks(conversations: Iterable[Sequence[Message]]) -> Iterator[list[Sequence[Message]]]:
    iterator = iter(conversations)
    while chunk := list(itertools.islice(iterator, _CHUNK_ROWS)):
        yield chunk


def _render(chunk: list[Sequence[Message]], template: str, tokenizer: Any, num_before: int) -> Iterator[list[Stretch]]:
    for number, messages in enumerate(chunk, start=num_before + 1):
        with _naming_line(number):
            examples = render_examples(messages, template, tokenizer)
        yield from examples


@contextlib.contextmanager
def _naming_line(number: int) -> Iterator[None]:
    """Turn whatever a row causes in a template or tokenizer into an error that says which row it was."""
    try:
        yield
    except TrainerError:
        raise
    except Exception as error:
        raise TrainerError(
            Reason.DATASET_INVALID,
            ExitCode.DATA,
            f"line {number} of the prepared rows cannot be rendered: {type(error).__name__}: {first_line(error)}",
            "Mend or remove that row of the data set, or choose another spec.dataset.promptTemplate.",
        ) from error


def pack(tokenized: TokenizedRows, max_length: int) -> TokenizedRows:
    """Put several examples into each row of at most `max_length` tokens."""
    packs = packing.pack_lengths([len(row.input_ids) for row in tokenized.rows], max_length)
    packed = [_join([tokenized.rows[index] for index in members]) for members in packs]
    return dataclasses.replace(tokenized, rows=packed)


def _join(rows: list[TokenRow]) -> TokenRow:
    ids, labels = array.array("i"), array.array("i")
    for row in rows:
        ids.extend(row.input_ids)
        labels.extend(row.labels)
    return TokenRow(ids, labels, tuple(length for row in rows for length in row.lengths))
