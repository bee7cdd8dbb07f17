"""Answers of a server that already runs vLLM, for `generate --server`: prompts go there as tokens, and come back so.

The prompt is encoded here, by the promoted tokenizer, so that it is that of training for every form of row. vLLM takes
and returns tokens on `/v1/completions` (`prompt`, `return_token_ids`), which other servers of the same API do not.
"""

from __future__ import annotations

import http.client
import json
import pathlib
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.smoke_prompt import API_KEY, make_headers
from finetune_trainer.errors import TrainerError
from finetune_trainer.serving.generate import Answer, Encoder, Sampling
from finetune_trainer.training import modeling

ANSWER_SECONDS = 3600.0
"""How long one batch of answers may take."""
MAX_QUOTED = 300


class ServerModel(Encoder):
    """A model that a server answers for, and the folder with its tokenizer."""

    def __init__(self, folder: pathlib.Path, url: str, name: str = "") -> None:
        """Look what the server has. Raises TrainerError when it cannot be reached or has no such model."""
        super().__init__(modeling.load_tokenizer(folder))
        self._url = url.rstrip("/").removesuffix("/v1")
        listed = {each["id"]: each for each in self._ask("/v1/models")["data"]}
        if name not in listed and (name or len(listed) != 1):
            problem = f"has no model {name}" if name else f"has {len(listed)} models"
            raise _refuse(f"--server {url} {problem}", f"Say --name with one of {', '.join(listed)}.")
        self.name = name or next(iter(listed))
        lengths = [modeling.limit_length(modeling.read_config(folder)), listed[self.name].get("max_model_len")]
        self.limit = min(length for length in lengths if length)

    def answer_all(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling) -> list[Answer]:
        """Answer prompts, given as tokens and all shorter than `limit`, in one request."""
        longest = max(len(prompt) for prompt in prompts)
        body = {
            "model": self.name,
            "prompt": [list(prompt) for prompt in prompts],
            "max_tokens": max(1, min(max_new_tokens, self.limit - longest)),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": sampling.seed % 2**63,
            "return_token_ids": True,
        }
        choices = self._ask("/v1/completions", body)["choices"]
        if any(choice.get("token_ids") is None for choice in choices) or len(choices) != len(prompts):
            raise _refuse(f"--server {self._url} does not answer in tokens", "Name an endpoint whose runtime is vllm.")
        answers = []
        for prompt, choice in zip(prompts, sorted(choices, key=lambda choice: int(choice["index"])), strict=True):
            ids = list(choice["token_ids"])
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            answers.append(Answer(text, ids, len(prompt), choice["finish_reason"] == "stop"))
        return answers

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        try:
            request = urllib.request.Request(self._url + path, data, make_headers())  # noqa: S310 - checked by the command
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:  # noqa: S310
                return json.load(response)
        except urllib.error.HTTPError as error:
            text = error.read(MAX_QUOTED).decode(errors="replace").strip()
            hint = f"Set {API_KEY} to its key." if error.code in (401, 403) else "See the server's log."
            raise _refuse(f"--server {self._url}: HTTP {error.code}: {text}", hint) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise TrainerError(
                Reason.SOURCE_UNAVAILABLE,
                ExitCode.UNAVAILABLE,
                f"--server {self._url}: {error}",
                "Run the same command again when it answers: it goes on behind the last answers.",
            ) from error


def _refuse(message: str, hint: str) -> TrainerError:
    return TrainerError(Reason.INVALID_CONFIG, ExitCode.CONFIG, message, hint)
