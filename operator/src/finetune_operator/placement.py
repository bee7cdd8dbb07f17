"""Node pools that jobs may name by a preset, and how their labels join what a user writes.

Pure; used by `plan`. The labels and taints are those that the cloud providers set, with the conventions of their
documentation where they leave taints to the user.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

ZONE_KEY = "topology.kubernetes.io/zone"
HOST_KEY = "kubernetes.io/hostname"
INSTANCE_KEY = "node.kubernetes.io/instance-type"

A100_BYTES = 80_000_000_000
Requirement = Mapping[str, Any]
"""One entry of matchExpressions."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """How a pool's nodes are recognised, and the taints to tolerate there."""

    requirements: tuple[Requirement, ...]
    tolerations: tuple[Mapping[str, Any], ...]
    notice_seconds: int = 0
    """How long before it takes a node away the cloud says so; 0: it takes none."""
    gpu_memory_bytes: int = A100_BYTES
    """Memory of each GPU of the pool, of the largest where they differ."""


def _one_of(key: str, *values: str) -> Requirement:
    return {"key": key, "operator": "In", "values": list(values)}


_GPU_TAINT = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
_AKS_GPU_TAINT = {"key": "sku", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"}
_AKS_SPOT_KEY = "kubernetes.azure.com/scalesetpriority"
_AKS_SPOT_TAINT = {"key": _AKS_SPOT_KEY, "operator": "Equal", "value": "spot", "effect": "NoSchedule"}
_AKS_NODES = _one_of(
    INSTANCE_KEY,
    "Standard_NC24ads_A100_v4",
    "Standard_NC48ads_A100_v4",
    "Standard_NC96ads_A100_v4",
    "Standard_ND96asr_v4",
    "Standard_ND96amsr_A100_v4",
)

PRESETS: Mapping[str, Preset] = {
    "aks-a100": Preset(
        (
            _AKS_NODES,
            _one_of("kubernetes.azure.com/accelerator", "nvidia"),
            {"key": _AKS_SPOT_KEY, "operator": "NotIn", "values": ["spot"]},
        ),
        (_AKS_GPU_TAINT, _GPU_TAINT),
    ),
    "aks-a100-spot": Preset(
        (_AKS_NODES, _one_of("kubernetes.azure.com/accelerator", "nvidia"), _one_of(_AKS_SPOT_KEY, "spot")),
        (_AKS_GPU_TAINT, _AKS_SPOT_TAINT, _GPU_TAINT),
        notice_seconds=30,
    ),
    "gke-a100": Preset(
        (_one_of("cloud.google.com/gke-accelerator", "nvidia-a100-80gb", "nvidia-tesla-a100"),),
        (_GPU_TAINT,),
    ),
    "eks-a100": Preset(
        (_one_of(INSTANCE_KEY, "p4d.24xlarge", "p4de.24xlarge"),),
        (_GPU_TAINT,),
    ),
}
"""Presets by the name that a job writes."""


def require_nodes(affinity: Mapping[str, Any], requirements: Sequence[Requirement]) -> dict[str, Any]:
    """Return the affinity with the requirements added to every one of its node terms, which are alternatives."""
    result = copy.deepcopy(dict(affinity))
    if not requirements:
        return result
    node = result.setdefault("nodeAffinity", {})
    selector = node.setdefault("requiredDuringSchedulingIgnoredDuringExecution", {})
    terms = selector.get("nodeSelectorTerms") or [{}]
    selector["nodeSelectorTerms"] = [
        {**term, "matchExpressions": [*term.get("matchExpressions", ()), *(dict(each) for each in requirements)]}
        for term in terms
    ]
    return result


def require_zones(zones: Sequence[str]) -> tuple[Requirement, ...]:
    """Return the requirement to be in one of the zones; none when no zones are named."""
    return (_one_of(ZONE_KEY, *zones),) if zones else ()


def avoid_nodes(names: Sequence[str]) -> tuple[Requirement, ...]:
    """Return the requirement to be on none of the nodes."""
    return ({"key": HOST_KEY, "operator": "NotIn", "values": sorted(names)},) if names else ()


def spread_over_nodes(affinity: Mapping[str, Any], labels: Mapping[str, str], topology_key: str) -> dict[str, Any]:
    """Return the affinity with one pod of these labels per node, all within one value of the topology key."""
    result = copy.deepcopy(dict(affinity))
    kind = "requiredDuringSchedulingIgnoredDuringExecution"
    apart = result.setdefault("podAntiAffinity", {})
    apart[kind] = [*apart.get(kind, ()), {"labelSelector": {"matchLabels": dict(labels)}, "topologyKey": HOST_KEY}]
    if topology_key:
        near = result.setdefault("podAffinity", {})
        near[kind] = [
            *near.get(kind, ()),
            {"labelSelector": {"matchLabels": dict(labels)}, "topologyKey": topology_key},
        ]
    return result


def stay_together(affinity: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    """Return the affinity with all pods of these labels on one node; the first one may be on any."""
    result = copy.deepcopy(dict(affinity))
    kind = "requiredDuringSchedulingIgnoredDuringExecution"
    near = result.setdefault("podAffinity", {})
    near[kind] = [*near.get(kind, ()), {"labelSelector": {"matchLabels": dict(labels)}, "topologyKey": HOST_KEY}]
    return result
