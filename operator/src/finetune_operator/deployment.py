"""The endpoint: bringing a version to it, keeping it as it should be, giving it up. Called by `lifecycle`. Pure.

A version takes the traffic when its pods are ready and it has answered the smoke prompt; until then, and for a while
after, the version before it stays as it was. What is live is what the endpoint's Service says.
"""

from __future__ import annotations

import dataclasses
import datetime
import json

from finetune_contract.smoke_prompt import EXIT_NO_ANSWER

from . import naming
from .composing import next_composition_step
from .conditions import Reason, Type
from .manifests.inference import (
    build_service,
    build_smoke_job,
    choose_start_seconds,
)
from .naming import Names
from .observed import Endpoint, Job, Observed, Pod
from .policies.blockers import find_pod_blocker
from .policies.serving import explain_crash, find_oversize
from .record import Terminal, to_text
from .steps import (
    Apply,
    Create,
    Finish,
    Object,
    Reference,
    Remove,
    Scale,
    SetFinalizer,
    Situation,
    Step,
    Wait,
    WriteRecord,
)
from .targets import (
    Target,
    choose_target,
    is_holder,
    is_on_one_node,
    list_companions,
    list_endpoint,
    list_objects,
    list_owned,
)
from .versions import serving_version
from .view import View, block

DEPLOYING = Situation("Deploying", Reason.DEPLOYING, "the endpoint is starting", condition=Type.DEPLOYED)
CRASH_REASONS = frozenset({"CrashLoopBackOff"})
PROVING_SECONDS = 30
"""How long a version must have had the traffic before the one before it goes."""
SILENT_SECONDS = 60
"""After how long a server that is not ready yet is quoted with what its probe said."""
KEPT_VERSIONS = 3
"""Versions without pods that an endpoint keeps to go back to."""
_EXPLAIN_ONE_NODE = (
    "; the workspace is ReadWriteOnce: every replica and every new version runs on the node that holds it: write fewer "
    "inference.replicas, set inference.loadFrom: S3, or use a workspace with accessMode: ReadWriteMany"
)


def next_endpoint_step(view: View) -> Step | None:
    """Return the next step towards a ready endpoint; None when it is ready, or not wanted."""
    plan, observed = view.plan, view.observed
    if not plan.serving.is_enabled:
        return _give_up(view)
    endpoint = observed.endpoint
    if endpoint is not None and not endpoint.is_ours:
        message = (
            f"inference.endpoint: the name {plan.names.endpoint} is taken by a Service in namespace {plan.namespace} "
            "that is no endpoint: write another name, or remove that object"
        )
        return Wait(Situation("Deploying", Reason.ENDPOINT_TAKEN, message, is_stalled=True, condition=Type.DEPLOYED))
    composing = next_composition_step(view)
    if composing is not None:
        return _keep_meanwhile(view, composing)
    target = choose_target(view)
    is_live = endpoint is not None and is_holder(observed, plan.uid) and endpoint.version == target.served.label
    # A retained endpoint outlives its job; what has not become one goes with it.
    if observed.has_finalizer == (plan.serving.is_retained and is_live):
        return SetFinalizer(not observed.has_finalizer, DEPLOYING)
    if endpoint is None:
        return Apply((build_service(plan, naming.NO_VERSION, ""),), DEPLOYING)
    step = _retire_surplus(view, target, endpoint)
    if step is not None:
        return step
    return _next_when_live(view, target, endpoint) if is_live else _next_before_live(view, target, endpoint)


def _keep_meanwhile(view: View, step: Step) -> Step:
    """Let the endpoint stay as it is while adapters are composed, or cannot be."""
    endpoint = view.observed.endpoint
    if not isinstance(step, Wait) or endpoint is None or not is_holder(view.observed, view.plan.uid):
        return step
    situation = dataclasses.replace(step.situation, message=step.situation.message + _tell_live(view))
    return dataclasses.replace(step, situation=situation, kept=(_keep_live(view, endpoint),))


