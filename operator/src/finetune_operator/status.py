"""The whole status of a job, built anew on every pass from what exists.

Called by `reconcile`, which writes it once and only when it differs. The status before is used for nothing but the
times of transitions and for progress that a restarted operator has not heard of yet. Pure.
"""

from __future__ import annotations

import datetime

from finetune_contract.reports import Phase

from . import record as records
from .api.v1alpha1 import FineTuneJobStatus
from .conditions import Reason, Type, build_conditions
from .errors import redact
from .figures import (
    build_attempt,
    build_checkpoints,
    build_dataset,
    build_evaluation,
    build_failure,
    build_progress,
    build_promotion,
    build_resolved,
    build_serving,
    count_in_pod_restarts,
    finite_scores,
)
from .observed import Observed
from .plan import Plan
from .policies.exclusion import list_current
from .policies.promotion import find_failed_gate
from .steps import Finish, Situation, Step
from .versions import is_composed, serving_version

Wanted = dict[Type, tuple[str, str, str]]
"""Status, reason and message by type of condition."""
Previous = FineTuneJobStatus

RUNNING_STATES = frozenset({"Training"})


def build_status(plan: Plan, observed: Observed, step: Step, previous: Previous, now: datetime.datetime) -> Previous:
    """Return the whole status after a pass that ended in `step`."""
    record, situation = observed.record, step.situation
    wanted = _build_wanted(plan, observed, step)
    terminal = record.terminal
    return FineTuneJobStatus.model_validate(
        {
            "observed_generation": plan.generation,
            "state": situation.state,
            "conditions": build_conditions(wanted, previous.conditions, plan.generation, now),
            "start_time": records.to_time(record.start_time),
            "completion_time": records.to_time(terminal.time) if terminal else None,
            "progress": build_progress(observed, previous),
            "attempts": [build_attempt(observed, each) for each in record.attempts],
            "restarts": record.restarts + count_in_pod_restarts(observed),
            "restarts_count_towards_max": record.restarts_counted + count_in_pod_restarts(observed),
            "excluded_nodes": [
                {"name": each.node, "reason": each.reason, "until": records.to_time(each.until)}
                for each in list_current(record.excluded_nodes, now)
            ],
            "last_failure": build_failure(record),
            "resolved": build_resolved(plan, observed),
            "dataset": build_dataset(observed, previous),
            "checkpoints": build_checkpoints(observed, previous),
            "evaluation": build_evaluation(plan, record),
            "promotion": build_promotion(record),
            "serving": build_serving(plan, observed),
        }
    )


def build_invalid_status(
    message: str, reason: str, previous: Previous, generation: int, now: datetime.datetime
) -> Previous:
    """Return the status of a job that cannot be planned: what is known stays, and a human must act."""
    wanted: Wanted = {
        Type.READY: ("False", reason, message),
        Type.RECONCILING: ("False", reason, message),
        Type.STALLED: ("True", reason, message),
    }
    if reason != Reason.OBJECT_REFUSED:
        wanted[Type.VALIDATED] = ("False", reason, message)
    for each in previous.conditions:
        if Type(each.type) not in wanted:
            wanted[Type(each.type)] = (each.status, each.reason, each.message)
    wanted.setdefault(Type.SUCCEEDED, ("Unknown", Reason.NOT_STARTED, ""))
    wanted.setdefault(Type.FINISHED, ("False", Reason.NOT_STARTED, ""))
    kept = {name: getattr(previous, name) for name in FineTuneJobStatus.model_fields}
    return FineTuneJobStatus.model_validate(
        {
            **kept,
            "observed_generation": generation,
            "state": previous.state or "Pending",
            "conditions": build_conditions(wanted, previous.conditions, generation, now),
        }
    )


