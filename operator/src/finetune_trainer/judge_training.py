"""Trains a sequence classifier on labelled rows, to be the judge of the data. Needs torch.

Called by `commands/judge` and the judge's benchmark. The base is read as `classifier` reads a judge: code that comes
with it never runs. Equal rows, settings and hardware give equal weights.
"""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, Any

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.classifier import Classifier, load_parts
from finetune_trainer.data.labelled import LABELS
from finetune_trainer.errors import TrainerError
from finetune_trainer.reporting import ProgressBar

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterator, Sequence

    from finetune_trainer.data.labelled import LabelledRow

_WARM_UP = 0.1
"""Share of the steps in which the learning rate grows."""
_POOL = 8
"""Batches that are sorted by length together, so that little is padded."""


@dataclasses.dataclass(frozen=True)
class JudgeTraining:
    """How a judge is trained."""

    epochs: int = 4
    learning_rate: float = 5e-5
    batch_size: int = 16
    max_length: int = 256
    """Tokens of a text; the rest is cut off."""
    frozen_layers: int = 0
    """How many of the lowest layers stay as they are; the embeddings always do."""
    seed: int = 0


def train_judge(rows: Sequence[LabelledRow], base: pathlib.Path, how: JudgeTraining) -> Classifier:
    """Return a classifier of the labels, on the GPU where there is one. Raises TrainerError."""
    import torch

    torch.manual_seed(how.seed)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: number for number, name in enumerate(LABELS)}}
    tokenizer, model, missing = load_parts(base, **names, ignore_mismatched_sizes=True)
    # A pooler belongs to the head: many bases come without one.
    lacking = [name for name in missing if name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name]
    if lacking:
        what = f"--base {base} has no {min(lacking)}"
        raise TrainerError(Reason.MODEL_INVALID, ExitCode.NO_INPUT, what, "Name a folder with the whole model.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device, dtype=torch.float32)
    trained = _freeze(model, how.frozen_layers)
    encoded = tokenizer([row.text for row in rows], truncation=True, max_length=how.max_length)
    steps = how.epochs * -(-len(rows) // how.batch_size)
    optimizer = torch.optim.AdamW(trained, lr=how.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (_WARM_UP * steps), (steps - step) / steps)
    )
    # Both labels weigh the same, however many rows have them.
    counts = torch.bincount(torch.tensor([row.label for row in rows]), minlength=len(LABELS))
    loss_of = torch.nn.CrossEntropyLoss(weight=(len(rows) / (len(LABELS) * counts)).to(device))
    model.train()
    with ProgressBar("training the judge", how.epochs * len(rows)) as bar:
        for batch in _list_batches([len(ids) for ids in encoded["input_ids"]], how):
            one = {name: [values[index] for index in batch] for name, values in encoded.items()}
            logits = model(**tokenizer.pad(one, return_tensors="pt").to(device)).logits
            loss = loss_of(logits, torch.tensor([rows[index].label for index in batch], device=device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.advance(len(batch), loss=f"{loss.item():.3f}")
    return Classifier(model.eval(), tokenizer, [LABELS.index("remove")])


def _freeze(model: Any, num_layers: int) -> list[Any]:
    """Freeze embeddings and the lowest layers, and return the parameters that are trained. Raises TrainerError."""
    import torch

    frozen = [model.get_input_embeddings()]
    if num_layers:
        lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
        layers = max(lists, key=len, default=())
        if num_layers > len(layers):
            what = f"--frozen-layers {num_layers}: the base has {len(layers)} layers"
            raise TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, what, "Write a smaller number.")
        frozen += layers[:num_layers]
    for module in frozen:
        module.requires_grad_(False)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _list_batches(lengths: Sequence[int], how: JudgeTraining) -> Iterator[list[int]]:
    """Yield the texts' numbers, all of them in each epoch, texts of like length together, in an order by the seed."""
    rng, size = random.Random(how.seed), how.batch_size
    for _ in range(how.epochs):
        order = rng.sample(range(len(lengths)), len(lengths))
        pools = [
            sorted(order[start : start + _POOL * size], key=lambda index: lengths[index])
            for start in range(0, len(order), _POOL * size)
        ]
        batches = [pool[start : start + size] for pool in pools for start in range(0, len(pool), size)]
        rng.shuffle(batches)
        yield from batches
