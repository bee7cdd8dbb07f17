"""Whether examples in one row see each other in a model's architecture: tried out, not looked up.

A tiny model of the same class with random weights, on the CPU, gives a few examples their loss one by one and packed.
Where the two are equal, packing is safe. An architecture that ignores position ids (MPT), that mixes neighbouring
tokens outside of attention, or whose code fails on packed rows is found without anybody having listed it.
"""

from __future__ import annotations

import array
import copy
import dataclasses
import itertools
import multiprocessing
import random
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from finetune_trainer.errors import first_line
from finetune_trainer.training import modeling
from finetune_trainer.training.tokens import IGNORED, TokenizedRows, TokenRow, pack

TOLERANCE = 1e-5
"""Nats per token that the losses of an example may differ by in fp32. Rounding stays below a third of it; where
examples see each other, losses of this model change by tenths."""

VOCABULARY = 64
"""Of the tiny models."""

_SECONDS = 120.0
_LENGTHS = (11, 7, 13, 3, 5, 9, 2)
_WIDTH = 32
_WINDOW = 4
_WINDOWS = ("sliding_window", "attention_chunk_size")


@dataclasses.dataclass(frozen=True)
class Finding:
    """What the probe found."""

    attention: str
    """The attention code with which packed examples have the loss they have alone; empty: there is none."""
    problem: str = ""
    """Why there is none."""


def find_packed_attention(config: Any, max_length: int, trust_remote_code: bool = False) -> Finding:
    """Try an architecture out in a process of its own: no thread, random number or crash of it stays behind."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(writer, config, max_length, trust_remote_code), daemon=True)
    child.start()
    writer.close()
    try:
        found = reader.recv() if reader.poll(_SECONDS) else Finding("", f"no answer within {_SECONDS:.0f} s")
    except EOFError:
        child.join(_SECONDS)
        found = Finding("", f"the process that tried it ended with status {child.exitcode}")
    if child.is_alive():
        child.kill()
    child.join()
    return found if isinstance(found, Finding) else Finding("", "no answer")


def _answer(writer: Connection, config: Any, max_length: int, trust_remote_code: bool) -> None:
    import torch

    torch.set_num_threads(1)
    writer.send(probe(config, max_length, trust_remote_code))


def probe(config: Any, max_length: int, trust_remote_code: bool = False) -> Finding:
    """Try the attention by example, then the model's own with a mask."""
    from finetune_trainer.training.attention import BY_EXAMPLE

    problem = ""
    for attention in (BY_EXAMPLE, modeling.choose_attention(config)):
        try:
            difference = _compare(config, attention, max_length, trust_remote_code)
        except Exception as error:
            problem = f"{type(error).__name__}: {first_line(error)}"
            continue
        if difference <= TOLERANCE:
            return Finding(attention)
        problem = f"the loss of an example changes by {difference:.2g} when it shares a row"
    return Finding("", problem)


def _compare(config: Any, attention: str, max_length: int, trust_remote_code: bool) -> float:
    """Return by how much the loss of an example differs at most between alone and packed, in nats per token."""
    import torch

    from finetune_trainer.training.attention import register
    from finetune_trainer.training.collate import Collator

    register()
    model = _build(_shrink(config, max_length), attention, trust_remote_code)
    examples = _draw_examples()
    batch = Collator(0, packed=True)(
        [
            {"input_ids": row.input_ids, "labels": row.labels, "seq_lengths": row.lengths}
            for row in pack(TokenizedRows(examples), _WIDTH).rows
        ]
    )
    labels = batch.pop("labels")
    with torch.inference_mode():
        together = dict(_read_losses(model(**batch, use_cache=False).logits, labels))
        # The measure is the model as its authors wrote it, given nothing but the tokens.
        model.set_attn_implementation(modeling.choose_attention(config))
        alone: dict[tuple[int, ...], float] = {}
        for row in examples:
            logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits
            alone |= _read_losses(logits, torch.tensor([row.labels]))
    return max(abs(together[example] - alone[example]) for example in alone)


def _draw_examples() -> list[TokenRow]:
    draw = random.Random(7)
    examples = []
    for length in _LENGTHS:
        ids = [draw.randrange(1, VOCABULARY) for _ in range(length)]
        examples.append(TokenRow(array.array("i", ids), array.array("i", [IGNORED, *ids[1:]]), (length,)))
    return examples


def _read_losses(logits: Any, labels: Any) -> Iterator[tuple[tuple[int, ...], float]]:
    """Yield the labels of each example, which tell it from the others, with its mean loss."""
    import torch

    odds = logits.float().log_softmax(-1)
    for row, wanted in zip(odds, labels.tolist(), strict=True):
        # Every label is learned but an example's first, and padding.
        for is_learned, places in itertools.groupby(enumerate(wanted), lambda place: place[1] != IGNORED):
            if is_learned:
                at, expected = zip(*places, strict=True)
                losses = -row[torch.tensor(at) - 1, list(expected)]
                yield expected, float(losses.mean())


def build_small(kind: Any, config: Any, attention: str) -> Any:
    """Return a tiny model of a class of models, on the CPU in fp32, with the windows that the configuration has."""
    import torch

    small = _shrink(config, max_length=0)
    return _fill(kind._from_config(small, dtype=torch.float32, attn_implementation=attention))  # noqa: SLF001


def _build(config: Any, attention: str, trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return _fill(
        AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code, attn_implementation=attention
        )
    )


def _fill(model: Any) -> Any:
    """Give a model random weights large enough that what a token sees decides what it predicts."""
    import torch

    torch.manual_seed(0)
    for weight in model.eval().parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return model


def _shrink(config: Any, max_length: int) -> Any:
    """Return a configuration of the same architecture with two small layers; a window that rows exceed stays one."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or ()))
    sizes = {
        "hidden_size": 2 * size,
        "num_attention_heads": 2,
        "num_key_value_heads": 2 if getattr(text, "num_key_value_heads", heads) in (heads, None) else 1,
        "intermediate_size": 4 * size,
        "moe_intermediate_size": size,
        "num_hidden_layers": max(2, len(kinds)),
        "layer_types": (kinds * 2)[: max(2, len(kinds))],
        "vocab_size": VOCABULARY,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
        **{name: _WINDOW for name in _WINDOWS if (getattr(text, name, None) or max_length) < max_length},
    }
    for name, value in sizes.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    return config