def _next_before_live(view: View, target: Target, endpoint: Endpoint) -> Step:
    plan, found = view.plan, target.found
    if endpoint.refused == target.served.label and is_holder(view.observed, plan.uid):
        return Wait(_describe_refused(view, target))
    oversize = find_oversize(plan, view.record) if target.is_ours else ""
    if oversize:
        situation = dataclasses.replace(DEPLOYING, reason=Reason.MODEL_TOO_LARGE, is_stalled=True)
        return Wait(dataclasses.replace(situation, message=f"{oversize}{_tell_live(view)}"))
    if found is None:
        return Apply(target.served.objects, DEPLOYING)
    scaling = _next_scaling(view, target)
    if scaling is not None:
        return scaling
    if plan.serving.least_replicas == 0:
        return Apply((_build_live(view, target, endpoint, {}),), DEPLOYING)
    job = view.observed.job(plan.names.smoke_job(target.served.label))
    if job is None:
        asking = build_smoke_job(plan, target.served.label, found.image, choose_start_seconds(plan, view.record))
        return Create((*(() if target.is_ours else target.served.objects), asking), DEPLOYING)
    if job.is_deleting or not (job.is_failed or job.is_succeeded):
        return Wait(_describe(view, target), kept=target.served.objects)
    return _judge_smoke(view, target, endpoint, job)


def _next_scaling(view: View, target: Target) -> Step | None:
    """Give pods to a version whose Deployment is not applied with their number: another job's, or an autoscaled one."""
    serving, found = view.plan.serving, target.found
    if found is None or (target.is_ours and serving.autoscaling is None):
        return None
    is_wrong = found.replicas == 0 if serving.autoscaling else found.replicas != serving.replicas
    if is_wrong or found.job_uid != view.plan.uid:
        replicas = max(serving.least_replicas, found.replicas if serving.autoscaling else 0)
        return Scale(found.name, replicas, DEPLOYING, (view.plan.name, view.plan.uid))
    return None


def _judge_smoke(view: View, target: Target, endpoint: Endpoint, job: Job) -> Step:
    """Give the version the traffic when it has answered the smoke prompt and all its pods are ready."""
    found, least = target.found, view.plan.serving.least_replicas
    is_ready = found is not None and found.is_ready and found.replicas >= least
    exits = view.observed.exits_of(job)
    report = next((each.report for each in exits if each.report is not None), None)
    is_late = job.is_failed and is_ready and any(each.code == EXIT_NO_ANSWER for each in exits)
    if is_late or (job.is_succeeded and report is None):
        # The pods came up after all, or what the Job measured is lost: it is asked again.
        return Remove((Reference.to_job(job.name, job.uid),), DEPLOYING)
    if job.is_failed:
        return Wait(_describe_smoke_failure(view, target, job), kept=target.served.objects)
    if is_ready and report is not None:
        return Apply((_build_live(view, target, endpoint, dict(report.details)),), DEPLOYING)
    return Wait(_describe(view, target), kept=target.served.objects)


def _build_live(view: View, target: Target, endpoint: Endpoint, figures: dict[str, float]) -> Object:
    """Return the Service with the traffic on the target."""
    previous = "" if endpoint.version == naming.NO_VERSION else endpoint.version
    annotations = {
        naming.ANNOTATION_SMOKE: json.dumps(figures, sort_keys=True),
        naming.ANNOTATION_SWITCHED: to_text(view.now),
        naming.ANNOTATION_PREVIOUS: previous,
    }
    return build_service(view.plan, target.served.label, target.served.digest, annotations)


def _keep_live(view: View, endpoint: Endpoint) -> Object:
    """Return the Service as it is, against drift."""
    annotations = {
        naming.ANNOTATION_SMOKE: json.dumps(dict(endpoint.figures), sort_keys=True),
        naming.ANNOTATION_SWITCHED: to_text(endpoint.switched_at) if endpoint.switched_at else "",
        naming.ANNOTATION_PREVIOUS: endpoint.previous,
    }
    if endpoint.refused:
        annotations[naming.ANNOTATION_REFUSED] = endpoint.refused
    return build_service(view.plan, endpoint.version, endpoint.digest, annotations)


def _next_when_live(view: View, target: Target, endpoint: Endpoint) -> Step | None:
    plan, found = view.plan, target.found
    job = view.observed.job(plan.names.smoke_job(target.served.label))
    if job is not None and not job.is_deleting:
        return Remove((Reference.to_job(job.name, job.uid),), DEPLOYING)
    scaling = _next_scaling(view, target)
    if scaling is not None:
        return scaling
    if found is not None and found.is_ready:
        return None
    before = view.observed.version(endpoint.previous)
    has_died = any(pod.restarts for pod in _list_pods(view, target.served.label)) and not endpoint.ready_replicas
    if has_died and before is not None and before.replicas and before.is_ready:
        annotations = {naming.ANNOTATION_REFUSED: target.served.label}
        return Apply((build_service(plan, before.label, before.digest, annotations),), DEPLOYING)
    return Wait(_describe(view, target), kept=list_kept(view))


