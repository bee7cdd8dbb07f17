"""Whether the promoted model passes the gates of `spec.evaluation.gates`. Called by `lifecycle` and `figures`. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_operator.api.v1alpha1 import Gate
from finetune_operator.conditions import Reason

LOWER_IS_BETTER = (
    *("loss", "perplexity", "ppl", "bits_per_byte", "word_perplexity", "byte_perplexity", "entropy"),
    *("refusal_rate", "hedging_rate", "over_refusal_rate", "over_hedging_rate"),
)
"""Metrics for which a higher value is a regression."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one gate says of the scores."""

    gate: Gate
    score: float | None
    """None: there is no such score."""
    baseline: float | None
    reason: str = ""
    """Why the gate is not passed; empty: it is."""
    message: str = ""

    @property
    def is_passed(self) -> bool:
        """Is the gate passed?"""
        return not self.reason


def judge_gates(gates: Sequence[Gate], details: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """Return each gate's verdict; `details` are evaluate's."""
    return tuple(_judge(gate, details.get("scores") or {}, details.get("baseline") or {}) for gate in gates)


def find_failed_gate(gates: Sequence[Gate], details: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return reason and message of the first gate that is not passed; None when all are."""
    failed = next((verdict for verdict in judge_gates(gates, details) if not verdict.is_passed), None)
    return None if failed is None else (failed.reason, failed.message)


def _judge(gate: Gate, scores: Mapping[str, Any], baseline: Mapping[str, Any]) -> Verdict:
    verdict = Verdict(gate, _find(scores, gate), _find(baseline, gate))
    name = f"{gate.task}.{gate.metric}"
    if verdict.score is None:
        known = ", ".join(f"{task}.{metric}" for task in sorted(scores) for metric in sorted(scores[task]))
        message = f"evaluation.gates: there is no score {name}: name one of {known or 'no scores at all'}"
        return dataclasses.replace(verdict, reason=Reason.SCORE_MISSING, message=message)
    if gate.max_regression is None:
        problem = _find_bound_missed(gate, verdict.score)
    elif verdict.baseline is None:
        message = f"evaluation.gates: the base model has no score {name}: set evaluation.baseline: true"
        return dataclasses.replace(verdict, reason=Reason.SCORE_MISSING, message=message)
    else:
        problem = _find_regression(gate, verdict.score, verdict.baseline, gate.max_regression)
    if not problem:
        return verdict
    message = f"evaluation: {name} is {verdict.score:g}{problem}"
    return dataclasses.replace(verdict, reason=Reason.EVALUATION_BELOW_GATE, message=message)


def _find_bound_missed(gate: Gate, score: float) -> str:
    # Written so that a score that is no number passes neither.
    if gate.min is not None and not score >= gate.min:
        return f", below the gate's min {gate.min:g}: train on, or lower evaluation.gates[].min"
    if gate.max is not None and not score <= gate.max:
        return f", above the gate's max {gate.max:g}: train on, or raise evaluation.gates[].max"
    return ""


def _find_regression(gate: Gate, score: float, base: float, allowed: float) -> str:
    regression = (score - base) if is_lower_better(gate.metric) else (base - score)
    if regression <= allowed:
        return ""
    return (
        f" and the base model's {base:g}, worse by {regression:g} where the gate's maxRegression allows {allowed:g}: "
        "train on, or raise evaluation.gates[].maxRegression"
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
