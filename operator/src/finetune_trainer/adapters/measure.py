"""What a composition does beside its base and each part alone: losses, scores, and how far it drifts from them.

Adapters interfere: their sum may do what none of them does. The base is loaded once, with the composition and every
part on it as adapters that act one at a time; a part alone acts with its weight in the profile, so that a profile of
one adapter has no drift. Drift is measured at the answer tokens of held-out rows: the mean divergence
KL(alone || composition) of the next-token distributions, and how often both find the same token likeliest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from typing import TYPE_CHECKING, Any

from finetune_trainer.adapters.compose import Part, Settings
from finetune_trainer.adapters.composition import make_profile, write_composition
from finetune_trainer.adapters.profile import BASE, COMPOSITION, Profile
from finetune_trainer.evaluation.compare import Difference, compare
from finetune_trainer.evaluation.harness import Scores, score_tasks
from finetune_trainer.evaluation.holdout import batch_rows, estimate_error
from finetune_trainer.evaluation.refusal_rates import TASK as REFUSALS
from finetune_trainer.evaluation.refusal_rates import measure_refusals
from finetune_trainer.reporting import ProgressBar, emit
from finetune_trainer.training import modeling
from finetune_trainer.training.collate import Collator
from finetune_trainer.training.tokens import IGNORED, TokenizedRows

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterator, Mapping, Sequence

NAME = "measurement.json"
VERSION = 1
BATCH_TOKENS = 2048
"""Tokens of a batch: the next-token distributions of two sides are in memory at once, in 32 bits."""
HOLDOUT = "holdout"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over tokens, and its standard error over rows."""

    value: float
    error: float


@dataclasses.dataclass(frozen=True)
class Drift:
    """How far the composition is from one side."""

    divergence: Estimate
    """Mean KL(side || composition) in nats per answer token."""
    agreement: Estimate
    """Share of answer tokens at which both find the same token likeliest."""
    loss: Estimate
    """Held-out loss of the composition minus the side's; the error is that of the differences, row by row."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was measured of each side: `base`, the parts by name, `composition`."""

    scores: Mapping[str, Scores]
    errors: Mapping[str, Scores]
    drift: Mapping[str, Drift]
    """Of every side but the composition; empty without held-out rows."""
    num_rows: int

    def list_differences(self) -> dict[str, list[Difference]]:
        """Return for each side how the composition's scores differ from its own."""
        differences = {}
        for side in self.scores:
            if side == COMPOSITION:
                continue
            found = compare(self.scores[COMPOSITION], self.scores[side], self.errors[COMPOSITION], self.errors[side])
            differences[side] = [self._pair(side, each) for each in found]
        return differences

    def _pair(self, side: str, found: Difference) -> Difference:
        """Give the loss the error of its differences row by row: all sides saw the same rows."""
        if (found.task, found.metric) == (HOLDOUT, "loss"):
            return dataclasses.replace(found, error=self.drift[side].loss.error)
        return found

    def to_dict(self, profile: Profile, adapter_digest: str) -> dict[str, Any]:
        """Return what `measurement.json` holds."""
        return {
            "version": VERSION,
            "base": profile.base,
            "profileDigest": profile.digest,
            "digest": adapter_digest,
            "rows": self.num_rows,
            "scores": dict(self.scores),
            "errors": dict(self.errors),
            "drift": {side: dataclasses.asdict(drift) for side, drift in self.drift.items()},
            "differences": {
                side: [
                    {
                        "task": each.task,
                        "metric": each.metric,
                        "difference": each.delta,
                        "error": each.error,
                        "isLargerThanError": each.is_larger_than_error,
                    }
                    for each in found
                ]
                for side, found in self.list_differences().items()
            },
        }


@dataclasses.dataclass(frozen=True)
class Tasks:
    """lm-eval tasks to score each side on."""

    names: Sequence[str]
    limit: int
    """Examples per task; 0: all."""
    root: pathlib.Path
    """Where relative task files begin."""


