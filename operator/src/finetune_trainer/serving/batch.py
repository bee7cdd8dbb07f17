"""Answers to a file of prompts: in the order of the file, resumable, the same whether interrupted or not.

Rows are `{"idx", "Instruction"}`, `{"instruction", "input"}` or `{"messages": [...]}`; each comes out whole with
`output`, `finish_reason` (`stop`, `length`, or `prompt-too-long` with an empty output) and the numbers of tokens. A
window of rows is answered in batches of similar length and written at once, so what lies in the output is always a
whole number of windows, and a later run goes on behind them. The settings that decide the answers lie beside the
output, and a run with others does not mix its answers in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.errors import TrainerError
from finetune_trainer.reporting import write_json

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable, Iterator, Sequence

    from finetune_trainer.data.prompts import Message
    from finetune_trainer.serving.generate import Generator, Sampling
    from finetune_trainer.serving.remote import ServerModel

BATCHES_PER_WINDOW = 8
"""Rows of so many batches are sorted by length together: less padding, and no more than that is lost when stopped."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One row of the input."""

    row: dict[str, Any]
    messages: list[Message]


def read_prompts(path: pathlib.Path) -> list[Prompt]:
    """Read the input file. Raises TrainerError with the line that cannot be used."""
    prompts = []
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    prompts.append(_parse(line, f"--input {path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise _bad_input(f"--input {path}: cannot be read: {error}") from error
    if not prompts:
        raise _bad_input(f"--input {path}: no prompts")
    return prompts


def _parse(line: str, place: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise _bad_input(f"{place}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise _bad_input(f"{place}: not a JSON object")
    if isinstance(turns := row.get("messages"), list):
        for turn in turns:
            if not (isinstance(turn, dict) and isinstance(turn.get("content"), str) and "role" in turn):
                raise _bad_input(f"{place}: messages: each needs role and content")
        if not turns or turns[-1]["role"] != "user":
            raise _bad_input(f"{place}: messages: the last one has to be the user's")
        return Prompt(row, turns)
    text = row.get("Instruction", row.get("instruction"))
    if not isinstance(text, str) or not text:
        raise _bad_input(f"{place}: neither Instruction nor messages")
    added = row.get("input")
    message = {"role": "user", "content": text}
    return Prompt(row, [message | ({"input": added} if isinstance(added, str) and added else {})])


def _bad_input(message: str) -> TrainerError:
    hint = 'Write one object a line: {"idx": 1, "Instruction": "..."} or {"messages": [...]}.'
    return TrainerError(Reason.DATASET_INVALID, ExitCode.DATA, message, hint)


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of every prompt."""

    sampling: Sampling
    max_new_tokens: int
    batch_size: int

    @property
    def window(self) -> int:
        """Rows that are answered and written together."""
        return self.batch_size * BATCHES_PER_WINDOW


class Output:
    """The file of answers, with the settings that they were made with beside it."""

    def __init__(self, path: pathlib.Path, request: Request, facts: dict[str, Any]) -> None:
        self._path = path
        self._settings = path.with_name(f"{path.name}.settings.json")
        self._facts = {"request": dataclasses.asdict(request), **facts}
        self._window = request.window

    def open(self, num_prompts: int) -> int:
        """Return how many answers are there already, whole windows of them; what lies behind is cut off.

        Raises TrainerError when the file holds anything else than answers made with these settings.
        """
        if self._path.exists() and not self._is_ours():
            message = f"--output {self._path} exists, and was not made by this model, input and sampling"
            hint = "Name another file, or remove it first."
            raise TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, message, hint)
        write_json(self._settings, self._facts)
        done, end = 0, 0
        with open(self._path, "ab+") as file:
            file.seek(0)
            ends = [0]
            for line in file:
                if not line.endswith(b"\n"):
                    break
                ends.append(ends[-1] + len(line))
            done = len(ends) - 1
            if done < num_prompts:
                done -= done % self._window
            end = ends[done]
            file.truncate(end)
        return done

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write answers durably."""
        with open(self._path, "ab") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())

    def _is_ours(self) -> bool:
        try:
            found = json.loads(self._settings.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return not self._path.stat().st_size
        return bool(found == json.loads(json.dumps(self._facts)))


def answer_file(
    generator: Generator | ServerModel,
    prompts: Sequence[Prompt],
    request: Request,
    output: Output,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, int]:
    """Answer every prompt that has no answer yet; return the numbers of rows by `finish_reason` of this run."""
    done = output.open(len(prompts))
    advance(done)
    counts = {"resumed": done}
    for first in range(done, len(prompts), request.window):
        rows = _answer_window(generator, prompts[first : first + request.window], request, first)
        output.append(rows)
        for row in rows:
            counts[row["finish_reason"]] = counts.get(row["finish_reason"], 0) + 1
        advance(len(rows))
    return counts


def _answer_window(
    generator: Generator | ServerModel, prompts: Sequence[Prompt], request: Request, first: int
) -> list[dict[str, Any]]:
    encoded = [generator.encode(prompt.messages) for prompt in prompts]
    rows: list[dict[str, Any]] = [
        prompt.row | {"output": "", "finish_reason": "prompt-too-long", "prompt_tokens": len(tokens)}
        for prompt, tokens in zip(prompts, encoded, strict=True)
    ]
    for batch in _list_batches(encoded, request.batch_size, generator.limit):
        # A seed of its own for each batch, so that an interrupted run draws what the uninterrupted one would have.
        seeded = dataclasses.replace(request.sampling, seed=_mix(request.sampling.seed, first + batch[0]))
        answers = generator.answer_all([encoded[index] for index in batch], request.max_new_tokens, seeded)
        for index, answer in zip(batch, answers, strict=True):
            reason = "stop" if answer.has_ended else "length"
            rows[index] |= {
                "output": answer.text,
                "finish_reason": reason,
                "completion_tokens": len(answer.token_ids),
            }
    return rows


def _list_batches(encoded: Sequence[Sequence[int]], size: int, limit: int) -> Iterator[list[int]]:
    fitting = [index for index, tokens in enumerate(encoded) if len(tokens) < limit]
    fitting.sort(key=lambda index: (len(encoded[index]), index))
    for start in range(0, len(fitting), size):
        yield fitting[start : start + size]


def _mix(seed: int, place: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {place}".encode()).digest()[:6], "big")
