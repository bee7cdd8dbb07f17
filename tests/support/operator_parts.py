"""Settings, jobs, plans and observed worlds for tests of the operator's pure parts."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

from finetune_contract.reports import ExitReport, Phase
from finetune_operator.api.v1alpha1 import FineTuneJob, parse_job
from finetune_operator.observed import Claim, Exit, Job, Observed, Pod
from finetune_operator.plan import Plan, freeze, make_plan
from finetune_operator.record import Attempt, Record, to_text
from finetune_operator.settings import Settings
from tests.support.kubelet import DETAILS

UID = "job-uid"
NOW = datetime.datetime(2026, 1, 1, 12, 0, 0, tzinfo=datetime.UTC)


def seconds(number: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=number)


def make_settings(**changes: Any) -> Settings:
    """Return settings with the two images that are required."""
    images = {"trainer": "example.org/trainer:1", "inference": "example.org/inference:1"}
    return Settings.model_validate({"images": images, **changes})


def make_body(**spec: Any) -> dict[str, Any]:
    """Return a job as the API server has it."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {
            "name": "support-7b",
            "namespace": "team-a",
            "uid": UID,
            "generation": 1,
            "resourceVersion": "1",
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {
            "model": {"source": "hf://org/base", "revision": "main"},
            "dataset": {"source": "s3://bucket/rows.jsonl"},
            **spec,
        },
    }


def make_fine_tune_job(**spec: Any) -> FineTuneJob:
    return parse_job(make_body(**spec))


def make_test_plan(settings: Settings | None = None, **spec: Any) -> Plan:
    return make_plan(make_fine_tune_job(**spec), settings or make_settings())


def make_record(*phases: Phase, **fields: Any) -> Record:
    """Return a record in which these phases are done, with what they report in tests."""
    record = Record(uid=UID, start_time=to_text(NOW) if phases else "")
    for phase in phases:
        record = record.with_phase(phase, DETAILS[phase])
    return dataclasses.replace(record, **fields)


def make_observed(plan: Plan, record: Record | None = None, **fields: Any) -> Observed:
    """Return a world with this record, a frozen plan once the job has started, and a bound workspace after that."""
    record = record or Record(uid=UID)
    started = bool(record.start_time)
    base: dict[str, Any] = {
        "record": record,
        "record_version": "5",
        "frozen_plan": freeze(plan, "1") if started else "",
        "claim": Claim(plan.workspace.claim, uid="claim", phase="Bound", capacity_bytes=2**40) if started else None,
        "progress_ca": "PEM",
        "other_children": (
            ("v1", "Service", plan.names.training_service),
            ("policy/v1", "PodDisruptionBudget", plan.names.training_service),
        )
        if started
        else (),
    }
    return Observed(**{**base, **fields})


def make_batch_job(plan: Plan, phase: str, **fields: Any) -> Job:
    """Return the Job of a phase that runs once."""
    name = plan.names.phase_job(phase)
    base: dict[str, Any] = {"component": phase, "created_at": NOW, "source_digest": plan.source_digest}
    return Job(name, uid=f"{name}-uid", **{**base, **fields})


def make_training_job(plan: Plan, number: int = 1, **fields: Any) -> Job:
    """Return the Job of an attempt."""
    name = plan.names.training_job(number)
    return Job(name, **{"uid": f"{name}-uid", "component": "train", "attempt": number, "created_at": NOW, **fields})


def make_attempt(plan: Plan, number: int = 1, **fields: Any) -> Attempt:
    """Return what is remembered of an attempt whose pods run."""
    name = plan.names.training_job(number)
    return Attempt(
        **{
            "number": number,
            "job": name,
            "uid": f"{name}-uid",
            "digest": plan.digest,
            "start_time": to_text(NOW),
            **fields,
        }
    )


def make_pod(job: Job, index: int = 0, **fields: Any) -> Pod:
    """Return a running pod of a Job."""
    base: dict[str, Any] = {
        "uid": f"{job.name}-{index}-uid",
        "component": job.component,
        "attempt": job.attempt,
        "index": index,
        "node": f"node-{index}",
        "phase": "Running",
        "owner_uid": job.uid,
        "created_at": NOW,
        "started_at": NOW,
    }
    return Pod(f"{job.name}-{index}", **{**base, **fields})


def make_exit(
    code: int = 0, reason: str = "", message: str = "", report: ExitReport | None = None, after: float = 10
) -> Exit:
    """Return how a container ended, so many seconds after NOW."""
    return Exit(code, reason or ("Error" if code else "Completed"), message, report, NOW + seconds(after))


def make_report(phase: str, code: int, reason: str, message: str, **fields: Any) -> ExitReport:
    return ExitReport(phase=phase, reason=reason, message=message, exit_code=code, **fields)
