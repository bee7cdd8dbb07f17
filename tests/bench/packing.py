"""Real tokens in packed rows, and tokens trained on a second, packed beside padded; see docs/benchmarks/packing.md.

One process trains one small Llama on rows of real text through the real tokenization, packing, loader and collator. The
arms take turns, each with every batch size, and each is judged by its best.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import math
import os
import pathlib
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

# Before torch is imported.
os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

from finetune_trainer.training.packing import pack_lengths
from finetune_trainer.training.sampler import ReadPlan, RowLoader
from finetune_trainer.training.tokens import TokenizedRows, pack, tokenize
from tests.bench.results import REPOSITORY, Result, write_results
from tests.demo.corpus import list_documented
from tests.support.tiny_models import build_tiny_llama

MAX_LENGTH = 2048
"""The recipe's."""
VOCABULARY = 2048
"""Of the tokenizer: the embeddings are not to outweigh the layers of so small a model."""
BATCHES = (1, 2, 4)
EXAMPLES_PER_STEP = 128
"""The recipe's, so that no arm pays for more optimizer steps than another."""
ROLEPLAY = REPOSITORY / "tests" / "data" / "instructions" / "roleplay-lengths.txt"
"""Characters of a real set's rows."""
PACKED, MASKED, LONGEST, MAXIMUM = "packed", "packed, with a mask", "padded to longest", "padded to max"