def _list_pods(view: View, label: str) -> tuple[Pod, ...]:
    return tuple(pod for pod in view.observed.serving_pods if pod.version == label)


def _retire_surplus(view: View, target: Target, endpoint: Endpoint) -> Step | None:
    """Take the pods of versions that are live no more, and forget the oldest of those without pods."""
    plan, observed = view.plan, view.observed
    holds = is_holder(observed, plan.uid)
    kept = {target.served.label, endpoint.version} - ({endpoint.refused} if holds else set())
    if holds and not _is_proven(view, endpoint):
        kept.add(endpoint.previous)
    for version in observed.versions:
        # Of other jobs' versions only the one that this job has followed: another may be on its way to follow this one.
        is_concerned = version.job_uid == plan.uid or (holds and version.label == endpoint.previous)
        if version.label in kept or version.is_deleting or not is_concerned:
            continue
        if version.label == naming.FIRST_VERSION:
            maps = Reference("v1", "ConfigMap", plan.names.first_serving_map)
            return Remove((Reference("apps/v1", "Deployment", version.name, version.uid), maps), DEPLOYING)
        if version.replicas:
            surplus = (
                *list_companions(version.name),
                Reference.to_job(plan.names.smoke_job(version.label)),
            )
            return Scale(version.name, 0, DEPLOYING, surplus=surplus)
    return _forget_oldest(view, kept) if holds else None


def _is_proven(view: View, endpoint: Endpoint) -> bool:
    """Has the live version answered for long enough that the one before it may go?"""
    return endpoint.is_ready and view.seconds_since(endpoint.switched_at) >= PROVING_SECONDS


def _forget_oldest(view: View, kept: set[str]) -> Step | None:
    retired = [each for each in view.observed.versions if not (each.replicas or each.label in kept or each.is_deleting)]
    retired.sort(key=lambda each: str(each.created_at or ""))
    references = [each for version in retired[:-KEPT_VERSIONS] for each in list_objects(version)]
    return Remove(tuple(references), DEPLOYING) if references else None


def _describe(view: View, target: Target) -> Situation:
    pods = _list_pods(view, target.served.label)
    blocker = find_pod_blocker(view.plan, pods, view.observed.warnings, view.now)
    if blocker is not None:
        blocked = block(DEPLOYING, blocker)
        way_out = _EXPLAIN_ONE_NODE if blocker.is_scheduling and is_on_one_node(view) else ""
        return dataclasses.replace(blocked, message=f"{blocked.message}{way_out}{_tell_live(view)}")
    crashed = next((pod for pod in pods if pod.waiting_reason in CRASH_REASONS), None)
    if crashed is not None:
        message = f"version {target.served.digest}: {explain_crash(crashed)}{_tell_live(view)}"
        return dataclasses.replace(DEPLOYING, reason=Reason.ENDPOINT_UNHEALTHY, message=message, is_stalled=True)
    silent = next((pod for pod in pods if view.seconds_since(pod.started_at) > SILENT_SECONDS), None)
    warning = view.observed.warnings.get(silent.uid, "") if silent is not None and not silent.has("Ready") else ""
    told = f": {warning}" if warning else ""
    return dataclasses.replace(DEPLOYING, message=f"{DEPLOYING.message}{told}{_tell_live(view)}")


def _tell_live(view: View) -> str:
    """Say who answers meanwhile."""
    endpoint = view.observed.endpoint
    if endpoint is None or not endpoint.ready_replicas:
        return ""
    return f"; {endpoint.digest} of job {endpoint.holder} still answers"


def _describe_smoke_failure(view: View, target: Target, job: Job) -> Situation:
    described = _describe(view, target)
    if described.is_stalled:
        return described
    exits = view.observed.exits_of(job)
    told = next((each.report.message for each in exits if each.report), job.failure_message)
    message = (
        f"version {target.served.digest} takes no traffic: {told or 'the smoke prompt was not answered'}"
        f"{_tell_live(view)}; see kubectl logs deploy/{target.served.name}; to ask again: kubectl delete job "
        f"{job.name}; to go back: write another inference.version"
    )
    return dataclasses.replace(DEPLOYING, reason=Reason.SMOKE_PROMPT_FAILED, message=message, is_stalled=True)


