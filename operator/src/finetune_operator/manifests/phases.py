"""Jobs of the phases that run once: inspect, prepare, promote, evaluate, publish; and compose, once per request.

Kubernetes retries them by itself, with its own backoff, as long as the exit code says that another try may help.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from finetune_contract.reports import ExitCode, Phase
from finetune_operator import naming
from finetune_operator.plan import Plan
from finetune_operator.record import Record
from finetune_operator.sizing import choose_gpus_to_evaluate

from .common import Container, build_job, build_pod_spec
from .history import build_history
from .run_config import build_run_config, build_run_config_map

RETRIES = 5
"""Tries after the first, 10 s to 160 s apart, after a failure that may pass. Waiting for a service does not count."""
NOT_RETRIED = (
    ExitCode.USAGE,
    ExitCode.DATA,
    ExitCode.NO_INPUT,
    ExitCode.INTERNAL,
    ExitCode.STORAGE_FULL,
    ExitCode.NO_PERMISSION,
    ExitCode.CONFIG,
    ExitCode.OUT_OF_MEMORY,
    ExitCode.FENCED,
)
GRACE_SECONDS = 30
BYTES_PER_PARAMETER_PROMOTED = 4
"""Memory to put a model together from its checkpoint."""


def build_phase(
    plan: Plan, phase: Phase, record: Record, progress_ca: str, name: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the ConfigMap and the Job of a phase; `name` for one that runs more than once."""
    config_map = _build_settings(plan, phase, record, progress_ca, name)
    name = name or plan.names.phase_job(phase)
    pod_spec = build_pod_spec(plan, _container(plan, phase, record, config_map["metadata"]["name"]))
    pod_spec["terminationGracePeriodSeconds"] = GRACE_SECONDS
    job = build_job(plan, name, phase, _retry_spec(), pod_spec)
    if phase is Phase.INSPECT:
        job["metadata"]["annotations"] = {naming.ANNOTATION_SOURCES: plan.source_digest}
    return config_map, job


def _build_settings(plan: Plan, phase: Phase, record: Record, progress_ca: str, name: str) -> dict[str, Any]:
    """Return the ConfigMap of a phase, named by what it says unless it has a name: it is made once, and after a change
    of the spec there is another one. What is only told of the past has no part in its name.
    """
    run = build_run_config(plan, record)
    if not name:
        settings = build_run_config_map(plan, name, phase, run, progress_ca)["data"]
        digest = naming.short_digest(json.dumps(settings, sort_keys=True), 8)
        name = f"{plan.names.phase_job(phase)}-{digest}"
    if record.has_done(Phase.TRAIN):
        run = dataclasses.replace(run, history=build_history(plan, record))
    return build_run_config_map(plan, name, phase, run, progress_ca)


def _retry_spec() -> dict[str, Any]:
    final = {"containerName": naming.CONTAINER, "operator": "In", "values": sorted(int(code) for code in NOT_RETRIED)}
    return {
        "backoffLimit": RETRIES,
        "completions": 1,
        "parallelism": 1,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": final},
                # A storage that is away is waited for, at most ten minutes between two tries, however long it takes.
                {"action": "Ignore", "onExitCodes": {**final, "values": [int(ExitCode.UNAVAILABLE)]}},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
    }


def _container(plan: Plan, phase: Phase, record: Record, config_map: str) -> Container:
    requests = dict(plan.preparation_resources.get("requests", {}))
    limits = dict(plan.preparation_resources.get("limits", {}))
    parameters = int(record.details(Phase.INSPECT).get("model_parameters") or 0)
    gpus, shared = 0, ""
    if phase in (Phase.EVALUATE, Phase.COMPOSE):
        gpus = choose_gpus_to_evaluate(parameters, plan.resources.gpus)
        shared = plan.resources.shared_memory
        written = {"cpu": plan.resources.cpu, "memory": plan.resources.memory}
        requests |= {name: value for name, value in written.items() if value}
        limits = {"memory": plan.resources.memory} if plan.resources.memory else {}
    elif phase is Phase.PROMOTE:
        limits = {}
        if parameters:
            requests["memory"] = f"{max(1024, parameters * BYTES_PER_PARAMETER_PROMOTED >> 20)}Mi"
    reads_claim = any(source.source.startswith("pvc://") for source in (plan.run.model, *plan.run.dataset.sources))
    is_inspect = phase is Phase.INSPECT
    return Container(
        phase=phase,
        config_map=config_map,
        gpus=gpus,
        requests=requests,
        limits=limits,
        shared_memory=shared,
        has_workspace=not is_inspect or reads_claim,
        is_workspace_read_only=is_inspect,
    )
