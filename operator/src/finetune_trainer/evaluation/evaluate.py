"""The story of an evaluation: the promoted model and its base, on held-out rows and tasks, under one harness."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import RunConfig
from finetune_contract.workspace import Workspace
from finetune_trainer.errors import TrainerError
from finetune_trainer.evaluation.harness import Scores, TaskResults, is_local, run_tasks
from finetune_trainer.evaluation.holdout import measure_entropy, score_holdout
from finetune_trainer.evaluation.refusal_rates import TASK as REFUSALS
from finetune_trainer.evaluation.refusal_rates import JudgedAnswer, measure_refusals
from finetune_trainer.evaluation.samples import Sample, answer_samples, choose_samples, write_samples
from finetune_trainer.promotion import promoted
from finetune_trainer.reporting import emit
from finetune_trainer.training import modeling, tokens
from finetune_trainer.training.inputs import find_dataset

TUNED, BASE = "tuned", "base"


@dataclasses.dataclass(frozen=True)
class Side:
    """What one model reached."""

    scores: Scores = dataclasses.field(default_factory=dict)
    errors: Scores = dataclasses.field(default_factory=dict)
    """Standard errors, of the scores that have one."""
    answers: list[str] = dataclasses.field(default_factory=list)
    """To the sample prompts."""
    judged: tuple[JudgedAnswer, ...] = ()
    """Answers to the prompts that rates of refusals are measured with."""
    tasks: TaskResults = dataclasses.field(default_factory=TaskResults)


def evaluate(run: RunConfig, folder: pathlib.Path, others: Mapping[str, pathlib.Path]) -> dict[str, Side]:
    """Return what a model, its base and other models reach, by TUNED, BASE and the others' names."""
    folders = {TUNED: folder}
    if run.evaluation.baseline:
        folders[BASE] = modeling.find_base_model(run)
    material = _read_material(run)
    sides = {name: _score(run, name, path, material) for name, path in {**folders, **others}.items()}
    if material.samples:
        base = sides[BASE].answers if BASE in sides else []
        path = Workspace(pathlib.Path(run.workspace)).samples
        write_samples(path, read_digest(folder), material.samples, sides[TUNED].answers, base)
    return sides


def read_digest(folder: pathlib.Path) -> str:
    """Return the digest of a promoted model; empty for a folder that is none."""
    return str(promoted.read_manifest(folder)["digest"]) if (folder / promoted.MANIFEST).exists() else ""


def read_holdout(run: RunConfig) -> tokens.TokenizedRows:
    """Return the held-out rows in the base's tokens. Raises TrainerError when there are none."""
    base = modeling.find_base_model(run)
    tokenizer = modeling.load_tokenizer(base, run.trust_remote_code)
    max_length = min(run.training.max_length, modeling.limit_length(modeling.read_config(base, run.trust_remote_code)))
    path = find_dataset(run) / "holdout.jsonl"
    rows = tokens.tokenize(tokens.read_conversations(path), run.dataset.prompt_template, tokenizer, max_length)
    if not rows.rows:
        raise TrainerError(
            Reason.EVALUATION_FAILED,
            ExitCode.DATA,
            f"{path}: no held-out row has an answer",
            "Raise spec.dataset.holdoutFraction, or set spec.evaluation.holdout to false.",
        )
    return rows


@dataclasses.dataclass(frozen=True)
class Material:
    """What every model is asked."""

    rows: tokens.TokenizedRows | None = None
    """Held-out rows in the tokens of the base; None: they are not scored."""
    samples: tuple[Sample, ...] = ()
    vocabulary: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Of the base."""


def _read_material(run: RunConfig) -> Material:
    if not run.evaluation.holdout:
        return Material()
    rows = read_holdout(run)
    samples = choose_samples(tokens.read_conversations(find_dataset(run) / "holdout.jsonl"), run.dataset.seed)
    tokenizer = modeling.load_tokenizer(modeling.find_base_model(run), run.trust_remote_code)
    return Material(rows, tuple(samples), tokenizer.get_vocab())


def _score(run: RunConfig, name: str, folder: pathlib.Path, material: Material) -> Side:
    import torch

    # All models in 16 bits, as they are served: a difference in precision would pass for one in quality.
    dtype = "float16" if run.training.precision == "fp16" else "bfloat16"
    tokenizer = modeling.load_tokenizer(folder, run.trust_remote_code)
    model: Any = modeling.load_model(folder, dtype, run.trust_remote_code)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    side = _score_holdout(run, name, model, tokenizer, material)
    if run.evaluation.refusals:
        rates = measure_refusals(model, tokenizer, run.dataset.prompt_template, run.evaluation.limit)
        side.scores[REFUSALS], side.errors[REFUSALS] = rates.scores, rates.errors
        side = dataclasses.replace(side, judged=rates.answers)
        emit("refusals measured", model=name, prompts=len(rates.answers), **rates.scores)
    if run.evaluation.tasks:
        root = pathlib.Path(run.workspace)
        local = any(is_local(task) for task in run.evaluation.tasks)
        emit("tasks begin", model=name, tasks=len(run.evaluation.tasks), local=local)
        found = run_tasks(model, tokenizer, run.evaluation.tasks, run.evaluation.limit, root)
        side = dataclasses.replace(
            side, scores=side.scores | found.scores, errors=side.errors | found.errors, tasks=found
        )
    return side


def _score_holdout(run: RunConfig, name: str, model: Any, tokenizer: Any, material: Material) -> Side:
    side, rows = Side(), material.rows
    if rows is None:
        return side
    words = tokenizer.get_vocab()
    if all(words.get(token) == index for token, index in material.vocabulary.items()):
        scores, errors = score_holdout(model, rows, modeling.choose_pad_token(tokenizer))
        side.scores["holdout"], side.errors["holdout"] = scores | {"unigram_entropy": measure_entropy(rows)}, errors
        emit("held-out rows scored", model=name, rows=len(rows.rows), **side.scores["holdout"])
    else:
        emit("held-out rows are not scored: a loss per token of other tokens cannot be compared", model=name)
    answers = answer_samples(model, tokenizer, material.samples, run.dataset.prompt_template)
    return dataclasses.replace(side, answers=answers)