def _build_wanted(plan: Plan, observed: Observed, step: Step) -> Wanted:
    situation = step.situation
    reason, message = situation.reason, redact(situation.message)
    is_over = isinstance(step, Finish)
    wanted: Wanted = _summary(plan, observed, step)
    wanted[Type.VALIDATED] = ("True", Reason.ACCEPTED, "the job can work as it is written")
    wanted |= _storage(observed)
    wanted |= _results(plan, observed)
    wanted |= _pods(observed, situation)
    wanted[Type.SUSPENDED] = (
        ("True", Reason.SUSPENDED, message)
        if situation.state == "Suspended"
        else ("False", Reason.DISABLED if not plan.is_suspended else Reason.COMPLETED, "")
    )
    if situation.condition:
        kind = Type(situation.condition)
        if situation.is_stalled or kind is Type.SCHEDULED or wanted[kind][0] != "True":
            wanted[kind] = ("False", reason, message)
    terminal = observed.record.terminal
    if terminal is not None and terminal.result == "Failed" and is_over:
        wanted |= _failed_phase(terminal)
    return {kind: wanted[kind] for kind in Type}


def _summary(plan: Plan, observed: Observed, step: Step) -> Wanted:
    """Return the conditions that tools read: kstatus' three, and how the job ended."""
    situation, terminal = step.situation, observed.record.terminal
    reason, message = situation.reason, redact(situation.message)
    ended_well = terminal is not None and terminal.result == "Succeeded"
    is_ready = ended_well and (not plan.serving.is_enabled or _is_serving(plan, observed))
    is_stalled = situation.is_stalled and not is_ready
    is_waiting = situation.state == "Suspended"
    is_moving = not (is_ready or is_stalled or is_waiting or (ended_well and situation.condition == ""))
    if terminal is None:
        succeeded = _condition("Unknown", Reason.IN_PROGRESS, message)
        finished = _condition("False", Reason.IN_PROGRESS, message)
    else:
        succeeded = _condition(str(ended_well), terminal.reason, redact(terminal.message))
        finished = _condition("True", terminal.reason, redact(terminal.message))
    is_failed = terminal is not None and not ended_well
    not_ready = "False" if is_stalled or is_failed else "Unknown"
    return {
        Type.READY: ("True" if is_ready else not_ready, reason, message),
        Type.RECONCILING: (str(is_moving), reason, message if is_moving else ""),
        Type.STALLED: (str(is_stalled), reason, message if is_stalled else ""),
        Type.SUCCEEDED: succeeded,
        Type.FINISHED: finished,
    }


def _condition(status: str, reason: str, message: str) -> tuple[str, str, str]:
    return status, reason, message


def _is_serving(plan: Plan, observed: Observed) -> bool:
    endpoint = observed.endpoint
    if endpoint is None or endpoint.holder_uid != plan.uid or not endpoint.is_ready:
        return False
    return endpoint.digest == serving_version(plan, observed.record) and is_composed(plan, observed.record)


def _storage(observed: Observed) -> Wanted:
    claim = observed.claim
    if claim is None:
        return {Type.STORAGE_READY: ("Unknown", Reason.NOT_STARTED, "")}
    if claim.phase == "Bound":
        return {Type.STORAGE_READY: ("True", Reason.COMPLETED, f"PersistentVolumeClaim {claim.name} is bound")}
    message = f"PersistentVolumeClaim {claim.name} is bound when its first pod is placed"
    return {Type.STORAGE_READY: ("Unknown", Reason.CLAIM_PENDING, message)}


