"""The endpoint: making it, keeping it as it should be, giving it up. Called by `lifecycle`. Pure."""

from __future__ import annotations

import dataclasses

from .conditions import Reason, Type
from .manifests.inference import build_endpoint, serving_digest
from .naming import Names
from .observed import Observed
from .policies.blockers import find_pod_blocker
from .record import Terminal, to_text
from .steps import Finish, Object, Reference, Remove, SetFinalizer, Situation, Step, Wait, WriteRecord
from .view import View, block

DEPLOYING = Situation("Deploying", Reason.DEPLOYING, "the endpoint is starting", condition=Type.DEPLOYED)
CRASH_REASONS = frozenset({"CrashLoopBackOff"})


def list_endpoint(names: Names) -> tuple[Reference, ...]:
    """Return the objects of an endpoint."""
    return (
        Reference("apps/v1", "Deployment", names.endpoint),
        Reference("v1", "Service", names.endpoint),
        Reference("v1", "ConfigMap", names.serving_map),
    )


def is_holder(observed: Observed, uid: str) -> bool:
    """Does the job with this UID hold the endpoint?"""
    return observed.endpoint is not None and observed.endpoint.holder_uid == uid


def next_endpoint_step(view: View) -> Step | None:
    """Return the next step towards a ready endpoint; None when it is ready, or not wanted."""
    plan, observed = view.plan, view.observed
    if not plan.serving.is_enabled:
        return _give_up(view)
    endpoint = observed.endpoint
    if (endpoint is not None and not endpoint.is_ours) or observed.endpoint_service_is_foreign:
        message = (
            f"inference.endpoint: the name {plan.names.endpoint} is taken by a Deployment or Service in namespace "
            f"{plan.namespace} that is no endpoint: write another name, or remove that object"
        )
        return Wait(Situation("Deploying", Reason.ENDPOINT_TAKEN, message, is_stalled=True, condition=Type.DEPLOYED))
    if observed.has_finalizer == plan.serving.is_retained:
        return SetFinalizer(not plan.serving.is_retained, DEPLOYING)
    digest = serving_digest(plan, view.record)
    if endpoint is not None and is_holder(observed, plan.uid) and endpoint.digest == digest and endpoint.is_ready:
        return None
    return Wait(_describe(view), kept=list_kept(view))


def _describe(view: View) -> Situation:
    pods = view.observed.serving_pods
    blocker = find_pod_blocker(view.plan, pods, view.observed.warnings, view.now)
    if blocker is not None:
        return block(DEPLOYING, blocker)
    crashed = next((pod for pod in pods if pod.waiting_reason in CRASH_REASONS), None)
    if crashed is not None:
        message = f"pod {crashed.name} of the endpoint crashes again and again: see kubectl logs {crashed.name}"
        return dataclasses.replace(DEPLOYING, reason=Reason.ENDPOINT_UNHEALTHY, message=message, is_stalled=True)
    return DEPLOYING


def _give_up(view: View) -> Step | None:
    if is_holder(view.observed, view.plan.uid):
        return Remove(list_endpoint(view.plan.names), DEPLOYING)
    return SetFinalizer(False, DEPLOYING) if view.observed.has_finalizer else None


def list_kept(view: View) -> tuple[Object, ...]:
    """Return the endpoint's objects as they should be."""
    return build_endpoint(view.plan, view.record, view.observed.progress_ca)


def succeed(view: View) -> WriteRecord:
    """Return the step that ends the job well."""
    plan = view.plan
    served = plan.serving.is_enabled
    message = f"endpoint {plan.names.endpoint} answers" if served else "the model is promoted"
    reason = Reason.SERVING if served else Reason.SUCCEEDED
    terminal = Terminal("Succeeded", reason, message, to_text(view.now), digest=plan.digest)
    digest = serving_digest(plan, view.record) if served else ""
    record = dataclasses.replace(view.record, terminal=terminal, deployed_digest=digest)
    return WriteRecord(record, Situation("Succeeded", reason, message))


def keep_endpoint(view: View, finish: Finish) -> Step:
    """Return the step of a job that has succeeded: its endpoint stays as the spec says, unless another job took it."""
    plan, observed = view.plan, view.observed
    if not plan.serving.is_enabled:
        return _give_up(view) or finish
    if observed.endpoint is not None and not is_holder(observed, plan.uid):
        text = f"endpoint {plan.names.endpoint} was taken over by job {observed.endpoint.holder}"
        taken = dataclasses.replace(finish.situation, reason=Reason.TAKEN_OVER, message=text, condition=Type.DEPLOYED)
        if observed.has_finalizer:
            return SetFinalizer(False, taken)
        return dataclasses.replace(finish, situation=taken)
    step = next_endpoint_step(view)
    if step is None:
        return dataclasses.replace(finish, kept=list_kept(view))
    if isinstance(step, Wait):
        situation = dataclasses.replace(step.situation, state="Succeeded")
        return dataclasses.replace(finish, situation=situation, kept=step.kept)
    return step


def next_deletion_step(names: Names, uid: str, is_retained: bool, observed: Observed) -> Step:
    """Return the next step of a job that is being deleted: what has no owner reference goes now."""
    situation = Situation("Pending", Reason.DELETING, "the job is being deleted")
    if not observed.has_finalizer:
        return Wait(situation)
    if not is_retained and is_holder(observed, uid):
        return Remove(list_endpoint(names), situation)
    return SetFinalizer(False, situation)
