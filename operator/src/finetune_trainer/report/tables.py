"""The tables of scores and of gates as texts, for the run report's page and for the model card. Pure."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from finetune_contract.gates import FAILED, MAX, MAX_REGRESSION, MIN, PASSED, SCORE_MISSING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_IS_LARGER = {None: "no error known", True: "yes", False: "no"}
_VERDICTS = {PASSED: "✓ passed", FAILED: "✗ failed", SCORE_MISSING: "not judged"}
_NO_SCORE = "no score"
ABOUT_SCORES = (
    "± is one standard error. A difference is larger than its error where chance alone makes one of its size less than "
    "5 times in 100."
)
ABOUT_MODELS = (
    "Further models have a column each; * marks a score that the tuned model's differs from by more than that."
)
ABOUT_GATES = (
    "The margin is how much worse a score might be and still pass; below 0, the gate is missed by that. As of {time}, "
    "with the thresholds that the job had when the pod that wrote this began: one that is edited later is judged anew, "
    "and the job's status.evaluation.gates has the verdicts of now."
)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of texts under names."""

    names: Sequence[str]
    lines: Sequence[Sequence[str]]
    numeric: Sequence[int]
    """Columns that stand to the right."""


def tabulate_scores(scores: Sequence[Mapping[str, Any]]) -> Table:
    """Return a row for each score: the promoted model's, the base's, and one column for each further model."""
    has_base = any("base" in one for one in scores)
    models = list(dict.fromkeys(name for one in scores for name in one["models"]))
    names = ["Task", "Metric", "Tuned", *(("Base", "Difference", "Larger than its error") if has_base else ())]
    first = len(names)
    lines = []
    for one in scores:
        line = [one["task"], one["metric"], _format_score(one["tuned"], one["tunedError"])]
        if "base" in one:
            difference = f"{one['difference']:+.4g}" + _format_error(one["differenceError"])
            line += [_format_score(one["base"], one["baseError"]), difference, _IS_LARGER[one["isLargerThanError"]]]
        line += [""] * (first - len(line))
        lines.append([*line, *(_mark_score(one["models"].get(name)) for name in models)])
    return Table([*names, *models], lines, (2, 3, 4, *range(first, first + len(models))))


def _mark_score(other: Mapping[str, Any] | None) -> str:
    if other is None:
        return ""
    return _format_score(other["score"], other["error"]) + (" *" if other["isLargerThanError"] else "")


def _format_score(value: float, error: float | None) -> str:
    return f"{value:.4g}" + _format_error(error)


def _format_error(error: float | None) -> str:
    return f" ± {error:.2g}" if error is not None else ""


def tabulate_gates(gates: Sequence[Mapping[str, Any]]) -> Table:
    """Return a row for each gate."""
    names = ("Task", "Metric", "Verdict", "Threshold", "Score", "Base", "Margin")
    lines = []
    for one in gates:
        bound = next(name for name in (MIN, MAX, MAX_REGRESSION) if name in one)
        base = _show(one["baseline"]) if bound == MAX_REGRESSION else ""
        margin = "" if one["margin"] is None else f"{one['margin']:+.4g}"
        threshold = f"{bound} {one[bound]:g}"
        verdict = _VERDICTS[one["verdict"]]
        lines.append((one["task"], one["metric"], verdict, threshold, _show(one["score"]), base, margin))
    return Table(names, lines, (4, 5, 6))


def _show(score: float | None) -> str:
    # As many digits as the gate is judged by: with fewer, one that is missed might seem to be met.
    return _NO_SCORE if score is None else f"{score:.6g}"