@dataclasses.dataclass
class Arm:
    """One way to make batches of the same examples."""

    name: str
    rows: TokenizedRows
    attention: str
    multiple_of: int = 8
    places: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    """Places of the batches trained on, padding included, by batch size."""
    seconds: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)

    @property
    def best(self) -> int:
        """Return the batch size with the highest rate."""
        return max(BATCHES, key=self.rate)

    def share(self, batch: int) -> float:
        """Return the share of real tokens among the places of a whole epoch."""
        return self.rows.num_tokens / sum(self.widths(batch))

    def widths(self, batch: int) -> Iterator[int]:
        """Yield the places of each batch of an epoch."""
        plan = ReadPlan(len(self.rows.rows), batch, num_ranks=1, rank=0, seed=1)
        for index in range(plan.num_passes):
            lengths = [len(self.rows.rows[number].input_ids) for number in plan.rows(0, index)]
            yield len(lengths) * -(-max(lengths) // self.multiple_of) * self.multiple_of

    def rate(self, batch: int) -> float:
        """Return the real tokens a second, prompts and answers.

        A turn sees a part of the epoch, whose share of real tokens is chance: that of the whole epoch counts.
        """
        return self.share(batch) * self.places[batch] / self.seconds[batch]


def read_texts() -> list[tuple[str, str]]:
    """Return a question about each module of the standard library, with all that its documentation says."""
    modules: dict[str, list[str]] = {}
    for name, text in sorted(set(list_documented())):
        modules.setdefault(name.split(".", 1)[0], []).append(f"{name}\n{text}")
    return [(f"Describe the module `{module}`.", "\n\n".join(texts)) for module, texts in modules.items()]


def read_batches(arm: Arm, batch: int) -> Iterator[dict[str, Any]]:
    """Yield the batches of one epoch after the other, in the trainer's order."""
    from finetune_trainer.training.collate import Collator
    from finetune_trainer.training.rank import build_dataset

    packed = arm.name in (PACKED, MASKED)
    plan = ReadPlan(len(arm.rows.rows), batch, num_ranks=1, rank=0, seed=1)
    loader = RowLoader(build_dataset(arm.rows), Collator(0, packed, arm.multiple_of), plan)
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


def train(arm: Arm, batch: int, model: Any, batches: Iterator[dict[str, Any]], seconds: float) -> None:
    """Train for some time, at least one pass, and count."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    examples_per_pass = batch * arm.rows.num_examples / len(arm.rows.rows)
    passes_per_step = max(1, round(EXAMPLES_PER_STEP / examples_per_pass))
    model.set_attn_implementation(arm.attention)
    started = time.perf_counter()
    for number in itertools.count(1):
        inputs = next(batches)
        (model(**inputs, use_cache=False).loss / passes_per_step).backward()
        if number % passes_per_step == 0:
            optimizer.step()
            optimizer.zero_grad()
        arm.places[batch] += inputs["input_ids"].numel()
        if time.perf_counter() - started >= seconds:
            break
    arm.seconds[batch] += time.perf_counter() - started


def measure_rates(seconds: float, rounds: int) -> tuple[dict[str, Arm], TokenizedRows]:
    """Train every arm with every batch size, in turns."""
    from finetune_trainer.training.attention import BY_EXAMPLE
    from finetune_trainer.training.modeling import load_model, load_tokenizer

    texts = read_texts()
    with tempfile.TemporaryDirectory() as name:
        folder = build_tiny_llama(pathlib.Path(name), (answer for _, answer in texts), vocab_size=VOCABULARY)
        chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in texts]
        examples = tokenize(chats, "alpaca", load_tokenizer(folder), MAX_LENGTH)
        model = load_model(folder, "float32").train()
    rows = pack(examples, MAX_LENGTH)
    arms = [
        Arm(PACKED, rows, BY_EXAMPLE),
        Arm(MASKED, rows, "sdpa"),
        Arm(LONGEST, examples, "sdpa"),
        Arm(MAXIMUM, examples, "sdpa", MAX_LENGTH),
    ]
    cells = [(arm, batch, read_batches(arm, batch)) for batch in BATCHES for arm in arms]
    # The first passes of a process are slower.
    train(
        dataclasses.replace(arms[0], places=collections.Counter(), seconds=collections.Counter()),
        1,
        model,
        cells[0][2],
        1,
    )
    for _ in range(rounds):
        for arm, batch, batches in cells:
            train(arm, batch, model, batches, seconds)
    return {arm.name: arm for arm in arms}, examples


def measure_shares(examples: TokenizedRows) -> dict[str, dict[str, float]]:
    """Return the share of real tokens in packed rows of several sets of examples, and what whole rows allow."""
    # Of texts that are not tokenized: about four characters a token, and ten tokens of the template.
    names = [10 + (len(name) + len(text)) // 4 for name, text in sorted(set(list_documented()))]
    lines = ROLEPLAY.read_text(encoding="utf-8").splitlines()[1:]
    sets = {
        "roleplay": (MAX_LENGTH, [10 + int(number) // 4 for line in lines for number in line.split()]),
        "lognormal": (MAX_LENGTH, draw_lengths(70_000)),
        "documentation_by_module": (MAX_LENGTH, [len(row.input_ids) for row in examples.rows]),
        "documentation_by_name": (256, names),
    }
    shares = {}
    for name, (max_length, drawn) in sets.items():
        lengths = [min(length, max_length) for length in drawn]
        real, num_rows = sum(lengths), len(pack_lengths(lengths, max_length))
        shares[name] = {
            "examples": len(lengths),
            "mean": real / len(lengths),
            "share": real / (num_rows * max_length),
            "possible": real / (-(-real // max_length) * max_length),
            "padded_to_max": real / (len(lengths) * max_length),
        }
    return shares


def draw_lengths(count: int) -> list[int]:
    """Return lengths as the recipe's rows have them, 530 tokens on average."""
    draw = random.Random(1).lognormvariate
    return [min(MAX_LENGTH, max(8, round(draw(math.log(400), 0.72)))) for _ in range(count)]


def time_packing() -> float:
    """Return the seconds that packing a million lengths takes."""
    lengths = draw_lengths(1_000_000)
    started = time.perf_counter()
    pack_lengths(lengths, MAX_LENGTH)
    return time.perf_counter() - started


def build_results(arms: dict[str, Arm], shares: dict[str, dict[str, float]]) -> list[Result]:
    """Return the figures beside those of their baselines."""
    packed, padded = arms[PACKED], arms[MAXIMUM]
    best = packed.rate(packed.best)
    results = [
        Result(_name("real_token_share", name), each["share"], "share", "padded to max", each["padded_to_max"])
        for name, each in shares.items()
    ]
    results.append(
        Result("tokens_per_second", best, "tokens/s", f"{MAXIMUM}, batch {padded.best}", padded.rate(padded.best))
    )
    for name, arm in (("padded_to_longest", arms[LONGEST]), ("with_a_mask", arms[MASKED])):
        results.append(
            Result(f"tokens_per_second_{name}", arm.rate(arm.best), "tokens/s", f"packed, batch {packed.best}", best)
        )
    return [*results, Result("pack_a_million_seconds", time_packing(), "s")]


def _name(metric: str, case: str) -> str:
    """Return the headline name for the case that is judged: rows of people's own lengths."""
    return metric if case == "roleplay" else f"{metric}_{case}"


def main(words: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one turn of an arm")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each arm with each batch size")
    args = parser.parse_args(words)
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    arms, examples = measure_rates(args.seconds, args.rounds)
    shares = measure_shares(examples)
    table = {
        name: {batch: [round(arm.rate(batch), 1), round(arm.share(batch), 4)] for batch in BATCHES}
        for name, arm in arms.items()
    }
    for name, cells in table.items():
        print(
            f"{name:22}",
            "  ".join(f"batch {batch}: {rate:7.0f}/s {share:.3f}" for batch, (rate, share) in cells.items()),
        )
    write_results("packing", build_results(arms, shares), rates=table, shares=shares, max_length=MAX_LENGTH)


if __name__ == "__main__":
    main()
