"""Counting the tokens of prepared rows with the model's own tokenizer, where it is stored as tokenizer.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune_trainer.data.prompts import TOKENIZER_TEMPLATE, Message, build_segments, join_input

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Sequence

_BATCH = 256


class TokenCounter:
    """Counts tokens in batches; `total` is None when there is no tokenizer to count with."""

    def __init__(self, model_folder: pathlib.Path | None, template: str) -> None:
        self._tokenizer = _open_tokenizer(model_folder)
        self._template = template
        self._texts: list[str] = []
        self._total = 0

    @property
    def total(self) -> int | None:
        """The tokens of all rows so far."""
        self._count()
        return None if self._tokenizer is None else self._total

    def reset(self) -> None:
        """Forget what was counted."""
        self._texts.clear()
        self._total = 0

    def add(self, messages: Sequence[Message]) -> None:
        """Count one row."""
        if self._tokenizer is None:
            return
        if self._template == TOKENIZER_TEMPLATE:
            # A few tokens of markup per turn are missing; the tokenizer's template needs transformers to render.
            text = "\n".join(join_input(message) for message in messages)
        else:
            text = "".join(segment.text for segment in build_segments(messages, self._template))
        self._texts.append(text)
        if len(self._texts) >= _BATCH:
            self._count()

    def _count(self) -> None:
        if self._tokenizer is not None and self._texts:
            encoded = self._tokenizer.encode_batch_fast(self._texts, add_special_tokens=False)
            self._total += sum(len(item) for item in encoded)
            self._texts.clear()


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
