"""The figures of a status: progress, attempts, data, checkpoints, scores, the endpoint. Pure; used by `status`."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Any

from finetune_contract.gates import PASSED, Judgement
from finetune_contract.reports import Metric, Phase
from finetune_contract.workspace import Workspace

from . import naming
from . import record as records
from .api.v1alpha1 import FineTuneJobStatus
from .errors import redact
from .observed import Observed, earliest_start
from .plan import Plan
from .policies.promotion import judge_gates
from .versions import find_served, split_version
from .work import measure_work

Previous = FineTuneJobStatus


def build_progress(observed: Observed, previous: Previous) -> dict[str, Any] | None:
    progress = observed.progress
    old = previous.progress.model_dump(exclude={"summary", "eta"}) if previous.progress else {}
    work = {**{name: old.get(name) for name in _WORK}, **_build_work(observed)}
    if progress is None:
        return {**old, **work} if old else None
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
        **work,
    }


_WORK = ("productive_seconds", "allocated_seconds", "goodput", "steps_lost", "seconds_lost")


def _build_work(observed: Observed) -> dict[str, Any]:
    """Return what is known of goodput; what is not known stays as it was."""
    record, attempt = observed.record, observed.record.attempt
    if attempt is None:
        return {}
    lost = {"steps_lost": record.steps_lost, "seconds_lost": round(record.seconds_lost)}
    pods = observed.training_pods(attempt.number)
    work = measure_work(observed, records.to_time(attempt.start_time) or earliest_start(pods))
    if work is None:
        return lost
    return {
        "productive_seconds": round(work.productive_seconds),
        "allocated_seconds": round(work.allocated_seconds),
        "goodput": work.goodput,
        **lost,
    }


def _rounded(metrics: Mapping[str, float], name: Metric, digits: int) -> float | None:
    value = metrics.get(name)
    # JSON has no NaN: the API server would refuse the whole status.
    return round(value, digits) if value is not None and math.isfinite(value) else None


def build_attempt(observed: Observed, attempt: records.Attempt) -> dict[str, Any]:
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
        "steps_lost": attempt.steps_lost if attempt.end_time else None,
        "seconds_lost": round(attempt.seconds_lost) if attempt.end_time else None,
        "save_seconds": round(attempt.save_seconds, 3) or None,
        "reason": attempt.reason,
    }


def count_in_pod_restarts(observed: Observed) -> int:
    """Return how often the ranks of the attempt under way were restarted inside their pod; later the record counts."""
    attempt, progress = observed.record.attempt, observed.progress
    if attempt is None or attempt.end_time or progress is None or progress.attempt != attempt.number:
        return 0
    return int(progress.report.metrics.get(Metric.IN_POD_RESTARTS, 0))


def build_failure(record: records.Record) -> dict[str, Any] | None:
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


def build_resolved(plan: Plan, observed: Observed) -> dict[str, Any] | None:
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


def build_dataset(observed: Observed, previous: Previous) -> dict[str, Any] | None:
    """Take what the preparation reported; of the training what it reported at its end, else what it posted last."""
    rows = observed.record.details(Phase.PREPARE)
    if not rows:
        return None
    result: dict[str, Any] = {
        name: rows.get(name) for name in ("rows_read", "rows_kept", "rows_removed", "tokens", "report")
    }
    old = previous.dataset.model_dump() if previous.dataset else {}
    result |= {name: old.get(name) for name in _EXAMPLES}
    posted = observed.progress.report.metrics if observed.progress is not None else {}
    known: Mapping[str, Any] = {**posted, **observed.record.details(Phase.TRAIN)}
    numbers = {name: value for name in _EXAMPLES if (value := _read_number(known.get(name))) is not None}
    if Metric.PACKING in numbers:
        result["packing"] = {1: "Packed", 0: "Padded"}.get(int(numbers.pop(Metric.PACKING)), "Refused")
    if Metric.REAL_TOKEN_SHARE in numbers:
        result["real_token_share"] = min(1.0, max(0.0, numbers.pop(Metric.REAL_TOKEN_SHARE)))
    return result | {name: max(0, int(value)) for name, value in numbers.items()}


_EXAMPLES = tuple(
    each.value for each in (Metric.PACKING, Metric.REAL_TOKEN_SHARE, Metric.EXAMPLES_TRUNCATED, Metric.EXAMPLES_DROPPED)
)


def _read_number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def build_checkpoints(observed: Observed, previous: Previous) -> dict[str, Any] | None:
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
            "bytes": metrics.get(Metric.CHECKPOINT_BYTES),
            "mirrored": metrics.get(Metric.MIRRORED_CHECKPOINT),
        }
        result |= {name: int(value) for name, value in posted.items() if value is not None}
        result |= _build_times(metrics)
    attempt = observed.record.attempt
    if attempt is not None and attempt.resumed_from_step is not None:
        result["resumed_from"] = attempt.resumed_from_step
    if attempt is not None and attempt.last_step > (result.get("latest_complete") or 0):
        result["latest_complete"] = attempt.last_step
        # Known from a record that says no more than the step.
        for name in ("time", "bytes", "save_seconds", "stall_seconds"):
            result.pop(name, None)
    details = observed.record.details(Phase.TRAIN)
    if details:
        kept = details.get("checkpoints")
        reported = {
            "latest_complete": details.get("latest_complete"),
            "best": details.get("best"),
            "mirrored": details.get("mirrored"),
            "count": len(kept) if isinstance(kept, list) else None,
            "time": records.to_time(details.get("committed_at") or ""),
            "bytes": details.get("checkpoint_bytes") or None,
            "save_seconds": details.get("save_seconds") or None,
            "stall_seconds": details.get("stall_seconds") or None,
        }
        result |= {name: value for name, value in reported.items() if value is not None}
    return result or None


def _build_times(metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return when the newest checkpoint was committed and how long its save took, as far as that was posted."""
    times = {
        "save_seconds": _rounded(metrics, Metric.SAVE_SECONDS, 3),
        "stall_seconds": _rounded(metrics, Metric.CHECKPOINT_SECONDS, 3),
    }
    result: dict[str, Any] = {name: value for name, value in times.items() if value is not None}
    committed = metrics.get(Metric.CHECKPOINT_TIME)
    if committed is not None and 0 < committed < 2**40:
        result["time"] = datetime.datetime.fromtimestamp(committed, datetime.UTC)
    return result


