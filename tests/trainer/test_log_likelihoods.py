"""Requests that share beginnings have the log-likelihoods that lm-eval gives each alone, in every architecture."""

import random

import pytest

from finetune_trainer.evaluation import shared_prefix
from finetune_trainer.training.modeling import load_model, load_tokenizer


def _draw_requests(vocabulary):
    draw = random.Random(1)

    def some(count):
        return [draw.randrange(3, vocabulary) for _ in range(count)]

    examples = some(20)
    questions = [[*examples, *some(5)] for _ in range(4)] + [some(1), some(11), some(300)]
    return [(None, question, some(count)) for question in questions for count in (1, 1, 4, 7)]


def _score(model, tokenizer, requests, size=None):
    from lm_eval.models.huggingface import HFLM

    from finetune_trainer.evaluation.language_model import SharingModel

    if size is None:
        return SharingModel(model, tokenizer)._loglikelihood_tokens(requests, disable_tqdm=True)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, device="cpu")
    return stock._loglikelihood_tokens(requests, disable_tqdm=True)


@pytest.mark.parametrize(("family", "shares"), [("llama", True), ("gpt_neox", True), ("mpt", False)])
def test_scores_are_those_of_batch_one(models, family, shares):
    model, tokenizer = load_model(models[family], "float32").eval(), load_tokenizer(models[family])
    requests = _draw_requests(200)
    if family == "mpt":
        requests = [request for request in requests if len(request[1]) < 200]

    found = _score(model, tokenizer, requests)

    expected = _score(model, tokenizer, requests, 1)
    assert shared_prefix.is_exact(model) is shares
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    # What follows a scoring finds the model as it was.
    assert _score(model, tokenizer, requests, 1) == expected


def test_what_the_model_would_write_itself_is_told(models):
    import torch

    model, tokenizer = load_model(models["llama"], "float32").eval(), load_tokenizer(models["llama"])
    context = [5, 6, 7]
    with torch.inference_mode():
        ids = torch.tensor([context])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=3)
    answer = written[0, len(context) :].tolist()

    (_, first), (_, second) = _score(
        model, tokenizer, [(None, context, answer), (None, context, [*answer[:-1], 3 + answer[-1] % 7])]
    )

    assert first
    assert not second


def test_a_window_shorter_than_the_sequences_is_respected(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig

    from tests.support.tiny_models import build_tokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=300, num_key_value_heads=2, sliding_window=16, initializer_range=0.3, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tokenizer = build_tokenizer(["some text"], 300, adds_bos=True)
    requests = _draw_requests(250)

    assert shared_prefix.is_exact(model)
    found, expected = _score(model, tokenizer, requests), _score(model, tokenizer, requests, 1)

    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
