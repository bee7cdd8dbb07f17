"""The whole status of a job, built anew on every pass from what exists; and the events that a change of it is worth.

Called by `reconcile`, which writes it once and only when it differs. The status before is used for nothing but the
times of transitions and for progress that a restarted operator has not heard of yet. Pure.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Any

from finetune_contract.reports import Metric, Phase
from finetune_contract.workspace import Workspace

from . import record as records
from .api.v1alpha1 import FineTuneJobStatus
from .conditions import Reason, Type, build_conditions
from .errors import redact
from .observed import Observed, earliest_start
from .plan import Plan
from .steps import Finish, Situation, Step

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
            "progress": _build_progress(observed, previous),
            "attempts": [_build_attempt(observed, each) for each in record.attempts],
            "restarts": record.restarts,
            "restarts_count_towards_max": record.restarts_counted,
            "excluded_nodes": [{"name": name, "reason": why} for name, why in record.excluded_nodes.items()],
            "last_failure": _build_failure(record),
            "resolved": _build_resolved(plan, observed),
            "dataset": _build_dataset(record),
            "checkpoints": _build_checkpoints(observed, previous),
            "evaluation": _build_evaluation(plan, record),
            "promotion": _build_promotion(record),
            "serving": _build_serving(plan, observed),
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
        Type.VALIDATED: ("False", reason, message),
    }
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
    return not plan.serving.version or endpoint.digest == plan.serving.version


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
    if plan.run.promotion.destinations and record.has_done(Phase.PROMOTE) and not record.has_done(Phase.PUBLISH):
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
        Type.EVALUATED: done(Phase.EVALUATE, _describe_scores(record)),
        Type.DEPLOYED: deployed,
    }


def _describe_scores(record: records.Record) -> str:
    """Return the held-out loss beside the base model's, or how many tasks were scored."""
    details = record.details(Phase.EVALUATE)
    tuned, base = (_finite(details.get(name)).get("holdout", {}).get("loss") for name in ("scores", "baseline"))
    if tuned is None:
        return f"{len(_finite(details.get('scores')))} tasks are scored"
    return f"held-out loss {tuned:.4g}" + (f", the base model's {base:.4g}" if base is not None else "")


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


def _build_progress(observed: Observed, previous: Previous) -> dict[str, Any] | None:
    progress = observed.progress
    if progress is None:
        return previous.progress.model_dump(exclude={"summary", "eta"}) if previous.progress else None
    metrics = progress.report.metrics
    is_done = observed.record.has_done(Phase.TRAIN)

    def whole(name: Metric) -> int | None:
        return int(metrics[name]) if name in metrics else None

    return {
        "percentage": 100 if is_done else progress.report.percentage,
        "step": whole(Metric.STEP),
        "total_steps": whole(Metric.TOTAL_STEPS),
        "epoch": _rounded(metrics, Metric.EPOCH, 2),
        "loss": _rounded(metrics, Metric.LOSS, 4),
        "tokens_per_second": _rounded(metrics, Metric.TOKENS_PER_SECOND, 1),
        "eta_seconds": 0 if is_done else progress.eta_seconds,
        "updated_at": progress.received_at,
    }


def _rounded(metrics: Mapping[str, float], name: Metric, digits: int) -> float | None:
    value = metrics.get(name)
    # JSON has no NaN: the API server would refuse the whole status.
    return round(value, digits) if value is not None and math.isfinite(value) else None


def _build_attempt(observed: Observed, attempt: records.Attempt) -> dict[str, Any]:
    pods = observed.training_pods(attempt.number)
    progress = observed.progress
    resumed = attempt.resumed_from_step
    if resumed is None and progress is not None and progress.attempt == attempt.number:
        found = progress.report.metrics.get(Metric.RESUMED_FROM)
        resumed = int(found) if found is not None else None
    nodes = attempt.nodes or tuple(dict.fromkeys(pod.node for pod in pods if pod.node))
    return {
        "number": attempt.number,
        "job": attempt.job,
        "nodes": list(nodes),
        "start_time": records.to_time(attempt.start_time) or earliest_start(pods),
        "end_time": records.to_time(attempt.end_time),
        "resumed_from_step": resumed,
        "reason": attempt.reason,
    }


def _build_failure(record: records.Record) -> dict[str, Any] | None:
    failure = record.last_failure
    if failure is None:
        return None
    return {
        "time": records.to_time(failure.time),
        "pod": failure.pod,
        "node": failure.node,
        "exit_code": failure.exit_code or None,
        "reason": failure.reason,
        "message": redact(failure.message),
        "hint": redact(failure.hint),
    }


def _build_resolved(plan: Plan, observed: Observed) -> dict[str, Any] | None:
    if not observed.frozen_plan:
        return None
    record = observed.record
    revision = record.details(Phase.PREPARE).get("model_revision") or record.details(Phase.INSPECT).get(
        "model_revision"
    )
    return {
        "model_revision": revision or None,
        "dataset_digest": record.details(Phase.PREPARE).get("dataset_digest"),
        "images": dict(plan.images),
        "plan_config_map": plan.names.plan_map,
    }


