"""The run configuration of one pod: the plan's, with what earlier phases found out, as a mounted ConfigMap."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from finetune_contract.environment import CA_BUNDLE_PATH, PROGRESS_CA_PATH, RUN_CONFIG_PATH
from finetune_contract.reports import Phase
from finetune_contract.run_config import RunConfig, Source, TrainingConfig
from finetune_operator.conditions import Reason
from finetune_operator.errors import InvalidJobError
from finetune_operator.plan import Plan
from finetune_operator.record import Record
from finetune_operator.sizing import choose_accumulation, choose_zero_stage

from .common import build_config_map
from .stopping import count_allowed_in_pod_restarts


def build_run_config(plan: Plan, record: Record, attempt: int = 0) -> RunConfig:
    """Return the settings of a pod. Raises InvalidJobError when the batch of an attempt cannot stay what it was."""
    run, inspected = plan.run, record.details(Phase.INSPECT)
    revisions = list(inspected.get("dataset_revisions") or ())
    sources = tuple(
        _pin(source, revisions[index] if index < len(revisions) else "")
        for index, source in enumerate(run.dataset.sources)
    )
    host = plan.names.rendezvous_host(attempt) if attempt and run.topology.nodes > 1 else "127.0.0.1"
    return dataclasses.replace(
        run,
        model=_pin(run.model, str(inspected.get("model_revision") or "")),
        dataset=dataclasses.replace(run.dataset, sources=sources),
        training=_resolve_batch(plan, record),
        topology=dataclasses.replace(
            run.topology,
            rendezvous_host=host,
            in_pod_restarts=count_allowed_in_pod_restarts(plan, record) if attempt else 0,
        ),
        promotion=dataclasses.replace(run.promotion, digest=str(record.details(Phase.PROMOTE).get("digest") or "")),
    )


def _pin(source: Source, revision: str) -> Source:
    """Fix a hub repository at the commit that `inspect` saw; elsewhere a revision means what the user wrote."""
    if revision and source.source.startswith("hf://"):
        return dataclasses.replace(source, revision=revision)
    return source


def _resolve_batch(plan: Plan, record: Record) -> TrainingConfig:
    training = plan.run.training
    parameters = int(record.details(Phase.INSPECT).get("model_parameters") or 0)
    stage = choose_zero_stage(training, parameters, plan.processes)
    accumulation = training.gradient_accumulation_steps
    if record.global_batch:
        accumulation = _keep_global_batch(plan, record.global_batch)
    elif training.packing and not plan.is_accumulation_written:
        prepared = record.details(Phase.PREPARE)
        accumulation = choose_accumulation(
            training.per_device_batch_size,
            training.max_length,
            int(prepared.get("tokens") or 0),
            int(prepared.get("rows_kept") or prepared.get("rows_train") or 0),
            wanted=accumulation,
        )
    return dataclasses.replace(training, zero_stage=stage, gradient_accumulation_steps=accumulation)


def _keep_global_batch(plan: Plan, global_batch: int) -> int:
    """Return the accumulation with which another per-device batch or number of processes makes the same steps."""
    per_pass = plan.run.training.per_device_batch_size * plan.processes
    if global_batch % per_pass:
        raise InvalidJobError(_explain_batch(plan, global_batch), Reason.GLOBAL_BATCH_NOT_KEPT)
    accumulation = global_batch // per_pass
    written = plan.run.training.gradient_accumulation_steps
    if plan.is_accumulation_written and written != accumulation:
        raise InvalidJobError(
            f"training.gradientAccumulationSteps: {written} would change the {global_batch} sequences per step that "
            f"this job started with: write {accumulation}, or remove it",
            Reason.GLOBAL_BATCH_NOT_KEPT,
        )
    return accumulation


def _explain_batch(plan: Plan, global_batch: int) -> str:
    """Return why this number of processes cannot take the rows of a step, and the numbers that can."""
    batch, processes = plan.run.training.per_device_batch_size, plan.processes
    started = f"the {global_batch} sequences per step that this job started with"
    if global_batch % processes == 0:
        return (
            f"training.perDeviceBatchSize: {batch} on {processes} processes do not divide {started}: write one of "
            f"{_list_divisors(global_batch // processes)}"
        )
    return (
        f"resources: {processes} processes do not divide {started}: choose resources.nodes and resources.gpusPerNode "
        f"(or processesPerNode) so that their product is one of {_list_divisors(global_batch)}"
    )


def _list_divisors(number: int) -> str:
    return ", ".join(str(each) for each in range(1, number + 1) if number % each == 0)


def count_global_batch(plan: Plan, run: RunConfig) -> int:
    """Return the sequences per optimizer step over all processes."""
    return run.training.per_device_batch_size * run.training.gradient_accumulation_steps * plan.processes


def build_run_config_map(plan: Plan, name: str, component: str, run: RunConfig, progress_ca: str) -> dict[str, Any]:
    """Return the ConfigMap that a phase mounts at /etc/finetune."""
    data: Mapping[str, str] = {
        _file(RUN_CONFIG_PATH): run.to_json(),
        _file(PROGRESS_CA_PATH): progress_ca,
        **({_file(CA_BUNDLE_PATH): plan.ca_bundle} if plan.ca_bundle else {}),
    }
    return build_config_map(plan, name, component, data)


def _file(path: str) -> str:
    return path.rpartition("/")[2]