@dataclasses.dataclass(frozen=True)
class Questions:
    """The prompts that show how often each side refuses what may be answered, and how they are rendered."""

    template: str
    """As in dataset.promptTemplate."""
    limit: int = 0
    """Prompts of each set; 0: all."""


class Sides:
    """A model with the composition and its parts on it, of which one or none acts at a time."""

    def __init__(self, model: Any, composed: pathlib.Path, profile: Profile, parts: Sequence[Part]) -> None:
        import pathlib

        from peft import PeftModel

        self._adapters = {COMPOSITION: COMPOSITION}
        self._model: Any = PeftModel.from_pretrained(model, str(composed), adapter_name=COMPOSITION)
        with tempfile.TemporaryDirectory(prefix="adapters-") as folder:
            for index, (entry, part) in enumerate(zip(profile.entries, parts, strict=True)):
                alone = pathlib.Path(folder) / f"part-{index}"
                write_composition(alone, make_profile([part], Settings(), [entry.name], profile.base), [part])
                # A name of ours: those of users may hold dots, which torch's modules cannot.
                self._model.load_adapter(str(alone), adapter_name=alone.name)
                self._adapters[entry.name] = alone.name
        self._model.eval()
        self.names = (BASE, *(entry.name for entry in profile.entries), COMPOSITION)

    @contextlib.contextmanager
    def acting(self, name: str) -> Iterator[Any]:
        """Yield the model as it is with that adapter alone, or with none."""
        with self._model.disable_adapter() if name == BASE else contextlib.nullcontext():
            if name != BASE:
                self._model.set_adapter(self._adapters[name])
            yield self._model.get_base_model()


def load_sides(
    model: pathlib.Path, composed: pathlib.Path, profile: Profile, parts: Sequence[Part], *, trust: bool = False
) -> Sides:
    """Load the base in 16 bits, as it is served, and put the adapters on it."""
    import torch

    loaded = modeling.load_served_model(model, trust)
    return Sides(loaded.to("cuda" if torch.cuda.is_available() else "cpu"), composed, profile, parts)


def measure(
    sides: Sides, tokenizer: Any, rows: TokenizedRows | None, tasks: Tasks, questions: Questions | None = None
) -> Measurement:
    """Measure every side on held-out rows and tasks, and on what it refuses."""
    scores: dict[str, Scores] = {side: {} for side in sides.names}
    errors: dict[str, Scores] = {side: {} for side in sides.names}
    drift: dict[str, Drift] = {}
    if rows is not None:
        losses, drift = _measure_rows(sides, rows, modeling.choose_pad_token(tokenizer))
        for side, loss in losses.items():
            scores[side][HOLDOUT] = {"loss": loss.value, "perplexity": math.exp(min(loss.value, 700.0))}
            errors[side][HOLDOUT] = {"loss": loss.error}
    for side in sides.names if questions is not None else ():
        assert questions is not None
        with sides.acting(side) as model:
            emit("questions begin", side=side)
            rates = measure_refusals(model, tokenizer, questions.template, questions.limit)
        scores[side][REFUSALS], errors[side][REFUSALS] = rates.scores, rates.errors
    for side in sides.names if tasks.names else ():
        with sides.acting(side) as model:
            emit("tasks begin", side=side, tasks=len(tasks.names))
            found, spread = score_tasks(model, tokenizer, tasks.names, tasks.limit, tasks.root)
        scores[side] |= found
        errors[side] |= spread
    return Measurement(scores, errors, drift, len(rows.rows) if rows is not None else 0)


@dataclasses.dataclass
class _Sums:
    """Sums over the answer tokens of each row, in the order of the batches."""

    loss: list[float] = dataclasses.field(default_factory=list)
    divergence: list[float] = dataclasses.field(default_factory=list)
    agreement: list[float] = dataclasses.field(default_factory=list)


