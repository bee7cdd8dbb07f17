"""Which rows are held out and how often a row is taken: decided by hashes, so that order and machine do not matter."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune_trainer.data.prompts import Message


def hash_to_share(text: str) -> float:
    """Return a number from 0 up to 1 that depends on the text alone, evenly spread."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def holdout_share(messages: Sequence[Message], seed: int) -> float:
    """Return where a row stands between 0 and 1; those below the holdout fraction are held out.

    Rows with the same prompt get the same number: a question never stands on both sides.
    """
    prompt: list[str] = []
    for message in messages:
        if message["role"] == "assistant":
            break
        prompt += [message["content"], message.get("input", "")]
    return hash_to_share("\0".join([f"holdout:{seed}", *prompt]))


def select_copies(weight: float, seed: int, source: int, index: int) -> int:
    """Return how often a row of a source with this weight is taken."""
    whole = math.floor(weight)
    if whole == weight:
        return whole
    return whole + (hash_to_share(f"weight:{seed}:{source}:{index}") < weight - whole)
