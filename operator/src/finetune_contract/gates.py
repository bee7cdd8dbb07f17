"""Gates on scores: what a bound says of a score. The operator decides by it, the run report shows it. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

MIN, MAX, MAX_REGRESSION = "min", "max", "maxRegression"
PASSED, FAILED, SCORE_MISSING = "Passed", "Failed", "ScoreMissing"
LOWER_IS_BETTER = (
    *("loss", "perplexity", "ppl", "bits_per_byte", "word_perplexity", "byte_perplexity", "entropy"),
    *("refusal_rate", "hedging_rate", "over_refusal_rate", "over_hedging_rate"),
)
"""Metrics for which a higher value is a regression."""


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """A score that the model must reach."""

    task: str
    metric: str
    bound: str
    """min, max or maxRegression."""
    threshold: float


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What one gate says of the scores."""

    gate: GateConfig
    score: float | None
    """None: there is no such score."""
    baseline: float | None
    """The base model's."""

    @property
    def margin(self) -> float | None:
        """How much worse the score might be and still pass; below 0 it fails by that; None where a score is missing."""
        gate = self.gate
        if self.score is None:
            return None
        if gate.bound == MIN:
            return self.score - gate.threshold
        if gate.bound == MAX:
            return gate.threshold - self.score
        return None if self.regression is None else gate.threshold - self.regression

    @property
    def regression(self) -> float | None:
        """By how much the score is worse than the base model's; None where either is missing."""
        if self.score is None or self.baseline is None:
            return None
        difference = self.score - self.baseline
        return difference if is_lower_better(self.gate.metric) else -difference

    @property
    def verdict(self) -> str:
        """PASSED, FAILED or SCORE_MISSING; a score that is no number passes no gate."""
        if self.margin is None:
            return SCORE_MISSING
        return PASSED if self.margin >= 0 else FAILED


def judge(gate: GateConfig, scores: Mapping[str, Any], baseline: Mapping[str, Any]) -> Judgement:
    """Return what a gate says of the scores of a model and of its base: task, metric, value."""
    return Judgement(gate, _find(scores, gate), _find(baseline, gate))


def is_lower_better(metric: str) -> bool:
    """Is a lower value of the metric the better one?"""
    name = metric.split(",", maxsplit=1)[0]
    return name in LOWER_IS_BETTER or name.endswith("_loss")


def _find(scores: Mapping[str, Any], gate: GateConfig) -> float | None:
    """Return a task's score; lm-eval writes a filter behind the name, as in `acc,none`."""
    metrics = scores.get(gate.task) or {}
    for name in (gate.metric, f"{gate.metric},none"):
        if name in metrics:
            return float(metrics[name])
    return None