def _measure_rows(sides: Sides, rows: TokenizedRows, pad_token_id: int) -> tuple[dict[str, Estimate], dict[str, Drift]]:
    collate = Collator(pad_token_id, packed=False)
    sums = {side: _Sums() for side in sides.names}
    counts: list[int] = []
    with ProgressBar("measuring held-out rows", len(rows.rows)) as bar:
        for batch in batch_rows(rows.rows, BATCH_TOKENS):
            counts += _measure_batch(sides, collate(batch), sums)
            bar.advance(len(batch))
    losses = {side: _estimate(each.loss, counts) for side, each in sums.items()}
    whole = sums[COMPOSITION].loss
    drift = {
        side: Drift(
            _estimate(each.divergence, counts),
            _estimate(each.agreement, counts),
            _estimate([mine - other for mine, other in zip(whole, each.loss, strict=True)], counts),
        )
        for side, each in sums.items()
        if side != COMPOSITION
    }
    return losses, drift


def _measure_batch(sides: Sides, batch: Mapping[str, Any], sums: Mapping[str, _Sums]) -> list[int]:
    """Add a batch's sums, row by row, and return its numbers of answer tokens."""
    import torch

    labels = batch["labels"][:, 1:]
    is_answer = labels != IGNORED
    place = is_answer.nonzero()[:, 0]
    targets = labels[is_answer]

    def add_up(values: Any) -> list[float]:
        result: list[float] = torch.zeros(len(labels), dtype=torch.float64).index_add_(0, place, values).tolist()
        return result

    composed = _predict(sides, COMPOSITION, batch, is_answer)
    sums[COMPOSITION].loss += add_up(-composed.gather(1, targets[:, None])[:, 0].double())
    for side in sides.names:
        if side == COMPOSITION:
            continue
        alone = _predict(sides, side, batch, is_answer)
        sums[side].loss += add_up(-alone.gather(1, targets[:, None])[:, 0].double())
        sums[side].divergence += add_up((alone.exp() * (alone - composed)).sum(1, dtype=torch.float64))
        sums[side].agreement += add_up((alone.argmax(1) == composed.argmax(1)).double())
    counts: list[int] = is_answer.sum(1).tolist()
    return counts


def _predict(sides: Sides, side: str, batch: Mapping[str, Any], is_answer: Any) -> Any:
    """Return the logarithms of the next-token probabilities at the answer tokens: (tokens, vocabulary), 32 bits."""
    import torch

    with torch.inference_mode(), sides.acting(side) as model:
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits[:, :-1].cpu()
    return torch.log_softmax(logits[is_answer].float(), dim=-1)


def _estimate(totals: Sequence[float], counts: Sequence[int]) -> Estimate:
    mean = sum(totals) / sum(counts)
    return Estimate(mean, estimate_error(list(zip(totals, counts, strict=True)), mean))


def format_table(measurement: Measurement) -> str:
    """Return one Markdown table: a column for each side, a mark where the composition differs beyond the error."""
    sides = list(measurement.scores)
    differences = measurement.list_differences()
    marks = {
        (side, each.task, each.metric): {True: " *", None: " ?"}.get(each.is_larger_than_error, "")
        for side, found in differences.items()
        for each in found
    }
    rows = [["", *sides], ["---", *("---:" for _ in sides)]]
    for task, metrics in measurement.scores[COMPOSITION].items():
        for metric in metrics:
            cells = [f"{task} {metric}"]
            for side in sides:
                value = measurement.scores[side].get(task, {}).get(metric)
                error = measurement.errors[side].get(task, {}).get(metric)
                cells.append(_cell(value, error) + marks.get((side, task, metric), ""))
            rows.append(cells)
    for title, field in (
        ("drift of the composition, nats per token", "divergence"),
        ("same likeliest token", "agreement"),
    ):
        if measurement.drift:
            found = [getattr(measurement.drift[side], field) if side != COMPOSITION else None for side in sides]
            rows.append([title, *(_cell(each.value, each.error) if each else "" for each in found)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", "* the composition differs by more than the error of the difference (95%)"])


def _cell(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")
