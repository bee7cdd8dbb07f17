"""A tiny Llama in Hugging Face layout, initialised once from a fixed seed, with a tokenizer trained on given text.

Written without torch, so that the demo's host needs none: the weights are drawn with NumPy in the distribution that
`transformers` uses for a fresh Llama (normal, standard deviation 0.02; norms at one).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

INITIAL_STD = 0.02
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The architecture's sizes."""

    vocabulary: int = 4096
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    intermediate: int = 512
    context: int = 1024


def write_tiny_llama(folder: pathlib.Path, texts: Iterable[str], *, shape: Shape = Shape(), seed: int = 1) -> int:
    """Write model, configuration and tokenizer into `folder`; return the number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder, texts, shape)
    weights = _make_weights(shape, seed)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_make_config(shape), indent=1, sort_keys=True))
    return sum(weight.size for weight in weights.values())


def _write_tokenizer(folder: pathlib.Path, texts: Iterable[str], shape: Shape) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, begin, end = SPECIAL_TOKENS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "pad_token": pad,
        "model_max_length": shape.context,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1, sort_keys=True))


def _make_weights(shape: Shape, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)

    def draw(*sizes: int) -> np.ndarray:
        return generator.normal(0.0, INITIAL_STD, sizes).astype(np.float32)

    weights = {"model.embed_tokens.weight": draw(shape.vocabulary, shape.hidden)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weights[f"{prefix}self_attn.{name}.weight"] = draw(shape.hidden, shape.hidden)
        for name in ("gate_proj", "up_proj"):
            weights[f"{prefix}mlp.{name}.weight"] = draw(shape.intermediate, shape.hidden)
        weights[f"{prefix}mlp.down_proj.weight"] = draw(shape.hidden, shape.intermediate)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = np.ones(shape.hidden, np.float32)
    weights["model.norm.weight"] = np.ones(shape.hidden, np.float32)
    weights["lm_head.weight"] = draw(shape.vocabulary, shape.hidden)
    return weights


def _make_config(shape: Shape) -> dict[str, object]:
    pad, begin, end = range(len(SPECIAL_TOKENS))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": shape.context,
        "vocab_size": shape.vocabulary,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "pad_token_id": pad,
        "bos_token_id": begin,
        "eos_token_id": end,
        "torch_dtype": "float32",
    }
