"""The PersistentVolumeClaim that every pod of the job mounts at /workspace."""

from __future__ import annotations

from typing import Any

from finetune_operator.plan import Plan

from .common import build_metadata


def build_workspace_claim(plan: Plan, size: str) -> dict[str, Any]:
    """Return the claim. It goes with the job only where the retention policy says so."""
    spec: dict[str, Any] = {
        "accessModes": [plan.workspace.access_mode],
        "resources": {"requests": {"storage": size}},
    }
    if plan.workspace.storage_class:
        spec["storageClassName"] = plan.workspace.storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": build_metadata(
            plan, plan.workspace.claim, "workspace", is_owned=plan.workspace.is_deleted_with_job
        ),
        "spec": spec,
    }
