"""One greedy answer: the prompt as in training, the model as it is served. The reference for what a server answers."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from finetune_trainer.data.prompts import Message
from finetune_trainer.training import modeling


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model answered."""

    text: str
    token_ids: list[int]
    num_prompt_tokens: int
    has_ended: bool
    """Whether the model ended the answer itself."""


class Generator:
    """A loaded model that answers conversations."""

    def __init__(self, folder: pathlib.Path, trust_remote_code: bool = False) -> None:
        import torch

        self.tokenizer = modeling.load_tokenizer(folder, trust_remote_code)
        model: Any = modeling.load_model(folder, "auto", trust_remote_code)
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self._limit = modeling.limit_length(self.model.config)

    def answer(self, messages: Sequence[Message], max_new_tokens: int) -> Answer:
        """Answer a conversation greedily, through the chat template that the promoted tokenizer carries."""
        import torch

        prompt = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        length = prompt["input_ids"].shape[-1]
        room = max(1, min(max_new_tokens, self._limit - length))
        with torch.inference_mode():
            output = self.model.generate(**prompt, do_sample=False, max_new_tokens=room)
        ids = output[0, length:].tolist()
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(text, ids, length, bool(ids) and ids[-1] in _end_ids(self.model))


def _end_ids(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]
