"""What an evaluation has to say in a run report: scores beside those of other models, and the gates on them. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune_contract.gates import judge
from finetune_trainer.evaluation.compare import compare
from finetune_trainer.evaluation.scores_file import build_details

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from finetune_contract.gates import GateConfig
    from finetune_trainer.evaluation.compare import Difference

_OF_THE_DATA = "unigram_entropy"
"""A metric that no model changes: there is nothing to compare."""


def list_scores(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one entry for each score of the promoted model, beside the base's and further models' that were scored.

    `found` is what scores.json holds.
    """
    tuned, errors = found.get("scores") or {}, found.get("errors") or {}
    base_errors = found.get("baselineErrors") or {}
    beside_base = _compare(tuned, errors, found.get("baseline") or {}, base_errors)
    models: Mapping[str, Any] = found.get("models") or {}
    beside = {name: _compare(tuned, errors, side["scores"], side["errors"]) for name, side in models.items()}
    entries = []
    for task, metrics in tuned.items():
        for metric, value in metrics.items():
            entry: dict[str, Any] = {"task": task, "metric": metric, "tuned": value}
            entry["tunedError"] = errors.get(task, {}).get(metric)
            one = beside_base.get((task, metric))
            if one is not None:
                entry |= {"base": one.base, "baseError": base_errors.get(task, {}).get(metric), **_describe(one)}
            entry["models"] = {
                name: {
                    "score": side[task, metric].base,
                    "error": models[name]["errors"].get(task, {}).get(metric),
                    **_describe(side[task, metric]),
                }
                for name, side in beside.items()
                if (task, metric) in side
            }
            entries.append(entry)
    return entries


def _compare(
    tuned: Mapping[str, Any], errors: Mapping[str, Any], other: Mapping[str, Any], other_errors: Mapping[str, Any]
) -> dict[tuple[str, str], Difference]:
    differences = compare(tuned, other, errors, other_errors)
    return {(one.task, one.metric): one for one in differences if one.metric != _OF_THE_DATA}


def _describe(one: Difference) -> dict[str, Any]:
    return {"difference": one.delta, "differenceError": one.error, "isLargerThanError": one.is_larger_than_error}


def list_gates(gates: Sequence[GateConfig], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each gate with what it says of the scores as they are handed to the operator, which decides."""
    handed = build_details(found)
    entries = []
    for gate in gates:
        judged = judge(gate, handed["scores"], handed["baseline"])
        entries.append(
            {
                "task": gate.task,
                "metric": gate.metric,
                gate.bound: gate.threshold,
                "score": judged.score,
                "baseline": judged.baseline,
                "margin": judged.margin,
                "verdict": judged.verdict,
            }
        )
    return entries
