"""Counting the tokens of prepared rows with the model's own tokenizer, where it is stored as tokenizer.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune_trainer.data.prompts import TOKENIZER_TEMPLATE, Message, build_segments, join_input

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Sequence


class TokenCounter:
    """Counts tokens in batches."""

    def __init__(self, model_folder: pathlib.Path | None, template: str) -> None:
        self._tokenizer = _open_tokenizer(model_folder)
        self._template = template

    @property
    def is_usable(self) -> bool:
        """Whether there is a tokenizer to count with."""
        return self._tokenizer is not None

    def measure(self, rows: Sequence[Sequence[Message]]) -> list[tuple[int, int]]:
        """Return the tokens of each row's prompts and of its answers; nothing where there is no tokenizer.

        As in training, every stretch is encoded by itself, so that the two add up to the row.
        """
        if self._tokenizer is None:
            return []
        stretches = [_list_stretches(messages, self._template) for messages in rows]
        texts = [text for row in stretches for text, _ in row]
        encoded = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        lengths = []
        for row in stretches:
            numbers = [0, 0]
            for _, is_answer in row:
                numbers[is_answer] += len(next(encoded))
            lengths.append((numbers[0], numbers[1]))
        return lengths


def _list_stretches(messages: Sequence[Message], template: str) -> list[tuple[str, bool]]:
    """Return the texts of a row as they are rendered, each with whether it is an answer."""
    if template == TOKENIZER_TEMPLATE:
        # A few tokens of markup per turn are missing; the tokenizer's template needs transformers to render.
        return [(join_input(message), message["role"] == "assistant") for message in messages]
    return [(segment.text, segment.is_answer) for segment in build_segments(messages, template)]


def _open_tokenizer(model_folder: pathlib.Path | None) -> Any:
    path = None if model_folder is None else model_folder / "tokenizer.json"
    if path is None or not path.is_file():
        return None
    try:
        import tokenizers
    except ImportError:
        return None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception:
        # A tokenizer that cannot be read is reported by training, which needs it; here only a count is lost.
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
