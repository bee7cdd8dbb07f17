"""How a conversation becomes text and tokens: the one place that training, evaluation and generation render prompts.

`build_chat_template` states the same rendering as a Jinja template for the promoted tokenizer, so that
`/v1/chat/completions` of any server produces the same tokens. Nothing here imports torch or transformers; a tokenizer
is any object with the few methods named in `Tokenizer`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.errors import TrainerError

Message = Mapping[str, Any]
"""`{"role": system|user|assistant, "content": text}`; a user message may carry alpaca's `input` beside its content."""

TOKENIZER_TEMPLATE = "tokenizer"
"""The template's name that hands the rendering to the tokenizer's own chat template."""


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    bos_token: str | None
    bos_token_id: int | None
    eos_token: str
    eos_token_id: int | None
    chat_template: Any

    def __hash__(self) -> int:
        """Return the same number as long as it lives."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """Return a mapping with `input_ids`."""

    def apply_chat_template(self, conversation: Any, *, add_generation_prompt: bool, tokenize: bool) -> Any:
        """Return the text of a conversation, for `tokenize=False`."""


@dataclasses.dataclass(frozen=True)
class Style:
    """A prompt template in pieces. `{instruction}`, `{input}` and `{system}` are placeholders."""

    user: str
    user_with_input: str
    opening: str = ""
    """Before the first user turn, unless the conversation brings a system message."""
    opening_with_input: str = ""
    """The same, when that turn has an input."""
    system: str = "{system}\n\n"
    answer_prefix: str = ""
    """Between the prompt and the answer; part of what is learned, since the prompt ends before it."""


_ALPACA_TASK = "Below is an instruction that describes a task"
_ALPACA_WISH = "Write a response that appropriately completes the request.\n\n"
_VICUNA_OPENING = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)

STYLES: Mapping[str, Style] = {
    "wizardlm": Style(
        user="{instruction}\n\n### Response:",
        user_with_input="{instruction}\n{input}\n\n### Response:",
    ),
    "alpaca": Style(
        opening=f"{_ALPACA_TASK}. {_ALPACA_WISH}",
        opening_with_input=f"{_ALPACA_TASK}, paired with an input that provides further context. {_ALPACA_WISH}",
        user="### Instruction:\n{instruction}\n\n### Response:",
        user_with_input="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    ),
    "vicuna": Style(
        opening=_VICUNA_OPENING,
        opening_with_input=_VICUNA_OPENING,
        user="USER: {instruction} ASSISTANT:",
        user_with_input="USER: {instruction}\n{input} ASSISTANT:",
        system="{system} ",
        answer_prefix=" ",
    ),
}
"""Templates with a name."""

_PLACEHOLDER = re.compile(r"\{(instruction|input|system)\}")


def select_style(template: str) -> Style:
    """Return the style of a named template, or of a text with `{instruction}` and `{input}`."""
    if template in STYLES:
        return STYLES[template]
    if "{instruction}" not in template:
        names = ", ".join([*STYLES, TOKENIZER_TEMPLATE])
        raise TrainerError(
            Reason.INVALID_CONFIG,
            ExitCode.CONFIG,
            f"spec.dataset.promptTemplate: {template!r} is no known template and has no {{instruction}}",
            f"Use one of {names}, or a text that contains {{instruction}} and may contain {{input}}.",
        )
    if "{input}" in template:
        return Style(user=template, user_with_input=template)
    # A template without a place for the input must not lose it.
    return Style(user=template, user_with_input=template.replace("{instruction}", "{instruction}\n{input}", 1))


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of a rendered conversation."""

    text: str
    is_answer: bool
    """True where the loss is taken. An answer is followed by the end-of-sequence token, which is learned too."""


def build_segments(messages: Sequence[Message], template: str) -> tuple[Segment, ...]:
    """Render a conversation as alternating prompts and answers; not for the template `tokenizer`."""
    style = select_style(template)
    segments: list[Segment] = []
    prompt = ""
    needs_opening = not any(message["role"] == "system" for message in messages)
    for message in messages:
        if message["role"] == "system":
            prompt += _fill(style.system, system=message["content"])
        elif message["role"] == "user":
            prompt += _user_text(style, message, needs_opening)
            needs_opening = False
        else:
            segments += [Segment(prompt, False), Segment(style.answer_prefix + message["content"], True)]
            prompt = ""
    if prompt:
        segments.append(Segment(prompt, False))
    # An empty answer still ends, which is learned; an empty prompt is nothing.
    return tuple(segment for segment in segments if segment.text or segment.is_answer)


