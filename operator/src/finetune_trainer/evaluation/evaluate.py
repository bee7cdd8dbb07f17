"""The story of an evaluation: the promoted model and its base, on held-out rows and tasks, under one harness."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import RunConfig
from finetune_contract.workspace import Workspace
from finetune_trainer.errors import TrainerError
from finetune_trainer.evaluation.harness import Scores, is_local, score_tasks
from finetune_trainer.evaluation.holdout import measure_entropy, score_holdout
from finetune_trainer.evaluation.samples import Sample, answer_samples, choose_samples, write_samples
from finetune_trainer.promotion import promoted
from finetune_trainer.reporting import emit
from finetune_trainer.training import modeling, tokens
from finetune_trainer.training.inputs import find_dataset


@dataclasses.dataclass(frozen=True)
class Side:
    """What one model reached."""

    scores: Scores = dataclasses.field(default_factory=dict)
    errors: Scores = dataclasses.field(default_factory=dict)
    """Standard errors, of the scores that have one."""
    answers: list[str] = dataclasses.field(default_factory=list)
    """To the sample prompts."""


def evaluate(run: RunConfig, model: pathlib.Path | None = None) -> tuple[Side, Side]:
    """Return what the model (by default the promoted one) and its base reach, task by task."""
    folder = model or find_promoted(run)
    rows = read_holdout(run) if run.evaluation.holdout else None
    samples = _choose_samples(run) if rows is not None else []
    tuned = _score(run, folder, rows, samples)
    base = _score(run, modeling.find_base_model(run), rows, samples) if run.evaluation.baseline else Side()
    if samples:
        digest = read_digest(folder)
        write_samples(Workspace(pathlib.Path(run.workspace)).samples, digest, samples, tuned.answers, base.answers)
    return tuned, base


def read_digest(folder: pathlib.Path) -> str:
    """Return the digest of a promoted model; empty for a folder that is none."""
    return str(promoted.read_manifest(folder)["digest"]) if (folder / promoted.MANIFEST).exists() else ""


def find_promoted(run: RunConfig) -> pathlib.Path:
    """Return the folder of the promoted model: by digest, or the only one there is. Raises TrainerError."""
    workspace = Workspace(pathlib.Path(run.workspace))
    folder = workspace.promoted_model(run.promotion.digest) if run.promotion.digest else None
    if folder is None:
        found = sorted(path.parent for path in workspace.output.glob(f"*/{promoted.MANIFEST}"))
        if len(found) != 1:
            raise TrainerError(
                Reason.MODEL_NOT_FOUND,
                ExitCode.NO_INPUT,
                f"{workspace.output} has {len(found)} promoted models and no digest was given",
                "Run `finetune-trainer promote` first, or add --set promotion.digest=DIGEST.",
            )
        folder = found[0]
    promoted.read_manifest(folder)
    return folder


def read_holdout(run: RunConfig) -> tokens.TokenizedRows:
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


def _choose_samples(run: RunConfig) -> list[Sample]:
    return choose_samples(tokens.read_conversations(find_dataset(run) / "holdout.jsonl"), run.dataset.seed)


def _score(run: RunConfig, folder: pathlib.Path, rows: tokens.TokenizedRows | None, samples: Sequence[Sample]) -> Side:
    import torch

    # Both models in 16 bits, as they are served: a difference in precision would pass for one in quality.
    dtype = "float16" if run.training.precision == "fp16" else "bfloat16"
    tokenizer = modeling.load_tokenizer(folder, run.trust_remote_code)
    model: Any = modeling.load_model(folder, dtype, run.trust_remote_code)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    scores: Scores = {}
    errors: Scores = {}
    answers: list[str] = []
    if rows is not None:
        scores["holdout"], errors["holdout"] = score_holdout(model, rows, modeling.choose_pad_token(tokenizer))
        scores["holdout"]["unigram_entropy"] = measure_entropy(rows)
        answers = answer_samples(model, tokenizer, samples, run.dataset.prompt_template)
        emit("held-out rows scored", model=folder.name[:12], rows=len(rows.rows), **scores["holdout"])
    if run.evaluation.tasks:
        root = pathlib.Path(run.workspace)
        local = any(is_local(name) for name in run.evaluation.tasks)
        emit("tasks begin", model=folder.name[:12], tasks=len(run.evaluation.tasks), local=local)
        found, spread = score_tasks(model, tokenizer, run.evaluation.tasks, run.evaluation.limit, root)
        scores, errors = scores | found, errors | spread
    return Side(scores, errors, answers)
