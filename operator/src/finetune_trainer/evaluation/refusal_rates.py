"""How often a model refuses or hedges: ordinary requests on sensitive matters, and harmless ones that sound dangerous.

Both sets of prompts come with the package, one prompt a line. Answers are greedy, through the prompt of training, and
judged by the rules that filter training data. All of the prompts may be answered, so a lower rate is the better one;
how a model meets requests that nobody ought to answer is not measured here.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from finetune_contract.run_config import FilterActions, FilterConfig
from finetune_trainer.data.formats import Conversation, Turn
from finetune_trainer.data.prompts import encode_prompt
from finetune_trainer.data.refusals import RowFilter, make_filter
from finetune_trainer.reporting import ProgressBar

TASK = "refusals"
"""The name under which the rates stand among the scores."""
SETS = {"refusal": "", "over_refusal": "over_"}
"""Sets of prompts, and what the names of their rates begin with."""
MAX_NEW_TOKENS = 128
"""Refusals open an answer, and lectures close a short one."""
BATCH_SIZE = 16

_FOLDER = pathlib.Path(__file__).with_name("prompts")
_FLAG_ALL = FilterActions(**{field.name: "flag" for field in dataclasses.fields(FilterActions)})


@dataclasses.dataclass(frozen=True)
class JudgedAnswer:
    """A model's answer to one prompt, with the categories and rules that speak against it."""

    prompt_set: str
    prompt: str
    answer: str
    categories: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()

    @property
    def is_refusal(self) -> bool:
        """Whether the answer declines to do what was asked."""
        return "refusal" in self.categories

    @property
    def is_hedging(self) -> bool:
        """Whether it refuses, disclaims, moralises or speaks as a language model."""
        return bool(self.categories)

    def to_facts(self) -> dict[str, Any]:
        """Return a line of the report."""
        return {
            "set": self.prompt_set,
            "prompt": self.prompt,
            "answer": self.answer,
            "categories": list(self.categories),
            "rules": list(self.rules),
        }


@dataclasses.dataclass(frozen=True)
class RefusalRates:
    """Rates by name: refusal_rate and hedging_rate of the first set, with `over_` before them of the second."""

    scores: dict[str, float]
    errors: dict[str, float]
    answers: tuple[JudgedAnswer, ...]


@functools.lru_cache
def read_prompts(prompt_set: str) -> tuple[str, ...]:
    """Return the prompts of one of the SETS."""
    return tuple((_FOLDER / f"{prompt_set}.txt").read_text(encoding="utf-8").splitlines())


def digest_prompts() -> str:
    """Return a digest of both sets: rates of other prompts cannot be compared."""
    text = "".join(f"{name} {prompt}\n" for name in SETS for prompt in read_prompts(name))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def measure_refusals(
    model: Any, tokenizer: Any, template: str, limit: int = 0, max_new_tokens: int = MAX_NEW_TOKENS
) -> RefusalRates:
    """Let a loaded model answer both sets. `template`: as in dataset.promptTemplate; `limit`: of each set, 0: all."""
    asked = [(name, prompt) for name in SETS for prompt in read_prompts(name)[: limit or None]]
    answers = _answer(model, tokenizer, template, [prompt for _, prompt in asked], max_new_tokens)
    judged = [judge(name, prompt, answer) for (name, prompt), answer in zip(asked, answers, strict=True)]
    return summarise(judged)


def _answer(model: Any, tokenizer: Any, template: str, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    from finetune_trainer.serving.generate import Answerer, Sampling

    answerer = Answerer(model, tokenizer)
    encoded = [encode_prompt([{"role": "user", "content": prompt}], template, tokenizer) for prompt in prompts]
    # Like lengths together, so that little is padding.
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    answers = [""] * len(prompts)
    with ProgressBar("answering prompts", len(prompts), "prompts") as bar:
        for first in range(0, len(order), BATCH_SIZE):
            batch = order[first : first + BATCH_SIZE]
            found = answerer.answer_all([encoded[index] for index in batch], max_new_tokens, Sampling())
            for index, answer in zip(batch, found, strict=True):
                answers[index] = answer.text
            bar.advance(len(batch))
    return answers


def judge(prompt_set: str, prompt: str, answer: str) -> JudgedAnswer:
    """Return an answer with what the rules find in it."""
    turns = (Turn("user", prompt, "instruction"), Turn("assistant", answer, "output"))
    findings = _build_filter().judge(Conversation(turns)).decided
    categories = dict.fromkeys(finding.category for finding in findings)
    return JudgedAnswer(prompt_set, prompt, answer, tuple(categories), tuple(finding.rule for finding in findings))


@functools.lru_cache
def _build_filter() -> RowFilter:
    # Nothing is removed, so that all of an answer is searched, for every category.
    return make_filter(FilterConfig(actions=_FLAG_ALL))


def summarise(answers: Sequence[JudgedAnswer]) -> RefusalRates:
    """Return the rates with their standard errors, those of a mean of so many yes and no."""
    scores, errors = {}, {}
    for name, prefix in SETS.items():
        of_set = [answer for answer in answers if answer.prompt_set == name]
        for metric, count in (
            ("refusal_rate", sum(answer.is_refusal for answer in of_set)),
            ("hedging_rate", sum(answer.is_hedging for answer in of_set)),
        ):
            share = count / len(of_set)
            scores[prefix + metric] = share
            errors[prefix + metric] = math.sqrt(share * (1 - share) / max(len(of_set) - 1, 1))
    return RefusalRates(scores, errors, tuple(answers))