def _user_text(style: Style, message: Message, needs_opening: bool) -> str:
    added = message.get("input") or ""
    if added:
        opening, text = style.opening_with_input, style.user_with_input
    else:
        opening, text = style.opening, style.user
    return (opening if needs_opening else "") + _fill(text, instruction=message["content"], input=added)


def _fill(text: str, **values: str) -> str:
    # One pass: a value that itself contains a placeholder is left as the user wrote it.
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), text)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation as tokens."""

    input_ids: list[int]
    answer_mask: list[bool]
    """True for every token on which the loss is taken."""


Stretch = tuple[str, str]
"""A prompt and the answer to it, as they are written with all markup and special tokens; no answer at a row's end."""


def render_examples(messages: Sequence[Message], template: str, tokenizer: Tokenizer) -> list[list[Stretch]]:
    """Render a conversation for training: one example that learns every answer.

    Several, with an answer each, where the tokenizer's template writes an answer differently once more follows: then
    each answer is learned after exactly the prompt that a server would give it.
    """
    if template == TOKENIZER_TEMPLATE:
        return _render_chat(messages, tokenizer)
    stretches: list[Stretch] = []
    prompt = _begin_text(tokenizer)
    for segment in build_segments(messages, template):
        if segment.is_answer:
            stretches.append((prompt, segment.text + tokenizer.eos_token))
            prompt = ""
        else:
            prompt += segment.text
    return [[*stretches, (prompt, "")] if prompt else stretches]