def _results(plan: Plan, observed: Observed) -> Wanted:
    record = observed.record

    def done(phase: Phase, message: str = "") -> tuple[str, str, str]:
        if record.has_done(phase):
            return "True", Reason.COMPLETED, message
        return "Unknown", Reason.NOT_STARTED, ""

    rows = record.details(Phase.PREPARE)
    data = f"{rows.get('rows_kept', 0)} of {rows.get('rows_read', 0)} rows kept"
    promoted = done(Phase.PROMOTE, str(record.details(Phase.PROMOTE).get("path") or ""))
    if plan.run.promotion.needs_publishing and record.has_done(Phase.PROMOTE) and not record.has_done(Phase.PUBLISH):
        promoted = ("Unknown", Reason.PUBLISHING, "the copies are not there yet")
    deployed = ("Unknown", Reason.NOT_STARTED, "")
    if not plan.serving.is_enabled:
        deployed = ("False", Reason.DISABLED, "inference.enabled is false")
    elif _is_serving(plan, observed):
        deployed = ("True", Reason.SERVING, f"endpoint {plan.names.endpoint} answers")
    return {
        Type.MODEL_READY: done(Phase.PREPARE, "the base model is on the workspace"),
        Type.DATASET_READY: done(Phase.PREPARE, data),
        Type.PROMOTED: promoted,
        Type.EVALUATED: done(Phase.EVALUATE, _describe_scores(record) + _describe_raised_gate(plan, record)),
        Type.DEPLOYED: deployed,
    }


def _describe_scores(record: records.Record) -> str:
    """Return the held-out loss beside the base model's, or how many tasks were scored."""
    details = record.details(Phase.EVALUATE)
    tuned, base = (finite_scores(details.get(name)).get("holdout", {}).get("loss") for name in ("scores", "baseline"))
    if tuned is None:
        return f"{len(finite_scores(details.get('scores')))} tasks are scored"
    return f"held-out loss {tuned:.4g}" + (f", the base model's {base:.4g}" if base is not None else "")


def _describe_raised_gate(plan: Plan, record: records.Record) -> str:
    """Say that a job that has ended well would not pass its gates as they are now."""
    failed = find_failed_gate(plan.run.evaluation.gates, record.details(Phase.EVALUATE))
    if failed is None or record.terminal is None or record.terminal.result != "Succeeded":
        return ""
    return (
        f"; a gate was raised since the model passed, which stays as it is: {failed[1]}; "
        "to take the model down: inference.enabled: false"
    )


def _pods(observed: Observed, situation: Situation) -> Wanted:
    record = observed.record
    if record.has_done(Phase.TRAIN):
        done = ("False", Reason.COMPLETED, "training has ended")
        return {Type.SCHEDULED: ("True", Reason.COMPLETED, ""), Type.TRAINING: done}
    attempt = record.attempt
    pods = observed.training_pods(attempt.number) if attempt else ()
    scheduled = ("Unknown", Reason.NOT_STARTED, "")
    if pods and attempt is not None and not attempt.end_time:
        nodes = ", ".join(sorted({pod.node for pod in pods if pod.node}))
        is_placed = all(pod.node for pod in pods)
        scheduled = ("True", Reason.RUNNING, nodes) if is_placed else ("Unknown", Reason.SCHEDULING, nodes)
    training = _condition("Unknown", Reason.NOT_STARTED, "")
    if attempt is not None:
        is_running = situation.state in RUNNING_STATES and situation.reason == Reason.RUNNING
        training = _condition(str(is_running), situation.reason, redact(situation.message))
    return {Type.SCHEDULED: scheduled, Type.TRAINING: training}


_PHASE_CONDITIONS = {
    Phase.INSPECT: Type.MODEL_READY,
    Phase.PREPARE: Type.DATASET_READY,
    Phase.TRAIN: Type.TRAINING,
    Phase.PROMOTE: Type.PROMOTED,
    Phase.EVALUATE: Type.EVALUATED,
    Phase.PUBLISH: Type.PROMOTED,
    Phase.COMPOSE: Type.DEPLOYED,
    Phase.SERVE: Type.DEPLOYED,
}


def _failed_phase(terminal: records.Terminal) -> Wanted:
    if not terminal.phase:
        return {}
    kind = _PHASE_CONDITIONS[Phase(terminal.phase)]
    if terminal.reason.startswith("Dataset"):
        kind = Type.DATASET_READY
    elif terminal.reason.startswith("Model"):
        kind = Type.MODEL_READY
    elif terminal.reason in (Reason.WORKSPACE_LOST, "StorageFull"):
        kind = Type.STORAGE_READY
    return {kind: ("False", terminal.reason, redact(terminal.message))}
