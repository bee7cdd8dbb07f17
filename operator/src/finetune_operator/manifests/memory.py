"""The two ConfigMaps that outlive every other child of a job: the frozen plan and the record."""

from __future__ import annotations

from typing import Any

from finetune_operator import record as records
from finetune_operator.plan import FROZEN_KEY, Plan, freeze

from .common import build_config_map


def build_plan_map(plan: Plan, version: str) -> dict[str, Any]:
    """Return the frozen plan; nobody may change it."""
    return {
        **build_config_map(plan, plan.names.plan_map, "plan", {FROZEN_KEY: freeze(plan, version)}),
        "immutable": True,
    }


def build_record_map(plan: Plan, record: records.Record) -> dict[str, Any]:
    """Return the record."""
    return build_config_map(plan, plan.names.record_map, "record", {records.KEY: record.to_json()})