def _describe_refused(view: View, target: Target) -> Situation:
    message = (
        f"version {target.served.digest} died soon after it took the traffic{_tell_live(view)}: write another "
        "inference.version, or give its pods what they lack; to try it again as it is: "
        f"kubectl annotate service {view.plan.names.endpoint} {naming.ANNOTATION_REFUSED}-"
    )
    return dataclasses.replace(DEPLOYING, reason=Reason.VERSION_REFUSED, message=message, is_stalled=True)


def _give_up(view: View) -> Step | None:
    observed, plan = view.observed, view.plan
    if is_holder(observed, plan.uid) or list_owned(observed, plan.uid):
        return Remove(list_endpoint(plan.names, observed, plan.uid), DEPLOYING)
    return SetFinalizer(False, DEPLOYING) if observed.has_finalizer else None


def list_kept(view: View) -> tuple[Object, ...]:
    """Return the objects of a live endpoint as they should be."""
    endpoint = view.observed.endpoint
    target = choose_target(view)
    return (*target.served.objects, *(() if endpoint is None else (_keep_live(view, endpoint),)))


def succeed(view: View) -> WriteRecord:
    """Return the step that ends the job well."""
    plan = view.plan
    served = plan.serving.is_enabled
    message = f"endpoint {plan.names.endpoint} answers" if served else "the model is promoted"
    reason = Reason.SERVING if served else Reason.SUCCEEDED
    terminal = Terminal("Succeeded", reason, message, to_text(view.now), digest=plan.digest)
    digest = serving_version(plan, view.record) if served else ""
    record = dataclasses.replace(view.record, terminal=terminal, deployed_digest=digest)
    return WriteRecord(record, Situation("Succeeded", reason, message))


def keep_endpoint(view: View, finish: Finish) -> Step:
    """Return the step of a job that has succeeded: its endpoint stays as the spec says, unless another job took it."""
    plan, observed = view.plan, view.observed
    if not plan.serving.is_enabled:
        return _give_up(view) or finish
    endpoint = observed.endpoint
    if endpoint is not None and not is_holder(observed, plan.uid) and endpoint.version != naming.NO_VERSION:
        text = f"endpoint {plan.names.endpoint} was taken over by job {endpoint.holder}"
        taken = dataclasses.replace(finish.situation, reason=Reason.TAKEN_OVER, message=text, condition=Type.DEPLOYED)
        if observed.has_finalizer:
            return SetFinalizer(False, taken)
        return dataclasses.replace(finish, situation=taken)
    step = next_endpoint_step(view)
    if step is None:
        return dataclasses.replace(finish, kept=list_kept(view), until=_next_look(view, finish.until))
    if isinstance(step, Wait):
        situation = dataclasses.replace(step.situation, state="Succeeded")
        return dataclasses.replace(finish, situation=situation, kept=step.kept)
    return step


def _next_look(view: View, until: datetime.datetime | None) -> datetime.datetime | None:
    """Look again when the version before may go."""
    endpoint = view.observed.endpoint
    if endpoint is None or endpoint.switched_at is None or _is_proven(view, endpoint):
        return until
    due = endpoint.switched_at + datetime.timedelta(seconds=PROVING_SECONDS)
    return min(due, until) if until else due


def next_deletion_step(names: Names, uid: str, is_retained: bool, observed: Observed) -> Step:
    """Return the next step of a job that is being deleted: what has no owner reference goes now."""
    situation = Situation("Pending", Reason.DELETING, "the job is being deleted")
    if not observed.has_finalizer:
        return Wait(situation)
    if is_holder(observed, uid) and not is_retained:
        return Remove(list_endpoint(names, observed, uid), situation)
    # Of an endpoint that stays, the versions stay that may be gone back to; what was on its way to become one goes.
    own = [each for each in list_owned(observed, uid) if each.replicas or not is_holder(observed, uid)]
    if own:
        return Remove(tuple(each for version in own for each in list_objects(version)), situation)
    return SetFinalizer(False, situation)
