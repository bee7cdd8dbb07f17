"""All Kubernetes I/O: reads a job and what exists of it, carries out steps, writes status, records and events.

Used by `reconcile` and, for tokens and the certificate, by the progress server. Objects stay the dictionaries
that the API server sends.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any, assert_never

from finetune_contract.reports import Phase

from . import naming, record
from .connection import APPLY_TYPE, MERGE_TYPE, Connection
from .errors import ClusterUnavailableError, ConflictError, RefusedError, redact
from .manifests.memory import build_record_map
from .observed import Claim, Job, Observed, Pod, view_claim, view_job, view_pod
from .observed_endpoint import view_endpoint, view_version
from .plan import FROZEN_KEY, Plan
from .record import Record, read_record
from .steps import Apply, Create, Finish, Object, Reference, Remove, Scale, SetFinalizer, Step, Wait, WriteRecord
from .tokens import review_claims

PLURALS = {
    "ConfigMap": "configmaps",
    "Service": "services",
    "PersistentVolumeClaim": "persistentvolumeclaims",
    "Job": "jobs",
    "Deployment": "deployments",
    "PodDisruptionBudget": "poddisruptionbudgets",
    "NetworkPolicy": "networkpolicies",
    "HorizontalPodAutoscaler": "horizontalpodautoscalers",
}
Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class JobKey:
    """The job that is looked at, and the names that its children have."""

    namespace: str
    name: str
    uid: str
    names: naming.Names


class Cluster:
    """The cluster as this operator uses it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    async def list_jobs(self, namespace: str = "") -> list[Json]:
        """Return all jobs of a namespace, or of the cluster."""
        where = f"/namespaces/{namespace}" if namespace else ""
        result = await self.connection.request(
            "GET", f"/apis/{naming.GROUP}/{naming.VERSION}{where}/{naming.PLURAL}", query={"resourceVersion": "0"}
        )
        return list((result or {}).get("items") or ())

    async def read_job(self, namespace: str, name: str) -> Json | None:
        """Return one job; None when it is gone."""
        return await self.connection.request("GET", _job_path(namespace, name))

    async def observe_job(self, key: JobKey, body: Mapping[str, Any]) -> Observed:
        """Return everything that exists of a job."""
        selector = {"labelSelector": f"{naming.LABEL_JOB}={key.name}"}
        # The order matters: what the record speaks of is looked for after it was read, and the pods of a Job after the
        # Job. The other way round, a child made in between would look like one that somebody deleted.
        maps = await self._list("v1", "configmaps", key.namespace, selector)
        (jobs, pods), services, budgets, claim = await asyncio.gather(
            self._list_jobs_then_pods(key.namespace, selector),
            self._list("v1", "services", key.namespace, selector),
            self._list("policy/v1", "poddisruptionbudgets", key.namespace, selector),
            self._read("v1", "persistentvolumeclaims", key.namespace, key.names.claim),
        )
        remembered = next((each for each in maps if each["metadata"]["name"] == key.names.record_map), None)
        frozen = next((each for each in maps if each["metadata"]["name"] == key.names.plan_map), None)
        all_pods = [view_pod(each) for each in pods]
        is_deleting = bool(body["metadata"].get("deletionTimestamp"))
        observed = Observed(
            # A job that goes needs no memory: one that cannot be read must not hold it back.
            record=Record() if is_deleting else _parse_record(remembered),
            record_version=remembered["metadata"]["resourceVersion"] if remembered else "",
            frozen_plan=(frozen.get("data") or {}).get(FROZEN_KEY, "") if frozen and _is_owned(frozen, key.uid) else "",
            jobs=tuple(view_job(each) for each in jobs if _is_owned(each, key.uid)),
            pods=tuple(pod for pod in all_pods if pod.component != Phase.SERVE),
            claim=view_claim(claim) if claim else None,
            config_maps=tuple(each["metadata"]["name"] for each in maps if _is_owned(each, key.uid)),
            other_children=(
                *(("v1", "Service", each["metadata"]["name"]) for each in services if _is_owned(each, key.uid)),
                *(
                    ("policy/v1", "PodDisruptionBudget", each["metadata"]["name"])
                    for each in budgets
                    if _is_owned(each, key.uid)
                ),
            ),
            is_deleting=is_deleting,
            has_finalizer=naming.FINALIZER in (body["metadata"].get("finalizers") or ()),
        )
        observed = await self._observe_endpoint(key, observed)
        return await self._observe_trouble(key, observed)

    async def _list_jobs_then_pods(self, namespace: str, query: Mapping[str, str]) -> tuple[list[Json], list[Json]]:
        jobs = await self._list("batch/v1", "jobs", namespace, query)
        return jobs, await self._list("v1", "pods", namespace, query)

    async def _observe_endpoint(self, key: JobKey, observed: Observed) -> Observed:
        if not (observed.record.has_done(Phase.TRAIN) or observed.has_finalizer):
            return observed
        selector = {"labelSelector": f"{naming.LABEL_ENDPOINT}={key.names.endpoint}"}
        # Deployments before their pods, for the same reason as Jobs; the Service, which says who is live, first.
        service = await self._read("v1", "services", key.namespace, key.names.endpoint)
        deployments = await self._list("apps/v1", "deployments", key.namespace, selector)
        pods = await self._list("v1", "pods", key.namespace, selector)
        versions = tuple(view_version(each) for each in deployments)
        return dataclasses.replace(
            observed,
            endpoint=view_endpoint(service, versions) if service else None,
            versions=versions,
            serving_pods=tuple(view_pod(each) for each in pods),
        )

    async def _observe_trouble(self, key: JobKey, observed: Observed) -> Observed:
        """Read the warnings of what does not move: only then are events worth a request."""
        claim = observed.claim
        uids = [pod.uid for pod in (*observed.pods, *observed.serving_pods) if _is_stuck(pod)]
        uids += [job.uid for job in observed.jobs if _has_no_pods(job, observed)]
        is_missing = False
        if claim is not None and claim.phase == "Pending":
            uids.append(claim.uid)
            is_missing = await self._is_class_missing(claim)
        warnings = await asyncio.gather(*(self._read_warning(key.namespace, uid) for uid in uids[:10]))
        found = {uid: text for uid, text in zip(uids, warnings, strict=False) if text}
        return dataclasses.replace(observed, warnings=found, storage_class_is_missing=is_missing)

    async def _is_class_missing(self, claim: Claim) -> bool:
        if not claim.storage_class:
            return False
        path = f"/apis/storage.k8s.io/v1/storageclasses/{claim.storage_class}"
        try:
            return await self.connection.request("GET", path) is None
        except RefusedError:
            # An operator limited to namespaces may not read them; the claim's own events then have to do.
            return False

    async def _read_warning(self, namespace: str, uid: str) -> str:
        selector = {"fieldSelector": f"involvedObject.uid={uid},type=Warning"}
        events = await self._list("v1", "events", namespace, selector)
        newest = max(events, key=lambda each: str(each.get("lastTimestamp") or each.get("eventTime") or ""), default={})
        return redact(str(newest.get("message") or ""))

    async def _list(self, api_version: str, plural: str, namespace: str, query: Mapping[str, str]) -> list[Json]:
        result = await self.connection.request(
            "GET", f"{_base(api_version)}/namespaces/{namespace}/{plural}", query=query
        )
        return list((result or {}).get("items") or ())

    async def _read(self, api_version: str, plural: str, namespace: str, name: str) -> Json | None:
        return await self.connection.request("GET", f"{_base(api_version)}/namespaces/{namespace}/{plural}/{name}")

    async def carry_out(self, step: Step, plan: Plan, body: Mapping[str, Any], version: str) -> None:
        """Do what a step says. `version` is the resourceVersion of the record that it was decided on."""
        match step:
            case Create(objects=objects):
                for each in objects:
                    await self._create(each)
            case Apply(objects=objects):
                await self._apply(objects)
            case Remove(references=references):
                await self.delete(plan.namespace, references)
            case Scale():
                await self._scale(plan.namespace, step)
            case WriteRecord(record=record):
                await self._write_record(plan, record, version)
            case SetFinalizer(is_wanted=is_wanted):
                await self.write_finalizer(body, is_wanted=is_wanted)
            case Wait(kept=kept) | Finish(kept=kept):
                await self._apply(kept)
            case _:
                assert_never(step)

    async def _create(self, item: Object) -> None:
        try:
            await self._must(self.connection.request("POST", _collection(item), dict(item), _manager()), item)
        except ConflictError:
            # It exists: made by a pass that was interrupted, or by another copy. It is what we want; leave it alone.
            return

    async def _apply(self, objects: Sequence[Object]) -> None:
        for each in objects:
            path = f"{_collection(each)}/{each['metadata']['name']}"
            query = {**_manager(), "force": "true"}
            await self._must(self.connection.request("PATCH", path, dict(each), query, APPLY_TYPE), each)

    async def _must(self, request: Any, item: Object) -> Json:
        """Await a request whose path exists, and name the object when the API server refuses it."""
        try:
            result: Json | None = await request
        except RefusedError as error:
            name = f"{item['kind']} {item['metadata']['name']}"
            raise RefusedError(error.status, f"the API server refused {name}: {error.message}") from error
        if result is None:
            raise ClusterUnavailableError(
                f"namespace {item['metadata']['namespace']} is gone, or {item['kind']} is unknown"
            )
        return result

    async def delete(self, namespace: str, references: Sequence[Reference]) -> None:
        """Delete objects with their dependents; of one with a UID only that very one."""
        for each in references:
            path = f"{_base(each.api_version)}/namespaces/{namespace}/{PLURALS[each.kind]}/{each.name}"
            options: Json = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
            if each.uid:
                options["preconditions"] = {"uid": each.uid}
            await self.connection.request("DELETE", path, options)

    async def _scale(self, namespace: str, step: Scale) -> None:
        await self.delete(namespace, step.surplus)
        metadata: Json = {}
        if step.job[0]:
            name, uid = step.job
            metadata = {"labels": {naming.LABEL_JOB: name}, "annotations": {naming.ANNOTATION_JOB_UID: uid}}
        patch = {"metadata": metadata, "spec": {"replicas": step.replicas}}
        path = f"/apis/apps/v1/namespaces/{namespace}/deployments/{step.name}"
        await self.connection.request("PATCH", path, patch, _manager(), MERGE_TYPE)

    async def _write_record(self, plan: Plan, new: Record, version: str) -> None:
        item = build_record_map(plan, new)
        collection = _collection(item)
        if not version:
            await self._must(self.connection.request("POST", collection, item, _manager()), item)
            return
        item["metadata"]["resourceVersion"] = version
        path = f"{collection}/{item['metadata']['name']}"
        if await self.connection.request("PUT", path, item, _manager()) is None:
            raise ConflictError(f"the record {item['metadata']['name']} is gone")

    async def write_finalizer(self, body: Mapping[str, Any], *, is_wanted: bool) -> None:
        """Put our finalizer on a job or take it away, unless the job was changed since it was read."""
        meta = body["metadata"]
        others = [each for each in meta.get("finalizers") or () if each != naming.FINALIZER]
        wanted = [*others, naming.FINALIZER] if is_wanted else others
        patch = {"metadata": {"resourceVersion": meta["resourceVersion"], "finalizers": wanted}}
        path = _job_path(meta["namespace"], meta["name"])
        await self.connection.request("PATCH", path, patch, _manager(), MERGE_TYPE)

    async def write_status(self, body: Mapping[str, Any], status: Json) -> None:
        """Replace the status of a job, unless the job was changed since it was read."""
        meta = body["metadata"]
        path = f"{_job_path(meta['namespace'], meta['name'])}/status"
        await self.connection.request("PUT", path, {**body, "status": status}, _manager())

    async def emit_event(self, body: Mapping[str, Any], kind: str, reason: str, message: str) -> None:
        """Write an event about a job. It is news, not state: when it cannot be written it is let go."""
        meta, now = body["metadata"], datetime.datetime.now(datetime.UTC)
        subject = {
            "apiVersion": f"{naming.GROUP}/{naming.VERSION}",
            "kind": naming.KIND,
            "namespace": meta["namespace"],
            "name": meta["name"],
            "uid": meta["uid"],
        }
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                "name": f"{meta['name']}.{naming.short_digest(f'{now.isoformat()}{reason}{message}', 16)}",
                "namespace": meta["namespace"],
            },
            "involvedObject": subject,
            "type": kind,
            "reason": reason,
            "message": redact(message)[:1000],
            "source": {"component": naming.FIELD_MANAGER},
            "reportingComponent": naming.FIELD_MANAGER,
            "firstTimestamp": record.to_text(now),
            "lastTimestamp": record.to_text(now),
            "count": 1,
        }
        try:
            await self.connection.request("POST", f"/api/v1/namespaces/{meta['namespace']}/events", event)
        except (RefusedError, ConflictError, ClusterUnavailableError):
            return

    async def read_secret(self, namespace: str, name: str) -> Json | None:
        """Return a Secret of the operator's own."""
        return await self._read("v1", "secrets", namespace, name)

    async def write_secret(self, secret: Json) -> Json:
        """Make a Secret of the operator's own, or replace the one that was read. Raises ConflictError."""
        meta = secret["metadata"]
        path = f"/api/v1/namespaces/{meta['namespace']}/secrets"
        if "resourceVersion" in meta:
            return await self._must(self.connection.request("PUT", f"{path}/{meta['name']}", secret), secret)
        return await self._must(self.connection.request("POST", path, secret), secret)

    async def review_token(self, token: str, audience: str) -> Json:
        """Ask the API server whose token it is; returns the status of the review."""
        review = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        try:
            result = await self.connection.request("POST", "/apis/authentication.k8s.io/v1/tokenreviews", review)
        except RefusedError:
            # An operator limited to namespaces may not ask; the keys that sign tokens are public to it.
            keys = await self.connection.request("GET", "/openid/v1/jwks")
            return review_claims(token, keys or {}, datetime.datetime.now(datetime.UTC).timestamp())
        return dict((result or {}).get("status") or {})

    async def read_pod(self, namespace: str, name: str) -> Json | None:
        """Return one pod; None when it is gone."""
        return await self._read("v1", "pods", namespace, name)


