"""What base and tuned model answer to a few held-out prompts, side by side, for a person to read.

The choice is seeded by the data's seed and independent of the order of the rows; answers are greedy, so that the same
models give the same answers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from finetune_trainer.data.prompts import Message, encode_prompt, join_input
from finetune_trainer.reporting import write_json

if TYPE_CHECKING:
    import pathlib

NUM_SAMPLES = 4
MAX_NEW_TOKENS = 128
_LONGEST_PROMPT = 4000
"""Characters that people read in a report: longer prompts are not chosen, longer answers of the data are cut."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One held-out prompt."""

    messages: tuple[Message, ...]
    """Up to the first question, the system's message included."""
    reference: str
    """What the data answers."""

    @property
    def prompt(self) -> str:
        """The prompt as a person reads it."""
        return "\n\n".join(join_input(message) for message in self.messages)


def choose_samples(conversations: Iterable[Sequence[Message]], seed: int) -> list[Sample]:
    """Return up to NUM_SAMPLES prompts, those with the smallest hash of seed and text."""
    found = (sample for sample in map(_cut, conversations) if sample is not None)
    return heapq.nsmallest(NUM_SAMPLES, found, key=lambda sample: _order(sample, seed))


def _cut(messages: Sequence[Message]) -> Sample | None:
    """Return the first exchange of a conversation; None where it has no answer, or is too long to read."""
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = tuple(messages[:place])
            sample = Sample(asked, _shorten(message["content"]))
            return sample if asked and asked[-1]["role"] == "user" and len(sample.prompt) <= _LONGEST_PROMPT else None
    return None


def _shorten(text: str) -> str:
    """Return a text cut where people stop reading."""
    return text if len(text) <= _LONGEST_PROMPT else text[:_LONGEST_PROMPT] + " …"


def _order(sample: Sample, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {sample.prompt}".encode("utf-8", "replace")).digest()


def answer_samples(model: Any, tokenizer: Any, samples: Sequence[Sample], template: str) -> list[str]:
    """Return a loaded model's greedy answers; an empty one where the prompt leaves no room."""
    from finetune_trainer.serving.generate import Answerer, Sampling

    answerer = Answerer(model, tokenizer)
    prompts = [encode_prompt(sample.messages, template, tokenizer) for sample in samples]
    fitting = [place for place, prompt in enumerate(prompts) if len(prompt) + MAX_NEW_TOKENS <= answerer.limit]
    texts = [""] * len(prompts)
    if fitting:
        answers = answerer.answer_all([prompts[place] for place in fitting], MAX_NEW_TOKENS, Sampling())
        for place, answer in zip(fitting, answers, strict=True):
            texts[place] = answer.text
    return texts


def write_samples(
    path: pathlib.Path, digest: str, samples: Sequence[Sample], tuned: Sequence[str], base: Sequence[str]
) -> None:
    """Write the prompts with the answers that there are; `base` is empty where it was not asked."""
    entries = []
    for place, sample in enumerate(samples):
        entry = {"prompt": sample.prompt, "reference": sample.reference, "tuned": tuned[place]}
        entries.append(entry | ({"base": base[place]} if base else {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"digest": digest, "samples": entries})
