"""What an evaluation leaves in the reports folder: scores.json, scores.md, and the answers behind rates of refusals."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from typing import TYPE_CHECKING, Any

from finetune_trainer.evaluation.compare import compare, format_table
from finetune_trainer.evaluation.refusal_rates import digest_prompts
from finetune_trainer.reporting import write_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from finetune_contract.workspace import Workspace
    from finetune_trainer.evaluation.evaluate import Side

TUNED, BASE = "tuned", "base"
ANSWERS = "refusals.jsonl"
MAX_DETAILS = 2800
"""Characters of scores that a termination message has room for; all scores are in scores.json."""


def build_result(sides: Mapping[str, Side]) -> dict[str, Any]:
    """Return the scores and their standard errors: of the tuned model, of its base, and of others by name."""
    tuned, base = sides[TUNED], sides.get(BASE)
    return {
        "scores": tuned.scores,
        "baseline": base.scores if base else {},
        "errors": tuned.errors,
        "baselineErrors": base.errors if base else {},
        "models": {
            name: {"scores": side.scores, "errors": side.errors}
            for name, side in sides.items()
            if name not in (TUNED, BASE)
        },
    }


def build_details(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores that are handed to the operator, which judges the gates by them."""
    return shorten_scores({name: result.get(name) or {} for name in ("scores", "baseline")})


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


def describe_harness(sides: Mapping[str, Side]) -> dict[str, Any]:
    """Return what the scores depend on besides the models: every model is scored under the same."""
    tasks = sides[TUNED].tasks
    harness: dict[str, Any] = {
        "lm_eval": importlib.metadata.version("lm-eval"),
        "shots": tasks.shots,
        "taskVersions": tasks.versions,
    }
    return {"harness": harness | ({"refusalPrompts": digest_prompts()} if sides[TUNED].judged else {})}


def write_scores(workspace: Workspace, result: Mapping[str, Any]) -> None:
    """Write scores.json and, where there is something to compare with, scores.md; print the latter."""
    workspace.reports.mkdir(parents=True, exist_ok=True)
    write_json(workspace.reports / "scores.json", dict(result))
    others = {BASE: (result["baseline"], result["baselineErrors"])} if result["baseline"] else {}
    others |= {name: (side["scores"], side["errors"]) for name, side in result["models"].items()}
    tables = [
        format_table(compare(result["scores"], scores, result["errors"], errors), name)
        for name, (scores, errors) in others.items()
    ]
    if tables:
        text = "\n\n".join(tables) + "\n"
        (workspace.reports / "scores.md").write_text(text, encoding="utf-8")
        print(text, file=sys.stderr)


def write_answers(workspace: Workspace, sides: Mapping[str, Side]) -> None:
    """Write every model's answers to the prompts of the rates of refusals, for a person to read."""
    lines = [
        json.dumps({"model": name, **answer.to_facts()}, ensure_ascii=False)
        for name, side in sides.items()
        for answer in side.judged
    ]
    if lines:
        text = "".join(f"{line}\n" for line in lines)
        (workspace.reports / ANSWERS).write_text(text, encoding="utf-8", errors="replace")
