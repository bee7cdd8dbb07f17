"""The versions of an endpoint as Kubernetes objects: which one is to be live, what belongs to each, and whose they are.

Called by `deployment`. Pure.
"""

from __future__ import annotations

import dataclasses

from . import naming
from .manifests.inference import Served, build_companions, build_served
from .naming import Names
from .observed import Observed, Version
from .steps import Reference
from .view import View

COMPANIONS = (
    ("v1", "Service"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("policy/v1", "PodDisruptionBudget"),
    ("autoscaling/v2", "HorizontalPodAutoscaler"),
)
"""What goes with the pods of a version, under the same name."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The version that is to be live."""

    served: Served
    found: Version | None
    """Its Deployment, as it is."""
    is_ours: bool = True
    """It is built from the plan; else it is one that stayed from earlier, and is taken as it is."""


def choose_target(view: View) -> Target:
    """Return the version that is to be live: of an earlier digest the very pods that served it, if they are known."""
    plan, observed = view.plan, view.observed
    served = build_served(plan, view.record, is_on_one_node=is_on_one_node(view))
    found = observed.version(served.label)
    # Another job's model lies on another workspace: only the pods that it was served by can reach it.
    others = [each for each in observed.versions if each.digest == served.digest and _is_elsewhere(view, each)]
    if found is not None or not plan.serving.version or not others:
        return Target(served, found)
    newest = max(others, key=lambda each: str(each.created_at or ""))
    objects = build_companions(plan, newest.label, newest.digest)
    return Target(Served(newest.label, newest.name, newest.digest, objects), newest, is_ours=False)


def is_on_one_node(view: View) -> bool:
    """Must its servers share a node, because only one can mount the workspace?

    What the claim says counts; before there is one, what it is to be.
    """
    if view.plan.serving.is_from_copy:
        return False
    claim = view.observed.claim
    modes = claim.access_modes if claim is not None and claim.access_modes else (view.plan.workspace.access_mode,)
    return not {"ReadWriteMany", "ReadOnlyMany"} & set(modes)


def _is_elsewhere(view: View, version: Version) -> bool:
    workspace = view.plan.workspace
    # One that mounts none reads a copy in object storage: any job with that destination can build its like.
    is_mounted = version.label != naming.FIRST_VERSION and bool(version.workspace[0])
    return is_mounted and version.workspace != (workspace.claim, workspace.sub_path)


def is_holder(observed: Observed, uid: str) -> bool:
    """Does the job with this UID hold the endpoint?"""
    return observed.endpoint is not None and observed.endpoint.holder_uid == uid


def list_companions(name: str) -> tuple[Reference, ...]:
    """Return what goes with the pods of a version."""
    return tuple(Reference(api_version, kind, name) for api_version, kind in COMPANIONS)


def list_objects(version: Version) -> tuple[Reference, ...]:
    """Return everything of a version."""
    deployment = Reference("apps/v1", "Deployment", version.name, version.uid)
    return (deployment, *list_companions(version.name), Reference("v1", "ConfigMap", version.name))


def list_owned(observed: Observed, uid: str) -> tuple[Version, ...]:
    """Return the versions that a job made and that nobody needs without it: those that are not live."""
    live = observed.endpoint.version if observed.endpoint is not None else ""
    return tuple(
        each for each in observed.versions if each.job_uid == uid and each.label != live and not each.is_deleting
    )


def list_endpoint(names: Names, observed: Observed, uid: str) -> tuple[Reference, ...]:
    """Return what goes with a job: the endpoint, if it holds it, with every version; else its own versions alone."""
    holds = is_holder(observed, uid)
    versions = observed.versions if holds else list_owned(observed, uid)
    references = [each for version in versions for each in list_objects(version)]
    if holds:
        references += [
            Reference("v1", "ConfigMap", names.first_serving_map),
            Reference("v1", "Service", names.endpoint),
        ]
    return tuple(references)
