"""Whether the promoted model passes the gates of `spec.evaluation.gates`. Called by `lifecycle`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune_operator.api.v1alpha1 import Gate
from finetune_operator.conditions import Reason

LOWER_IS_BETTER = ("loss", "perplexity", "ppl", "bits_per_byte", "word_perplexity", "byte_perplexity", "entropy")
"""Metrics for which a higher value is a regression."""


def find_failed_gate(gates: Sequence[Gate], details: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return reason and message of the first gate that is not passed; None when all are. `details` are evaluate's."""
    for gate in gates:
        problem = _judge(gate, details.get("scores") or {}, details.get("baseline") or {})
        if problem is not None:
            return problem
    return None


def _judge(gate: Gate, scores: Mapping[str, Any], baseline: Mapping[str, Any]) -> tuple[str, str] | None:
    name = f"{gate.task}.{gate.metric}"
    score = _find(scores, gate)
    if score is None:
        known = ", ".join(f"{task}.{metric}" for task in sorted(scores) for metric in sorted(scores[task]))
        return (
            Reason.SCORE_MISSING,
            (f"evaluation.gates: there is no score {name}: name one of {known or 'no scores at all'}"),
        )
    if gate.min is not None:
        if score >= gate.min:
            return None
        return (
            Reason.EVALUATION_BELOW_GATE,
            (
                f"evaluation: {name} is {score:g}, below the gate's min {gate.min:g}: "
                "train on, or lower evaluation.gates[].min"
            ),
        )
    base = _find(baseline, gate)
    if base is None:
        return (
            Reason.SCORE_MISSING,
            (f"evaluation.gates: the base model has no score {name}: set evaluation.baseline: true"),
        )
    allowed = gate.max_regression or 0.0
    regression = (score - base) if is_lower_better(gate.metric) else (base - score)
    if regression <= allowed:
        return None
    return (
        Reason.EVALUATION_BELOW_GATE,
        (
            f"evaluation: {name} is {score:g} and the base model's {base:g}, worse by {regression:g} where the gate's "
            f"maxRegression allows {allowed:g}: train on, or raise evaluation.gates[].maxRegression"
        ),
    )


def is_lower_better(metric: str) -> bool:
    """Is a lower value of the metric the better one?"""
    name = metric.split(",", maxsplit=1)[0]
    return name in LOWER_IS_BETTER or name.endswith("_loss")


def _find(scores: Mapping[str, Any], gate: Gate) -> float | None:
    """Return a task's score; lm-eval writes a filter behind the name, as in `acc,none`."""
    metrics = scores.get(gate.task) or {}
    for name in (gate.metric, f"{gate.metric},none"):
        if name in metrics:
            return float(metrics[name])
    return None
