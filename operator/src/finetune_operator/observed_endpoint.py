"""What exists of an endpoint: its Service and the Deployments of its versions, as `observed` has them.

Used by `cluster`. Pure: no calls, no decisions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from . import naming
from .observed import Endpoint, Version
from .record import to_time

Json = Mapping[str, Any]


def view_version(item: Json) -> Version:
    """Return what matters of an apps/v1 Deployment of an endpoint."""
    meta, spec, status = item["metadata"], item.get("spec", {}), item.get("status", {})
    labels, annotations = meta.get("labels") or {}, meta.get("annotations") or {}
    wanted = spec.get("replicas", 1)
    pod = (spec.get("template") or {}).get("spec") or {}
    container: Json = next(iter(pod.get("containers") or ()), {})
    return Version(
        label=labels.get(naming.LABEL_VERSION, naming.FIRST_VERSION),
        name=meta["name"],
        uid=meta.get("uid", ""),
        digest=annotations.get(naming.ANNOTATION_DIGEST, ""),
        job=labels.get(naming.LABEL_JOB, ""),
        job_uid=annotations.get(naming.ANNOTATION_JOB_UID, ""),
        image=container.get("image", ""),
        workspace=_view_workspace(pod, container),
        replicas=wanted,
        ready_replicas=status.get("readyReplicas", 0),
        is_ready=_is_ready(item, wanted),
        created_at=to_time(meta.get("creationTimestamp") or ""),
        is_deleting=bool(meta.get("deletionTimestamp")),
    )


def _is_ready(item: Json, wanted: int) -> bool:
    """Do all pods answer, or of an autoscaled version as many as there must be at the least?"""
    meta, status = item["metadata"], item.get("status", {})
    least = (meta.get("annotations") or {}).get(naming.ANNOTATION_LEAST)
    is_current = status.get("observedGeneration", 0) >= meta.get("generation", 0)
    updated, available = status.get("updatedReplicas", 0), status.get("availableReplicas", 0)
    if least is not None:
        return bool(is_current and min(updated, available) >= min(int(least), wanted))
    return bool(is_current and min(updated, available) >= wanted == status.get("replicas", 0))


def _view_workspace(pod: Json, container: Json) -> tuple[str, str]:
    def find(items: Sequence[Json] | None) -> Json:
        return next((each for each in items or () if each.get("name") == naming.WORKSPACE_VOLUME), {})

    claim = (find(pod.get("volumes")).get("persistentVolumeClaim") or {}).get("claimName", "")
    return claim, find(container.get("volumeMounts")).get("subPath", "")


def view_endpoint(item: Json, versions: Sequence[Version]) -> Endpoint:
    """Return what matters of an endpoint's v1 Service, and of the version that it selects."""
    meta, selector = item["metadata"], (item.get("spec") or {}).get("selector") or {}
    labels, annotations = meta.get("labels") or {}, meta.get("annotations") or {}
    label = selector.get(naming.LABEL_VERSION, naming.FIRST_VERSION)
    live = next((each for each in versions if each.label == label), Version(label))
    return Endpoint(
        is_ours=naming.LABEL_ENDPOINT in labels,
        holder=labels.get(naming.LABEL_JOB, ""),
        holder_uid=annotations.get(naming.ANNOTATION_JOB_UID, ""),
        digest=annotations.get(naming.ANNOTATION_DIGEST, ""),
        version=label,
        previous=annotations.get(naming.ANNOTATION_PREVIOUS, ""),
        refused=annotations.get(naming.ANNOTATION_REFUSED, ""),
        switched_at=to_time(annotations.get(naming.ANNOTATION_SWITCHED, "")),
        figures=_read_figures(annotations.get(naming.ANNOTATION_SMOKE, "")),
        is_ready=live.is_ready,
        ready_replicas=live.ready_replicas,
    )


def _read_figures(text: str) -> dict[str, float]:
    try:
        data = json.loads(text)
        return {str(name): float(value) for name, value in data.items() if isinstance(value, int | float)}
    except (ValueError, AttributeError):
        return {}
