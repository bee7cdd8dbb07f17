"""`finetune-trainer evaluate`: score a model on held-out rows and lm-eval tasks, beside its base."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from typing import Any

from finetune_contract.reports import ExitCode, ExitReport, Phase, Reason
from finetune_trainer.commands import plain
from finetune_trainer.commands.common import apply_workspace_lock
from finetune_trainer.evaluation.compare import compare, format_table
from finetune_trainer.report.write import write_run_report
from finetune_trainer.reporting import write_exit_report, write_json

MAX_DETAILS = 2800
"""Characters of scores that a termination message has room for; all scores are in scores.json."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a run in a pod and of a run on plain files."""
    plain.add_arguments(parser)
    parser.add_argument("--promoted", metavar="DIR", help="model to score (default: the promoted one)")
    parser.add_argument(
        "--task", metavar="NAME", action="append", help="lm-eval task, open-llm-v1, or a YAML file; may be repeated"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="examples per task (default: all)")


def run(args: argparse.Namespace) -> int:
    """Evaluate, and report the scores."""
    assignments = [f"evaluation.tasks={json.dumps(args.task)}"] if args.task else []
    assignments += [f"evaluation.limit={args.limit}"] if args.limit is not None else []
    settings = plain.apply_overrides(plain.load_settings(args), assignments)
    workspace = apply_workspace_lock(settings)
    if any(not name.endswith((".yaml", ".yml")) for name in settings.evaluation.tasks):
        # Named tasks read their data from the hub or its cache.
        os.environ.setdefault("HF_HUB_OFFLINE", "0")
    plain.prepare_libraries()

    from finetune_trainer.evaluation.evaluate import evaluate, find_promoted, read_digest

    folder = pathlib.Path(args.promoted) if args.promoted else find_promoted(settings)
    tuned, base = evaluate(settings, folder)
    digest = read_digest(folder)
    result = {"scores": tuned.scores, "baseline": base.scores}
    errors = {"errors": tuned.errors, "baselineErrors": base.errors}
    workspace.reports.mkdir(parents=True, exist_ok=True)
    write_json(workspace.reports / "scores.json", result | errors | {"digest": digest})
    table = format_table(compare(tuned.scores, base.scores, tuned.errors, base.errors))
    if base.scores:
        (workspace.reports / "scores.md").write_text(table + "\n", encoding="utf-8")
        print(table, file=sys.stderr)
    details = shorten_scores(result) | write_run_report(settings, digest)
    report = ExitReport(Phase.EVALUATE, Reason.COMPLETED, _message(tuned.scores, base.scores), details=details)
    write_exit_report(report, workspace)
    print(json.dumps(result | errors, indent=1, sort_keys=True))
    return ExitCode.OK


def _message(scores: dict[str, Any], baseline: dict[str, Any]) -> str:
    if "holdout" not in scores:
        return f"scored {len(scores)} tasks"
    text = f"held-out loss {scores['holdout']['loss']:.4f}"
    return text + (f", base {baseline['holdout']['loss']:.4f}" if "holdout" in baseline else "")


def shorten_scores(result: dict[str, Any], limit: int = MAX_DETAILS) -> dict[str, Any]:
    """Return the scores with few digits, without the parts of groups where they would not fit."""
    rounded = {
        kind: {task: {name: float(f"{value:.6g}") for name, value in metrics.items()} for task, metrics in by.items()}
        for kind, by in result.items()
    }
    while len(json.dumps(rounded)) > limit:
        # MMLU alone has 57 parts: the longest names are the parts, the group's own score has the shortest.
        longest = max({task for by in rounded.values() for task in by}, key=len)
        for by in rounded.values():
            by.pop(longest, None)
    return rounded
