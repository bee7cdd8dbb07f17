"""Packed examples have the loss they have alone, in the architectures that the probe lets pass and in no other."""

import itertools
import json

import pytest

from finetune_trainer.training import probe, tokens
from finetune_trainer.training.attention import BY_EXAMPLE
from finetune_trainer.training.collate import Collator
from finetune_trainer.training.modeling import load_model, load_tokenizer, read_config
from finetune_trainer.training.rank import build_dataset
from finetune_trainer.training.tokens import IGNORED
from tests.support.training_runs import build_pairs

WIDTH = 192


def _tokenize(folder, max_length=WIDTH):
    """Return examples of one and of several turns."""
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in build_pairs()[:16]]
    chats = [*turns[:8], *(turns[8] + turns[9], turns[10] + turns[11] + turns[12])]
    return tokens.tokenize(chats, "wizardlm", load_tokenizer(folder), max_length)


def _losses(model, batch):
    """Return the loss of every learned token of a batch, with its label, row after row."""
    import torch

    labels = batch.pop("labels")
    with torch.inference_mode():
        odds = model(**batch, use_cache=False).logits.log_softmax(-1)[:, :-1]
    wanted = labels[:, 1:]
    paid = -odds.gather(2, wanted.clamp(min=0)[..., None])[..., 0]
    return [
        [(label, loss) for label, loss in zip(*row, strict=True) if label != IGNORED]
        for row in zip(wanted.tolist(), paid.tolist(), strict=True)
    ]


def _collate(rows, indexes, *, packed):
    dataset = build_dataset(rows)
    return Collator(0, packed=packed)([dataset[index] for index in indexes])


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("attention", [BY_EXAMPLE, "sdpa"])
def test_every_token_of_a_packed_example_has_the_loss_it_has_alone(models, family, attention):
    alone = _tokenize(models[family])
    packed = tokens.pack(alone, WIDTH)
    assert 1 < len(packed.rows) < len(alone.rows)
    assert max(len(row.lengths) for row in packed.rows) >= 3

    model = load_model(models[family], "float32", attention=attention).eval()
    together = _losses(model, _collate(packed, range(len(packed.rows)), packed=True))
    model.set_attn_implementation("sdpa")
    expected = [_losses(model, _collate(alone, [index], packed=False))[0] for index in range(len(alone.rows))]

    # Cut each row where its examples end: they are told apart by the labels they learn.
    pieces = []
    for row, losses in zip(packed.rows, together, strict=True):
        ends = itertools.accumulate(row.lengths)
        counts = [
            sum(label != IGNORED for label in row.labels[end - length : end])
            for length, end in zip(row.lengths, ends, strict=True)
        ]
        cut = iter(losses)
        pieces += [list(itertools.islice(cut, count)) for count in counts]
    assert sorted(_labels(piece) for piece in pieces) == sorted(_labels(piece) for piece in expected)
    for got, wanted in zip(sorted(pieces, key=_labels), sorted(expected, key=_labels), strict=True):
        assert [loss for _, loss in got] == pytest.approx([loss for _, loss in wanted], abs=1e-5)


def _labels(piece):
    return [label for label, _ in piece]


def test_gradients_of_packed_rows_are_those_of_the_examples(models):
    import torch

    alone = _tokenize(models["llama"])
    packed = tokens.pack(alone, WIDTH)
    model = load_model(models["llama"], "float32", attention=BY_EXAMPLE)
    gradients = []
    for rows, attention in ((packed, BY_EXAMPLE), (alone, "sdpa")):
        model.set_attn_implementation(attention)
        model.zero_grad()
        model(**_collate(rows, range(len(rows.rows)), packed=attention == BY_EXAMPLE)).loss.backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])

    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "attention"), [("llama", BY_EXAMPLE), ("gpt_neox", BY_EXAMPLE), ("mpt", "")])
def test_the_probe_tells_which_architectures_keep_examples_apart(models, family, attention):
    found = probe.find_packed_attention(read_config(models[family]), WIDTH)

    assert found.attention == attention
    assert ("changes by" in found.problem) == (family == "mpt")


@pytest.mark.parametrize(
    ("model_type", "options", "attention"),
    [
        ("gemma", {}, BY_EXAMPLE),
        # These two have no attention of PyTorch's: scores are capped, and the positions turned in their own way.
        ("gemma2", {}, "eager"),
        ("gptj", {}, "eager"),
        ("mistral", {"sliding_window": 4096}, BY_EXAMPLE),
        ("mistral", {"sliding_window": 512}, "sdpa"),
        ("phi3", {"pad_token_id": 0}, BY_EXAMPLE),
        ("qwen2", {}, BY_EXAMPLE),
        ("qwen3", {}, BY_EXAMPLE),
        ("stablelm", {}, "sdpa"),
        ("falcon", {}, ""),
        ("mamba", {}, ""),
    ],
)
def test_architectures_nobody_listed_are_tried_out_in_their_full_configuration(model_type, options, attention):
    from transformers import CONFIG_MAPPING

    # Of 7 billion parameters and more, most of them: the probe makes two small layers of it.
    assert probe.find_packed_attention(CONFIG_MAPPING[model_type](**options), 2048).attention == attention


def test_code_that_lets_examples_see_each_other_is_found_out(models, monkeypatch):
    import finetune_trainer.training.attention as module

    def attend_to_all(*tensors, seq_lengths, **options):
        return module.sdpa_attention_forward(*tensors, is_causal=True, **options)

    monkeypatch.setattr(module, "attend_by_example", attend_to_all)
    config = read_config(models["llama"])

    # The model's own code, with a mask, is still right.
    assert probe.probe(config, WIDTH).attention == "sdpa"


def test_a_probe_that_dies_turns_packing_off(models, monkeypatch):
    import os

    monkeypatch.setattr(probe, "probe", lambda *_: os._exit(9))

    found = probe.find_packed_attention(read_config(models["llama"]), WIDTH)

    assert found == probe.Finding("", "the process that tried it ended with status 9")


@pytest.mark.parametrize(("packing", "ranks"), [("true", 1), ("true", 2), ("false", 2)])
def test_a_step_takes_the_mean_over_all_its_answer_tokens_however_they_are_split(
    make_run, models, data, packing, ranks
):
    import torch

    # One step over the whole data set, in many passes; the last leaves a rank without rows.
    run = make_run("llama", "workspace", f"training.packing={packing}", f"topology.processes_per_node={ranks}")
    run.train("training.gradient_accumulation_steps=64", "training.max_steps=1", "training.precision=fp32")
    (log,) = (
        entry
        for entry in json.loads((run.workspace.checkpoints / "checkpoint-1" / "trainer_state.json").read_text())[
            "log_history"
        ]
        if "loss" in entry
    )

    conversations = list(tokens.read_conversations(data / "train.jsonl"))
    rows = tokens.tokenize(conversations, "wizardlm", load_tokenizer(models["llama"]), 128)
    model = load_model(models["llama"], "float32")
    loss = model(**_collate(rows, range(len(rows.rows)), packed=False)).loss
    loss.backward()
    norm = torch.linalg.vector_norm(torch.stack([weight.grad.norm() for weight in model.parameters()]))
    assert log["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert log["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