def build_evaluation(plan: Plan, record: records.Record) -> dict[str, Any] | None:
    details = record.details(Phase.EVALUATE)
    if not details:
        return None
    judged = judge_gates(plan.run.evaluation.gates, details)
    gate = None
    if judged:
        gate = "Passed" if all(each.verdict == PASSED for each in judged) else "Failed"
    return {
        "scores": finite_scores(details.get("scores")),
        "baseline": finite_scores(details.get("baseline")),
        "gate": gate,
        "gates": [_build_gate(each) for each in judged],
    }


def _build_gate(judged: Judgement) -> dict[str, Any]:
    gate = judged.gate
    return {
        "task": gate.task,
        "metric": gate.metric,
        gate.bound: gate.threshold,
        "verdict": judged.verdict,
        "score": _finite(judged.score),
        "baseline": _finite(judged.baseline),
    }


def _finite(number: float | None) -> float | None:
    return number if number is not None and abs(number) < float("inf") else None


def finite_scores(scores: Any) -> dict[str, dict[str, float]]:
    return {
        str(task): {
            str(name): float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and abs(value) < float("inf")
        }
        for task, metrics in (scores or {}).items()
        if isinstance(metrics, Mapping)
    }


def build_promotion(record: records.Record) -> dict[str, Any] | None:
    details = record.details(Phase.PROMOTE)
    if not details:
        return None
    digest = str(details.get("digest") or "")
    return {
        "path": str(details.get("path") or Workspace().promoted_model(digest)),
        "digest": digest,
        # Evaluation writes it anew, with the scores.
        "report": record.details(Phase.EVALUATE).get("report") or details.get("report"),
        "destinations": [str(each) for each in record.details(Phase.PUBLISH).get("destinations") or ()],
        "weight_diff": record.details(Phase.PUBLISH).get("weight_diff"),
    }


def build_serving(plan: Plan, observed: Observed) -> dict[str, Any] | None:
    endpoint = observed.endpoint
    if not plan.serving.is_enabled or endpoint is None or endpoint.holder_uid != plan.uid:
        return None
    if endpoint.version == naming.NO_VERSION:
        return None
    return {
        "ready": endpoint.is_ready and endpoint.ready_replicas > 0,
        "url": f"http://{plan.names.endpoint}.{plan.namespace}.svc/v1",
        "model": plan.run.serving.model_name,
        "version": endpoint.digest or None,
        "digest": split_version(endpoint.digest)[0] or None,
        "profile": split_version(endpoint.digest)[1] or None,
        "adapters": [
            str(each.get("name")) for each in find_served(observed.record, endpoint.digest).get("adapters", ())
        ],
        "time_to_first_token_seconds": _read_number(endpoint.figures.get("time_to_first_token_seconds")),
        "tokens_per_second": _read_number(endpoint.figures.get("tokens_per_second")),
    }
