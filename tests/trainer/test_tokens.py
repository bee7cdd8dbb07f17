"""Labels token by token with a real tokenizer, and packed rows whose examples do not see each other."""

import itertools
import string

import pytest

from finetune_trainer.data.prompts import begin_ids, build_chat_template, encode_examples, encode_prompt, join_input
from finetune_trainer.training import tokens
from finetune_trainer.training.collate import Collator
from finetune_trainer.training.modeling import choose_pad_token, load_tokenizer
from finetune_trainer.training.rank import build_dataset
from finetune_trainer.training.tokens import IGNORED
from tests.support.training_runs import build_pairs

ROW = [{"role": "user", "content": "What does dict.sorts do?"}, {"role": "assistant", "content": "It sorts the dict."}]
MORE = [{"role": "user", "content": "And list.counts?"}, {"role": "assistant", "content": "It counts."}]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mpt"])
@pytest.mark.parametrize("template", ["wizardlm", "alpaca", "vicuna"])
def test_exactly_the_answer_tokens_and_the_end_are_learned(models, family, template):
    tokenizer = load_tokenizer(models[family])

    (row,) = tokens.tokenize([ROW], template, tokenizer, 512).rows

    prompt = encode_prompt(ROW[:1], template, tokenizer)
    assert list(row.input_ids[: len(prompt)]) == prompt
    assert list(row.labels[: len(prompt)]) == [IGNORED] * len(prompt)
    assert list(row.labels[len(prompt) :]) == list(row.input_ids[len(prompt) :])
    assert row.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row.labels[len(prompt) : -1]).strip() == "It sorts the dict."
    assert (row.input_ids[0] == tokenizer.bos_token_id) == (family == "llama")


def test_each_turn_s_answer_is_learned_and_no_question(models):
    tokenizer = load_tokenizer(models["llama"])

    (row,) = tokens.tokenize([ROW + MORE], "wizardlm", tokenizer, 512).rows

    learned = tokenizer.decode([label for label in row.labels if label != IGNORED])
    masked = tokenizer.decode([one for one, label in zip(row.input_ids, row.labels, strict=True) if label == IGNORED])
    assert learned == "It sorts the dict.</s>It counts.</s>"
    assert masked == "<s>What does dict.sorts do?\n\n### Response:And list.counts?\n\n### Response:"


SYSTEM = [{"role": "system", "content": "Be brief."}]
CONVERSATIONS = {
    "one question": [],
    "a system message": SYSTEM,
    "several turns": [*SYSTEM, *ROW, *MORE],
}
QUESTIONS = {
    "plain": {"role": "user", "content": "What does set.joins do?"},
    "with input": {"role": "user", "content": "Explain this.", "input": "set.joins(path)"},
}
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _word_start_tokenizer(prepend):
    """Return a tokenizer as the Llamas have: a word carries the space before it, and a text's first one its own.

    With `first` it does so at the beginning of a text only, with `always` after every special token, too.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    core = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=prepend)
    core.decoder = tokenizers.decoders.Metaspace(prepend_scheme=prepend)
    specials = ["<unk>", "<s>", "</s>"]
    # Questions and answers apart, or it learns tokens that join the one to the other.
    core.train_from_iterator(
        itertools.chain(*build_pairs()),
        tokenizers.trainers.BpeTrainer(
            vocab_size=400, special_tokens=specials, initial_alphabet=list(string.printable), show_progress=False
        ),
    )
    core.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _make_tokenizer(models, kind):
    return load_tokenizer(models[kind]) if kind in models else _word_start_tokenizer(kind)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "first", "always"])
@pytest.mark.parametrize("template", ["wizardlm", "alpaca", "vicuna", "Q: {instruction}\nA:", "tokenizer"])
def test_the_model_learns_to_answer_the_tokens_that_a_server_asks_with(models, kind, template):
    tokenizer = _make_tokenizer(models, kind)
    begins = bool(begin_ids(tokenizer))
    tokenizer.chat_template = build_chat_template(template, adds_bos=begins) or CHATML
    answer = {"role": "assistant", "content": "It joins the set."}

    for before, question in itertools.product(CONVERSATIONS.values(), QUESTIONS.values()):
        messages = [*before, question]
        (row,) = tokens.tokenize([[*messages, answer]], template, tokenizer, 512).rows
        # Chat templates of others know no input; ours do.
        plain = [{**one, "content": join_input(one)} for one in messages] if template == "tokenizer" else messages
        served = list(
            tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=True, return_dict=False)
        )

        assert encode_prompt(messages, template, tokenizer) == served
        assert list(row.input_ids[: len(served)]) == served
        learned = list(row.labels[len(served) :])
        assert learned == list(row.input_ids[len(served) :])
        assert IGNORED not in learned
        assert tokenizer.decode(learned, skip_special_tokens=True).strip() == "It joins the set."


@pytest.mark.parametrize("kind", ["llama", "first", "always"])
def test_an_answer_that_would_join_its_prompt_leaves_the_prompt_as_it_is_asked(models, kind):
    tokenizer = _make_tokenizer(models, kind)
    template = "Retur{instruction}retur"
    row = [{"role": "user", "content": " "}, {"role": "assistant", "content": "ns the list"}]

    (encoded,) = encode_examples(row, template, tokenizer)

    prompt = encode_prompt(row[:1], template, tokenizer)
    whole = tokenizer(tokenizer.bos_token + "Retur retur" + "ns the list", add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] != prompt, "the answer joins its prompt"
    assert encoded.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(encoded.input_ids[len(prompt) : -1]).strip() == "ns the list"


def test_the_data_set_and_the_batches_hold_the_rows_as_they_were(models):
    tokenizer = load_tokenizer(models["llama"])
    rows = tokens.tokenize([ROW, MORE, ROW + MORE], "wizardlm", tokenizer, 512)
    dataset = build_dataset(rows)

    batch = Collator(choose_pad_token(tokenizer), packed=False)([dataset[index] for index in range(3)])

    for index, row in enumerate(rows.rows):
        length = len(row.input_ids)
        assert dataset[index]["input_ids"] == list(row.input_ids)
        assert batch["input_ids"][index, :length].tolist() == list(row.input_ids)
        assert batch["labels"][index].tolist() == list(row.labels) + [IGNORED] * (batch["labels"].shape[1] - length)
        assert batch["attention_mask"][index].sum() == length
