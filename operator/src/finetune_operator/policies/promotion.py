"""Whether the promoted model passes the gates of `spec.evaluation.gates`. Called by `lifecycle` and `figures`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune_contract.gates import FAILED, MAX, MIN, PASSED, GateConfig, Judgement, judge
from finetune_operator.conditions import Reason

_ADVICE = {
    MIN: ", below the gate's min {threshold:g}: train on, or lower evaluation.gates[].min",
    MAX: ", above the gate's max {threshold:g}: train on, or raise evaluation.gates[].max",
}


def judge_gates(gates: Sequence[GateConfig], details: Mapping[str, Any]) -> tuple[Judgement, ...]:
    """Return what each gate says; `details` are evaluate's."""
    return tuple(judge(gate, details.get("scores") or {}, details.get("baseline") or {}) for gate in gates)


def find_failed_gate(gates: Sequence[GateConfig], details: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return reason and message of the first gate that is not passed; None when all are."""
    failed = next((found for found in judge_gates(gates, details) if found.verdict != PASSED), None)
    if failed is None:
        return None
    if failed.verdict == FAILED:
        return Reason.EVALUATION_BELOW_GATE, _explain_failed(failed)
    return Reason.SCORE_MISSING, _explain_missing(failed, details.get("scores") or {})


def _explain_failed(found: Judgement) -> str:
    gate = found.gate
    name = f"evaluation: {gate.task}.{gate.metric} is {found.score:g}"
    if gate.bound in _ADVICE:
        return name + _ADVICE[gate.bound].format(threshold=gate.threshold)
    return (
        f"{name} and the base model's {found.baseline:g}, worse by {found.regression:g} where the gate's maxRegression "
        f"allows {gate.threshold:g}: train on, or raise evaluation.gates[].maxRegression"
    )


def _explain_missing(found: Judgement, scores: Mapping[str, Any]) -> str:
    name = f"{found.gate.task}.{found.gate.metric}"
    if found.score is not None:
        return f"evaluation.gates: the base model has no score {name}: set evaluation.baseline: true"
    known = ", ".join(f"{task}.{metric}" for task in sorted(scores) for metric in sorted(scores[task]))
    return f"evaluation.gates: there is no score {name}: name one of {known or 'no scores at all'}"