def _job_path(namespace: str, name: str) -> str:
    return f"/apis/{naming.GROUP}/{naming.VERSION}/namespaces/{namespace}/{naming.PLURAL}/{name}"


def _base(api_version: str) -> str:
    return f"/api/{api_version}" if "/" not in api_version else f"/apis/{api_version}"


def _collection(item: Object) -> str:
    return f"{_base(item['apiVersion'])}/namespaces/{item['metadata']['namespace']}/{PLURALS[item['kind']]}"


def _manager() -> dict[str, str]:
    return {"fieldManager": naming.FIELD_MANAGER}


def _is_owned(item: Mapping[str, Any], uid: str) -> bool:
    return any(each.get("uid") == uid for each in item["metadata"].get("ownerReferences") or ())


def _parse_record(item: Mapping[str, Any] | None) -> Record:
    if item is None:
        return Record()
    try:
        return read_record((item.get("data") or {}).get(record.KEY, ""))
    except (ValueError, TypeError, AttributeError) as error:
        name = item["metadata"]["name"]
        raise RefusedError(
            422, f"ConfigMap {name} cannot be read ({error}): bring its data back, or delete the job"
        ) from error


def _is_stuck(pod: Pod) -> bool:
    is_silent = pod.component == Phase.SERVE and pod.phase == "Running" and not pod.has("Ready")
    return is_silent or (pod.phase == "Pending" and bool(pod.node) and pod.exit is None)


def _has_no_pods(job: Job, observed: Observed) -> bool:
    return not (job.is_succeeded or job.is_failed or job.is_suspended) and not observed.pods_of(job)