def _build_dataset(record: records.Record) -> dict[str, Any] | None:
    rows = record.details(Phase.PREPARE)
    if not rows:
        return None
    return {name: rows.get(name) for name in ("rows_read", "rows_kept", "rows_removed", "tokens", "report")}


def _build_checkpoints(observed: Observed, previous: Previous) -> dict[str, Any] | None:
    """Take what the trainer reported at its end, else what it posted last, else what was known before."""
    old = previous.checkpoints
    result: dict[str, Any] = old.model_dump() if old else {}
    if observed.progress is not None:
        metrics = observed.progress.report.metrics
        posted = {
            "latest_complete": metrics.get(Metric.LATEST_CHECKPOINT),
            "best": metrics.get(Metric.BEST_CHECKPOINT),
            "resumed_from": metrics.get(Metric.RESUMED_FROM),
            "count": metrics.get(Metric.NUM_CHECKPOINTS),
        }
        result |= {name: int(value) for name, value in posted.items() if value is not None}
    attempt = observed.record.attempt
    if attempt is not None and attempt.resumed_from_step is not None:
        result["resumed_from"] = attempt.resumed_from_step
    details = observed.record.details(Phase.TRAIN)
    if details:
        kept = details.get("checkpoints")
        reported = {
            "latest_complete": details.get("latest_complete"),
            "best": details.get("best"),
            "count": len(kept) if isinstance(kept, list) else None,
        }
        result |= {name: value for name, value in reported.items() if value is not None}
    return result or None


def _build_evaluation(plan: Plan, record: records.Record) -> dict[str, Any] | None:
    details = record.details(Phase.EVALUATE)
    if not details:
        return None
    terminal = record.terminal
    gate = None
    if plan.gates:
        is_failed = terminal is not None and terminal.reason in (Reason.EVALUATION_BELOW_GATE, Reason.SCORE_MISSING)
        gate = "Failed" if is_failed else "Passed"
    return {
        "scores": _finite(details.get("scores")),
        "baseline": _finite(details.get("baseline")),
        "gate": gate,
    }


def _finite(scores: Any) -> dict[str, dict[str, float]]:
    return {
        str(task): {
            str(name): float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and abs(value) < float("inf")
        }
        for task, metrics in (scores or {}).items()
        if isinstance(metrics, Mapping)
    }


def _build_promotion(record: records.Record) -> dict[str, Any] | None:
    details = record.details(Phase.PROMOTE)
    if not details:
        return None
    digest = str(details.get("digest") or "")
    return {
        "path": str(details.get("path") or Workspace().promoted_model(digest)),
        "digest": digest,
        "destinations": [str(each) for each in record.details(Phase.PUBLISH).get("destinations") or ()],
    }


def _build_serving(plan: Plan, observed: Observed) -> dict[str, Any] | None:
    endpoint = observed.endpoint
    if not plan.serving.is_enabled or endpoint is None or endpoint.holder_uid != plan.uid:
        return None
    return {
        "ready": endpoint.is_ready and endpoint.ready_replicas > 0,
        "url": f"http://{plan.names.endpoint}.{plan.namespace}.svc/v1",
        "model": plan.run.serving.model_name,
        "digest": endpoint.digest or None,
    }


def select_events(old: Previous, new: Previous) -> list[tuple[str, str, str]]:
    """Return the events (type, reason, message) that a change of status is worth: transitions only."""
    before = {each.type: each for each in old.conditions}
    events = []
    for each in new.conditions:
        known = before.get(each.type)
        if known is not None and (known.status, known.reason) == (each.status, each.reason):
            continue
        if each.type == Type.STALLED and each.status == "True":
            events.append(("Warning", each.reason, each.message))
        elif each.type in _ANNOUNCED and each.status == "True" and (known is None or known.status != "True"):
            events.append(("Normal", f"{each.type}", each.message or f"{each.type} holds"))
        elif each.type == Type.SCHEDULED and each.status == "False":
            events.append(("Warning", each.reason, each.message))
    events += _select_attempt_events(old, new)
    if new.state == "Suspended" and old.state != "Suspended":
        events.append(("Normal", "Suspended", "the job is suspended"))
    return events


_ANNOUNCED = frozenset(
    {
        *(Type.VALIDATED, Type.STORAGE_READY, Type.MODEL_READY, Type.DATASET_READY, Type.PROMOTED, Type.EVALUATED),
        *(Type.DEPLOYED, Type.SUCCEEDED),
    }
)


def _select_attempt_events(old: Previous, new: Previous) -> list[tuple[str, str, str]]:
    known = {each.number: each for each in old.attempts}
    events = []
    for attempt in new.attempts:
        before = known.get(attempt.number)
        if before is None:
            events.append(("Normal", "AttemptStarted", f"attempt {attempt.number} starts as Job {attempt.job}"))
        if attempt.end_time is not None and (before is None or before.end_time is None):
            failure = new.last_failure
            is_good = attempt.reason in (Reason.COMPLETED, Reason.SUSPENDED)
            text = f"attempt {attempt.number} ended: {attempt.reason}"
            if not is_good and failure is not None:
                text = f"{text}: {failure.message}"[:1000]
            events.append(("Normal" if is_good else "Warning", "AttemptEnded", text))
    return events
