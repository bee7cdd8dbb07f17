"""What the operator remembers of a training, for the run report that the pods behind it write. Pure."""

from __future__ import annotations

from finetune_contract.run_config import AttemptFacts, RunHistory
from finetune_operator.plan import Plan
from finetune_operator.record import Attempt, Record


def build_history(plan: Plan, record: Record) -> RunHistory:
    """Return the attempts, and the sums over all of them."""
    return RunHistory(
        attempts=tuple(_describe(attempt) for attempt in record.attempts),
        restarts=record.restarts,
        restarts_by_reason=dict(record.restarts_by_reason),
        productive_seconds=record.productive_seconds,
        allocated_seconds=record.training_seconds,
        steps_lost=record.steps_lost,
        seconds_lost=record.seconds_lost,
        images=dict(plan.images),
    )


def _describe(attempt: Attempt) -> AttemptFacts:
    return AttemptFacts(
        number=attempt.number,
        nodes=attempt.nodes,
        start_time=attempt.start_time,
        end_time=attempt.end_time,
        reason=attempt.reason,
        resumed_from_step=attempt.resumed_from_step or 0,
        reached_step=attempt.reached_step,
        steps_lost=attempt.steps_lost,
        seconds_lost=attempt.seconds_lost,
        in_pod_restarts=attempt.in_pod_restarts,
    )
