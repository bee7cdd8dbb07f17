"""What a version of an endpoint is: a promoted model, and the composition of adapters that is served over it.

As text, in `spec.inference.version`, `status.serving.version` and annotations, it is the model's digest, and for a
composition a dot and the digest of its profile. Which composition the job asks for is told by a digest of that request;
what came of it is in the record. Pure; used by manifests, lifecycle and status.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from finetune_contract.reports import Phase

from .naming import short_digest
from .plan import Plan
from .record import Record


def split_version(text: str) -> tuple[str, str]:
    """Return the digests of the model and of the composition's profile; the latter is empty without adapters."""
    model, _, profile = text.partition(".")
    return model, profile


def make_request(plan: Plan, record: Record) -> str:
    """Return the digest of what is to be composed; empty when nothing is."""
    if plan.serving.version or not plan.run.composition.adapters:
        return ""
    wanted = dataclasses.asdict(plan.run.composition)
    for adapter in wanted["adapters"]:
        # Other credentials for the same source are no other adapter.
        del adapter["secret_prefix"]
    return short_digest(json.dumps([promoted_digest(record), wanted], sort_keys=True), 8)


def find_composition(plan: Plan, record: Record) -> Mapping[str, Any] | None:
    """Return what came of the composition that is to be served; None when there is none, or none yet."""
    if plan.serving.version:
        return find_served(record, plan.serving.version) or None
    request = make_request(plan, record)
    return next((each for each in record.compositions if request and each["request"] == request), None)


def find_served(record: Record, version: str) -> Mapping[str, Any]:
    """Return what came of the composition of a version; empty when it has none, or another job's."""
    profile = split_version(version)[1]
    return next((each for each in record.compositions if profile and each.get("digest") == profile), {})


def promoted_digest(record: Record) -> str:
    """Return the digest of the job's promoted model; empty before there is one."""
    return str(record.details(Phase.PROMOTE).get("digest") or "")


def serving_version(plan: Plan, record: Record) -> str:
    """Return the version that the endpoint is to serve; without its adapters as long as they are not composed."""
    if plan.serving.version:
        return plan.serving.version
    composed = find_composition(plan, record)
    return f"{promoted_digest(record)}.{composed['digest']}" if composed else promoted_digest(record)


def is_composed(plan: Plan, record: Record) -> bool:
    """Is there nothing left to compose?"""
    return not make_request(plan, record) or find_composition(plan, record) is not None
