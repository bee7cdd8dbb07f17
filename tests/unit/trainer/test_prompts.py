"""One rendering for training, evaluation, generation and serving."""

from __future__ import annotations

import re

import jinja2
import jinja2.sandbox
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.data.prompts import (
    STYLES,
    build_chat_template,
    build_segments,
    encode_examples,
    encode_prompt,
)
from finetune_trainer.errors import TrainerError

QUESTION = [{"role": "user", "content": "Sort."}]
WITH_INPUT = [{"role": "user", "content": "Sort.", "input": "2, 1"}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Name a {input}."},
    {"role": "assistant", "content": "Apple"},
]
CUSTOM = "<<{instruction}|{input}>>\n"
TEMPLATES = [*STYLES, CUSTOM, "Q: {instruction}\nA:"]


class CharacterTokenizer:
    """A tokenizer of characters, which renders chat templates as transformers does."""

    bos_token, bos_token_id = "\x01", 1
    eos_token, eos_token_id = "\x02", 2
    chat_template: str | None = None

    def __init__(self, chat_template: str | None = None, *, adds_bos: bool = True) -> None:
        self.chat_template = chat_template
        self._adds_bos = adds_bos

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        ids = [ord(character) if ord(character) < 3 else ord(character) + 10 for character in text]
        return {"input_ids": [1, *ids] if add_special_tokens and self._adds_bos else ids}

    def apply_chat_template(self, conversation, *, add_generation_prompt, tokenize=True):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        text = environment.from_string(self.chat_template).render(
            messages=conversation, bos_token="\x01", eos_token="\x02", add_generation_prompt=add_generation_prompt
        )
        return self(text, add_special_tokens=False)["input_ids"] if tokenize else text


def text_of(messages, template):
    return "".join(segment.text for segment in build_segments(messages, template))


def test_the_prompt_of_the_recipe_of_origin():
    assert text_of(QUESTION, "wizardlm") == "Sort.\n\n### Response:"
    assert text_of(WITH_INPUT, "wizardlm") == "Sort.\n2, 1\n\n### Response:"


def test_the_alpaca_prompt_with_and_without_input():
    assert text_of(QUESTION, "alpaca") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSort.\n\n### Response:"
    )
    assert text_of(WITH_INPUT, "alpaca") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSort.\n\n### Input:\n2, 1\n\n### Response:"
    )


def test_the_vicuna_prompt():
    turns = [*QUESTION, {"role": "assistant", "content": "1, 2"}]
    assert text_of(turns, "vicuna").endswith("user's questions. USER: Sort. ASSISTANT: 1, 2")


def test_a_custom_template_never_loses_the_input():
    assert text_of(WITH_INPUT, CUSTOM) == "<<Sort.|2, 1>>\n"
    assert text_of(QUESTION, CUSTOM) == "<<Sort.|>>\n"
    assert text_of(WITH_INPUT, "Q: {instruction}\nA:") == "Q: Sort.\n2, 1\nA:"


def test_placeholders_in_the_users_text_stay_text():
    assert "{input}" in text_of([{"role": "user", "content": "What is {input}?", "input": "x"}], "wizardlm")


def test_answers_and_only_answers_are_learned():
    segments = build_segments(CHAT, "wizardlm")
    assert [segment.text for segment in segments if segment.is_answer] == ["Hello", "Apple"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_loss_covers_each_answer_and_its_end(template):
    (encoded,) = encode_examples(CHAT, template, CharacterTokenizer())
    learned = [token for token, is_answer in zip(encoded.input_ids, encoded.answer_mask, strict=True) if is_answer]
    text = "".join(chr(token - 10) if token > 2 else "\x02" for token in learned)
    prefix = " " if template == "vicuna" else ""
    assert text == f"{prefix}Hello\x02{prefix}Apple\x02"
    assert encoded.input_ids[0] == 1


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("messages", [QUESTION, WITH_INPUT, CHAT[:2], CHAT[:4], CHAT[1:4]])
def test_a_server_renders_the_same_tokens_from_the_chat_template(template, messages, adds_bos):
    chat_template = build_chat_template(template, adds_bos)
    tokenizer = CharacterTokenizer(chat_template, adds_bos=adds_bos)
    served = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert served == encode_prompt(messages, template, tokenizer)


@given(st.text(max_size=30), st.text(max_size=30), st.sampled_from(TEMPLATES))
def test_no_text_breaks_the_equality(question, answer, template):
    # These three stand for special tokens in the tokenizer above.
    clean = [re.sub("[\x00-\x02]", "", text) for text in (question, answer)]
    messages = [
        {"role": "user", "content": clean[0]},
        {"role": "assistant", "content": clean[1]},
        {"role": "user", "content": "{{ next }}", "input": clean[1]},
    ]
    tokenizer = CharacterTokenizer(build_chat_template(template, adds_bos=True))
    served = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert served == encode_prompt(messages, template, tokenizer)


def test_the_tokenizers_own_template_is_kept_and_masks_answers():
    own = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}\x02{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = CharacterTokenizer(own)
    assert build_chat_template("tokenizer", adds_bos=True) is None
    (encoded,) = encode_examples(CHAT[1:], "tokenizer", tokenizer)
    learned = [token for token, is_answer in zip(encoded.input_ids, encoded.answer_mask, strict=True) if is_answer]
    assert "".join(chr(token - 10) if token > 2 else "\x02" for token in learned) == "Hello\x02Apple\x02"


def test_answers_that_a_template_rewrites_later_are_learned_one_by_one_as_a_server_asks_for_them():
    # Like templates that leave the thinking out of all answers but the last.
    own = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}<think>{% endif %}"
        "{{ m.content }}\x02{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = CharacterTokenizer(own)

    first, second = encode_examples(CHAT[1:], "tokenizer", tokenizer)

    for example, index, answer in ((first, 2, "<think>Hello\x02"), (second, 4, "<think>Apple\x02")):
        prompt = tokenizer.apply_chat_template(CHAT[1:index], add_generation_prompt=True)
        assert example.input_ids == prompt + tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert example.answer_mask == [False] * len(prompt) + [True] * len(answer)


def test_a_template_that_asks_otherwise_than_it_answers_is_refused():
    own = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}Think: {% endif %}"

    with pytest.raises(TrainerError, match="writes other text before an answer") as caught:
        encode_examples(CHAT, "tokenizer", CharacterTokenizer(own))
    assert "spec.dataset.promptTemplate" in caught.value.hint


def test_an_end_token_that_the_tokenizer_does_not_know_is_refused():
    class Broken(CharacterTokenizer):
        eos_token = "<end>"

    with pytest.raises(TrainerError, match="does not read its own end-of-sequence token '<end>'"):
        encode_examples(CHAT, "wizardlm", Broken())


def test_the_tokenizers_template_joins_an_input():
    tokenizer = CharacterTokenizer("{{ messages[0].content }}")
    ids = encode_prompt(WITH_INPUT, "tokenizer", tokenizer)
    assert "".join(chr(token - 10) for token in ids) == "Sort.\n2, 1"


def test_a_tokenizer_without_a_template_says_what_to_choose():
    with pytest.raises(TrainerError, match="has no chat template") as caught:
        encode_prompt(QUESTION, "tokenizer", CharacterTokenizer())
    assert "spec.dataset.promptTemplate" in caught.value.hint


def test_an_unknown_template_says_which_there_are():
    with pytest.raises(TrainerError, match=r"spec\.dataset\.promptTemplate: 'lama'") as caught:
        build_segments(QUESTION, "lama")
    assert "wizardlm, alpaca, vicuna, tokenizer" in caught.value.hint
