"""Labels token by token with a real tokenizer, and packed rows whose examples do not see each other."""

import pytest

from finetune_trainer.data.prompts import build_chat_template, encode_prompt
from finetune_trainer.training import tokens
from finetune_trainer.training.collate import Collator
from finetune_trainer.training.modeling import choose_pad_token, load_tokenizer
from finetune_trainer.training.rank import build_dataset
from finetune_trainer.training.tokens import IGNORED

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


def test_the_chat_template_gives_the_tokens_of_training_over_several_turns(models):
    for family in ("llama", "gpt_neox"):
        tokenizer = load_tokenizer(models[family])
        question = [*ROW, MORE[0]]
        tokenizer.chat_template = build_chat_template("wizardlm", adds_bos=family == "llama")

        served = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=True, return_dict=False)

        assert list(served) == encode_prompt(question, "wizardlm", tokenizer)


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
