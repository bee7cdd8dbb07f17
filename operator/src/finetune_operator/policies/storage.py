"""Whether the workspace holds what the job will write, before a GPU is taken: the storage preflight. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_operator.conditions import Reason
from finetune_operator.observed import Claim
from finetune_operator.plan import Plan
from finetune_operator.sizing import (
    Contents,
    choose_size,
    choose_zero_stage,
    find_lora_rank,
    needed_bytes,
    to_number,
    to_words,
)


def list_contents(plan: Plan, inspected: Mapping[str, Any]) -> Contents:
    """Return what will lie on the workspace, from the plan and what `inspect` read."""
    parameters = int(inspected.get("model_parameters") or 0)
    training, checkpoint = plan.run.training, plan.run.checkpoint
    return Contents(
        model_bytes=int(inspected.get("model_bytes") or 0),
        dataset_bytes=int(inspected.get("dataset_bytes") or 0),
        parameters=parameters,
        checkpoints_kept=checkpoint.keep_latest + checkpoint.keep_best,
        zero_stage=choose_zero_stage(training, parameters, plan.processes),
        lora_rank=find_lora_rank(training),
        has_weight_diff=plan.run.promotion.weight_diff,
        further_bytes=sum(int(inspected.get(name) or 0) for name in ("evaluated_bytes", "judge_bytes")),
    )


def resolve_size(plan: Plan, inspected: Mapping[str, Any]) -> str:
    """Return the size to request for the workspace."""
    return plan.workspace.size_text if plan.workspace.size_bytes else choose_size(list_contents(plan, inspected))


def find_storage_problem(plan: Plan, inspected: Mapping[str, Any], claim: Claim | None) -> tuple[str, str] | None:
    """Return reason and message of what is wrong with the workspace; None when it will do."""
    workspace = plan.workspace
    if workspace.is_existing:
        problem = _judge_existing(plan, claim)
        if problem is not None:
            return problem
        size = claim.capacity_bytes or claim.requested_bytes if claim else 0
    else:
        size = workspace.size_bytes
    contents = list_contents(plan, inspected)
    needed = needed_bytes(contents)
    if not size or size >= needed:
        return None
    field = "workspace.existingClaim" if workspace.is_existing else "workspace.size"
    kept = contents.checkpoints_kept
    outputs = "the promoted model and its weight diff" if contents.has_weight_diff else "the promoted model"
    return (
        Reason.WORKSPACE_TOO_SMALL,
        (
            f"{field}: {to_words(size)} is less than the {to_words(needed)} that model, data, {kept + 1} checkpoints "
            f"({kept} kept and one being written) and {outputs} need: ask for {choose_size(contents)}, or "
            "keep fewer checkpoints (checkpoint.retention.latest)"
        ),
    )


def _judge_existing(plan: Plan, claim: Claim | None) -> tuple[str, str] | None:
    name = plan.workspace.claim
    if claim is None:
        return (
            Reason.CLAIM_NOT_FOUND,
            (
                f"workspace.existingClaim: there is no PersistentVolumeClaim {name} in namespace {plan.namespace}: "
                "make it, or remove existingClaim to have one made"
            ),
        )
    if plan.run.topology.nodes > 1 and claim.access_modes and "ReadWriteMany" not in claim.access_modes:
        return (
            Reason.ACCESS_MODE_UNSUITABLE,
            (
                f"workspace.existingClaim: {name} is {', '.join(claim.access_modes)}, and {plan.run.topology.nodes} "
                "nodes need ReadWriteMany: use another claim, or resources.nodes: 1"
            ),
        )
    return None


def needs_growth(plan: Plan, claim: Claim | None) -> bool:
    """Does the job ask for more than its own claim requests?"""
    if claim is None or plan.workspace.is_existing or not plan.workspace.size_bytes:
        return False
    return int(to_number(plan.workspace.size_text)) > claim.requested_bytes