def list_texts(stretches: Sequence[Stretch], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the texts that `encode_stretches` looks at, so that they can be encoded in batches."""
    for number, (prompt, answer) in enumerate(stretches):
        before = tokenizer.eos_token if number else ""
        yield before + prompt
        yield before + prompt + answer


def encode_stretches(stretches: Sequence[Stretch], tokenizer: Tokenizer) -> Encoded:
    """Return the tokens of an example, with the answers marked.

    A prompt's tokens are those that a server makes of it: it is encoded without its answer, and after the end of the
    answer before it, since some tokenizers write the first word after a special token differently from the first of a
    text. An answer is encoded behind its prompt, or by itself where its first characters would join the prompt's last.
    """
    ids: list[int] = []
    mask: list[bool] = []
    for number, (prompt, answer) in enumerate(stretches):
        asked, both = (_encode(text, tokenizer, is_first=number == 0) for text in (prompt, prompt + answer))
        is_joined = both[: len(asked)] != asked
        learned = _encode(answer, tokenizer, is_first=False) if is_joined else both[len(asked) :]
        ids += asked + learned
        mask += [False] * len(asked) + [True] * len(learned)
    return Encoded(ids, mask)


def encode_examples(messages: Sequence[Message], template: str, tokenizer: Tokenizer) -> list[Encoded]:
    """Return the tokens of a conversation for training; almost always one example."""
    return [encode_stretches(example, tokenizer) for example in render_examples(messages, template, tokenizer)]


def encode_prompt(messages: Sequence[Message], template: str, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens after which the model is to answer; the last message is a user's."""
    if template == TOKENIZER_TEMPLATE:
        text = _chat_text(messages, tokenizer, add_generation_prompt=True)
    else:
        (stretches,) = render_examples(messages, template, tokenizer)
        text = "".join(prompt + answer for prompt, answer in stretches)
    return _encode(text, tokenizer, is_first=True)


def begin_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that this tokenizer puts before a text: its beginning-of-sequence token, or nothing."""
    bos = tokenizer.bos_token_id
    added = list(tokenizer("", add_special_tokens=True)["input_ids"])
    return [bos] if bos is not None and added[:1] == [bos] else []


@functools.lru_cache(maxsize=1)
def _begin_text(tokenizer: Tokenizer) -> str:
    # Remembered: asked for every row of a data set.
    return tokenizer.bos_token or "" if begin_ids(tokenizer) else ""


def _encode(text: str, tokenizer: Tokenizer, is_first: bool) -> list[int]:
    """Return the tokens of a text at the beginning, or after the end of an answer."""
    before = "" if is_first else tokenizer.eos_token
    ids = list(tokenizer(before + text, add_special_tokens=False)["input_ids"])
    if is_first:
        return ids
    if ids[:1] != [tokenizer.eos_token_id]:
        raise TrainerError(
            Reason.MODEL_INVALID,
            ExitCode.NO_INPUT,
            f"the model's tokenizer does not read its own end-of-sequence token {tokenizer.eos_token!r} in a text",
            "Check eos_token in the model's tokenizer_config.json: it must be one of the special tokens.",
        )
    return ids[1:]


def _render_chat(messages: Sequence[Message], tokenizer: Tokenizer) -> list[list[Stretch]]:
    turns: list[Stretch] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = _chat_text(messages[:index], tokenizer, add_generation_prompt=True)
            end = _chat_text(messages[: index + 1], tokenizer, add_generation_prompt=False)
            if not end.startswith(prompt):
                raise TrainerError(
                    Reason.INVALID_CONFIG,
                    ExitCode.CONFIG,
                    "spec.dataset.promptTemplate is tokenizer, but the tokenizer's chat template writes other text "
                    "before an answer than it asks for one with",
                    f"Set spec.dataset.promptTemplate to one of {', '.join(STYLES)}.",
                )
            # A template may write a line break after the end of an answer: no model gets to say that.
            answer, end_token, _ = end[len(prompt) :].rpartition(tokenizer.eos_token)
            turns.append((prompt, answer + end_token if end_token else end[len(prompt) :]))
    stretches, done = [], ""
    for prompt, answer in turns:
        if not prompt.startswith(done):
            return [[turn] for turn in turns]
        stretches.append((prompt[len(done) :], answer))
        done = prompt + answer
    return [stretches]


def _chat_text(messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise TrainerError(
            Reason.INVALID_CONFIG,
            ExitCode.CONFIG,
            "spec.dataset.promptTemplate is tokenizer, but the model's tokenizer has no chat template",
            f"Set spec.dataset.promptTemplate to one of {', '.join(STYLES)}.",
        )
    plain = [{"role": message["role"], "content": join_input(message)} for message in messages]
    return str(tokenizer.apply_chat_template(plain, add_generation_prompt=add_generation_prompt, tokenize=False))


def join_input(message: Message) -> str:
    """Return a message's content followed by its input, for places that know only content."""
    added = message.get("input") or ""
    content: str = message["content"]
    return f"{content}\n{added}" if added else content


def build_chat_template(template: str, adds_bos: bool) -> str | None:
    """Return the Jinja chat template that renders as `build_segments` does; None keeps the tokenizer's own.

    `adds_bos` says whether the tokenizer begins a text with its beginning-of-sequence token (`begin_ids`): servers
    tokenize a rendered conversation without adding it.
    """
    if template == TOKENIZER_TEMPLATE:
        return None
    style = select_style(template)
    added = "(message['input'] if message['input'] is defined and message['input'] else '')"
    return "".join(
        [
            "{{ bos_token }}" if adds_bos else "",
            "{% set ns = namespace(needs_opening=(messages | selectattr('role', 'equalto', 'system') | list",
            " | length == 0)) %}",
            "{% for message in messages %}{% set added = ",
            added,
            " %}{% if message['role'] == 'system' %}",
            _jinja(style.system),
            "{% elif message['role'] == 'user' %}{% if added %}{% if ns.needs_opening %}",
            _jinja(style.opening_with_input),
            "{% endif %}",
            _jinja(style.user_with_input),
            "{% else %}{% if ns.needs_opening %}",
            _jinja(style.opening),
            "{% endif %}",
            _jinja(style.user),
            "{% endif %}{% set ns.needs_opening = false %}{% else %}",
            _jinja(style.answer_prefix),
            "{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
        ]
    )


def _jinja(text: str) -> str:
    """Return Jinja that prints a piece of a style; literal text is quoted, so that no brace in it means anything."""
    variables = {"instruction": "message['content']", "system": "message['content']", "input": "added"}
    parts = _PLACEHOLDER.split(text)
    printed = [
        "{{ " + (variables[part] if index % 2 else json.dumps(part, ensure_ascii=False)) + " }}"
        for index, part in enumerate(parts)
        if part
    ]
    return "".join(printed)
