"""After a failed attempt: start the next one, after how long, or give up. The promise of `spec.failurePolicy`.

Called by `lifecycle`. Pure.
"""

from __future__ import annotations

import dataclasses
import datetime

from finetune_operator.api.patterns import compile_pattern
from finetune_operator.api.v1alpha1 import FailureRule
from finetune_operator.conditions import Reason
from finetune_operator.plan import FailurePlan
from finetune_operator.record import Attempt, Record, to_time

from .failure import Diagnosis

FIRST_DELAY_SECONDS = 2.0
LONGEST_DELAY_SECONDS = 300.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What follows from a failed attempt."""

    is_counted: bool
    gives_up: bool
    reason: str
    """Why it gives up; empty otherwise."""
    message: str = ""
    excluded_node: str = ""


def judge_failure(diagnosis: Diagnosis, policy: FailurePlan, restarts_counted: int) -> Verdict:
    """Decide whether a failed attempt is followed by another. The job's own rules come first."""
    failure = diagnosis.failure
    rule = next((rule for rule in policy.rules if is_matching(rule, diagnosis)), None)
    if rule is not None and rule.action == "FailJob":
        return Verdict(False, True, Reason.FAILED_BY_RULE, f"failurePolicy rule {rule.name}: {failure.advice}")
    if rule is None and not diagnosis.is_retried:
        return Verdict(False, True, failure.reason, failure.advice)
    is_counted = _is_counted(rule, diagnosis)
    if is_counted and restarts_counted >= policy.max_restarts:
        message = (
            f"{restarts_counted} of {policy.max_restarts} restarts (failurePolicy.maxRestarts) are used up; "
            f"last failure {failure.reason}: {failure.advice}"
        )
        return Verdict(True, True, Reason.RESTARTS_EXHAUSTED, message)
    is_excluded = diagnosis.is_node_at_fault if rule is None else rule.action == "ExcludeNode"
    return Verdict(is_counted, False, "", excluded_node=failure.node if is_excluded else "")


def _is_counted(rule: FailureRule | None, diagnosis: Diagnosis) -> bool:
    """Does the restart use up one of failurePolicy.maxRestarts? Another node alone gives no more of them."""
    if rule is None or rule.action == "ExcludeNode":
        return diagnosis.is_counted
    return rule.action == "RestartJob"


def is_matching(rule: FailureRule, diagnosis: Diagnosis) -> bool:
    """Does the rule apply to the failure?"""
    if rule.on_exit_codes is not None:
        code = diagnosis.failure.exit_code
        return code != 0 and (code in rule.on_exit_codes.values) == (rule.on_exit_codes.operator == "In")
    if rule.on_pod_conditions:
        return any((each.type, each.status) in diagnosis.conditions for each in rule.on_pod_conditions)
    if rule.on_log_pattern is None:
        return False
    pattern = compile_pattern(rule.on_log_pattern)
    return any(pattern.matches(line) for line in diagnosis.lines)


def next_start(record: Record, attempt: Attempt) -> datetime.datetime:
    """Return when the attempt after this one may start: at once after progress, else twice as long each time."""
    ended = to_time(attempt.end_time)
    assert ended is not None, "only asked of attempts that have ended"
    return ended + datetime.timedelta(seconds=delay_seconds(record.failures_without_progress))


def delay_seconds(failures_without_progress: int) -> float:
    """Return how long to wait after so many consecutive failures that completed no new checkpoint."""
    if failures_without_progress <= 0:
        return 0.0
    return min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2.0 ** min(failures_without_progress - 1, 20))
