"""Answers of a loaded model: the prompt as in training, the model as it is served.

One greedy answer is the reference for what a server answers; batches are for files of prompts (`batch`).
"""

from __future__ import annotations

import copy
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.data.prompts import Message
from finetune_trainer.errors import TrainerError
from finetune_trainer.training import modeling


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. With temperature 0 the likeliest one is, and the rest is of no effect."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """Number of tokens to choose among; 0: all."""
    seed: int = 0

    def to_options(self) -> dict[str, Any]:
        """Return the options of `generate`; every one is said, so that none of the model's own comes in its place."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model answered."""

    text: str
    token_ids: list[int]
    num_prompt_tokens: int
    has_ended: bool
    """Whether the model ended the answer itself."""


class Encoder:
    """Encodes conversations as a server does, through the chat template that a promoted tokenizer carries."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt's tokens."""
        encoded = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(encoded["input_ids"])


class Answerer(Encoder):
    """A loaded model that answers prompts of tokens."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.model = model
        self.limit = modeling.limit_length(model.config)
        """Most tokens of prompt and answer together."""

    def answer_all(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling) -> list[Answer]:
        """Answer prompts, given as tokens and all shorter than `limit`, in one batch."""
        import torch

        longest = max(len(prompt) for prompt in prompts)
        # On the left, so that every prompt ends where its answer begins.
        pad = modeling.choose_pad_token(self.tokenizer)
        rows = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        masks = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        room = max(1, min(max_new_tokens, self.limit - longest))
        if sampling.temperature > 0:
            torch.manual_seed(sampling.seed)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=torch.tensor(rows, device=self.model.device),
                attention_mask=torch.tensor(masks, device=self.model.device),
                pad_token_id=pad,
                max_new_tokens=room,
                **sampling.to_options(),
            )
        return [self._read(output[index, longest:].tolist(), len(prompt)) for index, prompt in enumerate(prompts)]

    def _read(self, ids: list[int], num_prompt_tokens: int) -> Answer:
        ends = _end_ids(self.model)
        # What follows the first end is padding of a batch.
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        kept = ids if end is None else ids[: end + 1]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Answer(text, kept, num_prompt_tokens, end is not None)


class Generator(Answerer):
    """A model in a folder that answers conversations."""

    def __init__(
        self,
        folder: pathlib.Path,
        adapter: pathlib.Path | None = None,
        *,
        trust_remote_code: bool = False,
        promoted: pathlib.Path | None = None,
    ) -> None:
        """Load the model of `folder`, with an adapter merged into it.

        `promoted`: the folder whose tokenizer, template and generation settings stand for those of `folder`.
        """
        import torch
        from transformers import GenerationConfig

        tokenizer = modeling.load_tokenizer(promoted or folder, trust_remote_code)
        if promoted is None:
            model: Any = modeling.load_model(folder, "auto", trust_remote_code)
        else:
            model = modeling.load_served_model(folder, trust_remote_code)
            model.generation_config = GenerationConfig.from_pretrained(promoted)
            model.config.use_cache = True
        if adapter is not None:
            model = _add_adapter(model, adapter).merge_and_unload()
        super().__init__(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer)

    def share_with_adapter(self, adapter: pathlib.Path) -> Generator:
        """Return a generator with an adapter on the very same weights; both may answer at the same time."""
        weights = (*self.model.parameters(), *self.model.buffers())
        other = copy.copy(self)
        model = copy.deepcopy(self.model, {id(weight): weight for weight in weights})
        other.model = _add_adapter(model, adapter).get_base_model().eval()
        return other

    def answer(self, messages: Sequence[Message], max_new_tokens: int, sampling: Sampling = Sampling()) -> Answer:
        """Answer one conversation."""
        return self.answer_all([self.encode(messages)], max_new_tokens, sampling)[0]


def _end_ids(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def _add_adapter(model: Any, adapter: pathlib.Path) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise TrainerError(
            Reason.MODEL_INVALID,
            ExitCode.NO_INPUT,
            f"--adapter {adapter}: cannot be put on this model: {line}",
            "Name the folder of a LoRA adapter that was trained on the model of --model.",
        ) from error
