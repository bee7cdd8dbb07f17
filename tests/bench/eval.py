"""Log-likelihood requests a second in rows that share beginnings, beside batch 1: `make bench-eval`.

The baseline is lm-eval's own `HFLM` with batch size 1, which answers continuations of one token that share a context
from one pass; its batches of 8 are measured, too. One small random Llama in fp32 on one thread; the arms take
turns, and the median of the rounds counts. Seconds are those of the processor, so that other work on the machine counts
for little.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence

# Before torch is imported.
os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import tokenizers
import torch
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune_trainer.evaluation.language_model import SharingModel
from tests.bench.results import Result, write_results

SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
VOCABULARY = 4096
"""A quarter of the weights of layers and head are the head's, as in language models of a billion weights."""
TOLERANCE = 1e-4
"""Nats that a log-likelihood may differ by from the one of batch 1."""

BASELINE, SHARED = "batch 1", "shared"

Request = tuple[None, list[int], list[int]]
Score = Callable[[Sequence[Request]], list[tuple[float, bool]]]


def main() -> int:
    """Measure every task, and write the results; the headline is the rate over all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    arms, cases = _build_arms(), _draw_cases()
    seconds: dict[str, dict[str, float]] = {}
    differences = []
    for task, requests in cases.items():
        seconds[task], difference = _measure(requests, arms, rounds)
        differences.append(difference)
    results = []
    for arm in reversed([arm for arm in arms if arm != BASELINE]):
        suffix = "" if arm == SHARED else f"_{arm.replace(' ', '_')}"
        results.append(_rate(f"examples_per_second{suffix}", list(cases), arm, cases, seconds))
    results += [_rate(f"examples_per_second_{task}", [task], SHARED, cases, seconds) for task in cases]
    results.append(Result("largest_difference", max(differences), "nats of a log-likelihood"))
    write_results("eval", results)
    return 0 if max(differences) <= TOLERANCE else 1


def _rate(
    metric: str,
    tasks: Sequence[str],
    arm: str,
    cases: dict[str, list[Request]],
    seconds: dict[str, dict[str, float]],
) -> Result:
    count = sum(len(cases[task]) for task in tasks)
    rate, base = (count / sum(seconds[task][each] for task in tasks) for each in (arm, BASELINE))
    return Result(metric, rate, "requests/s", BASELINE, base)


def _build_arms() -> dict[str, Score]:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, **SHAPE)
    model = LlamaForCausalLM(config).eval()
    words = {f"w{number}": number for number in range(VOCABULARY)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w2")

    def build_stock(size: int) -> Score:
        stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, device="cpu")
        return lambda requests: stock._loglikelihood_tokens(requests, disable_tqdm=True)

    ours = SharingModel(model, tokenizer)
    return {
        BASELINE: build_stock(1),
        "batch 8": build_stock(8),
        SHARED: lambda requests: ours._loglikelihood_tokens(requests, disable_tqdm=True),
    }


def _draw_cases() -> dict[str, list[Request]]:
    """Return requests with the lengths of the four tasks of open-llm-v1, 24 questions of each, as `limit: 24` asks."""
    draw = random.Random(0)

    def some(shortest: int, longest: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(shortest, longest))]

    def ask(prompt: tuple[int, int], answer: tuple[int, int], *, choices: int = 4, examples: int = 0) -> list[Request]:
        shared = some(examples, examples)
        questions = [[*shared, *some(*prompt)] for _ in range(24)]
        return [(None, question, some(*answer)) for question in questions for _ in range(choices)]

    return {
        # 25 and 10 examples, drawn for each question.
        "arc": ask((700, 1000), (2, 12)),
        "hellaswag": ask((700, 1000), (15, 40)),
        # 5 examples, the same for a subject; the answer is a letter.
        "mmlu": ask((60, 140), (1, 1), examples=550),
        # None, but the same six questions with answers before each.
        "truthfulqa": ask((15, 30), (6, 18), choices=7, examples=190),
    }


def _measure(requests: Sequence[Request], arms: dict[str, Score], rounds: int) -> tuple[dict[str, float], float]:
    """Return the median seconds of each arm, and by how much a log-likelihood differs at most."""
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    scores = {}
    for _ in range(rounds):
        for arm, score in arms.items():
            started = time.process_time()
            scores[arm] = score(requests)
            seconds[arm].append(time.process_time() - started)
    pairs = zip(scores[SHARED], scores[BASELINE], strict=True)
    difference = max(abs(one[0] - other[0]) for one, other in pairs)
    return {arm: statistics.median(times) for arm, times in seconds.items()}, difference


if __name__ == "__main__":
    sys.exit(main())
