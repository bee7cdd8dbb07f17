"""Tiny random models with a real tokenizer, made in a second: the demo's base model and the tests' model families.

A byte-level BPE tokenizer is trained on the given texts; the weights are random with a fixed seed. Needs torch and
transformers, imported only inside the functions.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any


def build_tiny_llama(
    folder: pathlib.Path,
    texts: Iterable[str],
    *,
    vocab_size: int = 2048,
    hidden: int = 128,
    layers: int = 4,
    seed: int = 0,
) -> pathlib.Path:
    """Write a random Llama with a tokenizer trained on `texts` into `folder`, and return it."""
    from transformers import LlamaConfig

    tokenizer = build_tokenizer(texts, vocab_size, adds_bos=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32),
        num_key_value_heads=max(1, hidden // 32),
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    return write_model(folder, config, tokenizer, seed)


def build_tiny_neox(
    folder: pathlib.Path, texts: Iterable[str], *, vocab_size: int = 512, seed: int = 0
) -> pathlib.Path:
    """Write a random GPT-NeoX (Pythia's architecture); its tokenizer adds no beginning-of-sequence token."""
    from transformers import GPTNeoXConfig

    tokenizer = build_tokenizer(texts, vocab_size, adds_bos=False)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return write_model(folder, config, tokenizer, seed)


def build_tiny_mpt(folder: pathlib.Path, texts: Iterable[str], *, vocab_size: int = 512, seed: int = 0) -> pathlib.Path:
    """Write a random MPT: ALiBi attention, tied embeddings, no position ids."""
    from transformers import MptConfig

    tokenizer = build_tokenizer(texts, vocab_size, adds_bos=False)
    config = MptConfig(
        vocab_size=len(tokenizer),
        d_model=64,
        n_heads=2,
        n_layers=2,
        expansion_ratio=4,
        max_seq_len=256,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return write_model(folder, config, tokenizer, seed)


def build_tiny_classifiers(root: pathlib.Path, texts: Iterable[str], *, seed: int = 0) -> dict[str, pathlib.Path]:
    """Write random classifiers with the labels NORMAL and REFUSAL, and return their folders by family."""
    import torch
    from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig

    tokenizer = build_tokenizer(texts, 400, adds_bos=True)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    labels = {"id2label": {0: "NORMAL", 1: "REFUSAL"}, "label2id": {"NORMAL": 0, "REFUSAL": 1}}
    # Far from zero, so that different texts get different scores.
    common = {**sizes, **labels, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "initializer_range": 0.3}
    configs = {"bert": BertConfig(**common), "llama": LlamaConfig(**common, pad_token_id=None)}
    for family, config in configs.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_config(config)
        model.save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
    return {family: root / family for family in configs}


def build_tokenizer(texts: Iterable[str], vocab_size: int, *, adds_bos: bool) -> Any:
    """Train a byte-level BPE tokenizer; it has no padding token, as many real base models have none."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>"] if adds_bos else ["</s>"]
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    options = {"bos_token": "<s>"} if adds_bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", **options)


def write_model(folder: pathlib.Path, config: Any, tokenizer: Any, seed: int) -> pathlib.Path:
    """Initialise a model from `config` with `seed`, and write it and its tokenizer in bf16."""
    import torch
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
