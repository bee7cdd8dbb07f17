"""`finetune-trainer evaluate`: score a model on held-out rows and lm-eval tasks, beside its base."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

from finetune_contract.reports import ExitCode, ExitReport, Phase, Reason
from finetune_trainer.commands import plain
from finetune_trainer.commands.common import apply_workspace_lock
from finetune_trainer.errors import TrainerError
from finetune_trainer.evaluation import scores_file
from finetune_trainer.evaluation.harness import is_local
from finetune_trainer.evaluation.models import fetch_models
from finetune_trainer.evaluation.task_files import fetch_tasks
from finetune_trainer.report.write import write_run_report
from finetune_trainer.reporting import write_exit_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a run in a pod and of a run on plain files."""
    plain.add_arguments(parser)
    parser.add_argument("--promoted", metavar="DIR", help="model to score (default: the promoted one)")
    parser.add_argument(
        "--task", metavar="NAME", action="append", help="lm-eval task, open-llm-v1, or a YAML file; may be repeated"
    )
    parser.add_argument(
        "--refusals", action="store_true", help="score how often the models refuse what may be answered"
    )
    parser.add_argument(
        "--also", metavar="NAME=MODEL", action="append", default=[], help="score this model, too; may be repeated"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="examples per task (default: all)")


def run(args: argparse.Namespace) -> int:
    """Evaluate, and report the scores."""
    settings = plain.apply_overrides(plain.load_settings(args), _list_assignments(args))
    workspace = apply_workspace_lock(settings)
    tasks, models = settings.evaluation.tasks, settings.evaluation.models
    if any(not is_local(name) for name in tasks) or any(model.source.startswith("hf://") for model in models):
        # Named tasks read their data from the hub or its cache.
        os.environ.setdefault("HF_HUB_OFFLINE", "0")
    fetched = fetch_tasks(tasks, settings.evaluation.tasks_secret_prefix, workspace.root)
    settings = dataclasses.replace(settings, evaluation=dataclasses.replace(settings.evaluation, tasks=fetched))
    others = fetch_models(settings)
    plain.prepare_libraries()

    from finetune_trainer.evaluation.evaluate import evaluate, read_digest
    from finetune_trainer.promotion.promoted import find_promoted

    folder = pathlib.Path(args.promoted) if args.promoted else find_promoted(settings)
    sides = evaluate(settings, folder, others)
    digest = read_digest(folder)
    result = scores_file.build_result(sides)
    scores_file.write_scores(workspace, result | scores_file.describe_harness(sides) | {"digest": digest})
    scores_file.write_answers(workspace, sides)
    details = scores_file.build_details(result) | write_run_report(settings, digest)
    message = _message(result["scores"], result["baseline"])
    write_exit_report(ExitReport(Phase.EVALUATE, Reason.COMPLETED, message, details=details), workspace)
    print(json.dumps(result, indent=1, sort_keys=True))
    return ExitCode.OK


def _list_assignments(args: argparse.Namespace) -> list[str]:
    assignments = [f"evaluation.tasks={json.dumps(args.task)}"] if args.task else []
    assignments += [f"evaluation.limit={args.limit}"] if args.limit is not None else []
    assignments += ["evaluation.refusals=true"] if args.refusals else []
    if args.also:
        models = [_parse_model(text) for text in args.also]
        assignments.append(f"evaluation.models={json.dumps(models)}")
    return assignments


def _parse_model(text: str) -> dict[str, str]:
    name, _, source = text.partition("=")
    if not source or not re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", name) or name in ("tuned", "base"):
        hint = (
            "Write NAME=MODEL: a name of small letters, digits and '-', other than tuned and base, and a folder or URL."
        )
        raise TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, f"--also {text}: not a name and a model", hint)
    return {"name": name, "source": source}


def _message(scores: dict[str, Any], baseline: dict[str, Any]) -> str:
    if "holdout" not in scores:
        return f"scored {len(scores)} tasks"
    text = f"held-out loss {scores['holdout']['loss']:.4f}"
    return text + (f", base {baseline['holdout']['loss']:.4f}" if "holdout" in baseline else "")
