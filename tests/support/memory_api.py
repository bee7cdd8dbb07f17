"""An API server in memory, for tests that stop the operator at every single write: thousands of runs in seconds.

It keeps objects, answers the requests that `cluster.Cluster` sends, checks names, UIDs and resourceVersions as the real
one does, and plays the Job controller and the kubelet when told to. What it leaves out is tested on the real one.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

from finetune_operator.errors import ConflictError
from tests.support.kubelet import DETAILS

Json = dict[str, Any]
_PATH = re.compile(r"/(?:api/v1|apis/[^/]+/[^/]+)(?:/namespaces/([^/]+))?/([a-z]+)(?:/([^/]+))?(?:/(status))?$")
TIME = "2026-01-01T00:00:00Z"


class OperatorKilledError(Exception):
    """The operator was killed before or after a write."""


class MemoryApi:
    """Objects by (plural, name) in one namespace; stands in for `cluster.Connection`."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Json] = {}
        self.created: list[str] = []
        """Names of Jobs in the order in which they were made."""
        self.writes = 0
        self.kill_at: tuple[int, str] | None = None
        """Number of the write at which the operator is killed, `before` or `after` it."""
        self.on_request: Callable[[], Any] | None = None
        """Awaited before every request: lets another copy of the operator go first."""
        self._numbers = itertools.count(1)

    async def close(self) -> None:
        return None

    async def request(
        self, method: str, path: str, body: Any = None, query: Any = None, content_type: str = "application/json"
    ) -> Json | None:
        if self.on_request is not None:
            await self.on_request()
        found = _PATH.match(path)
        assert found is not None, path
        _, plural, name, subresource = found.groups()
        if method == "GET":
            return self._get(plural, name, query or {})
        if plural == "events":
            return {}
        self.writes += 1
        if self.kill_at == (self.writes, "before"):
            raise OperatorKilledError
        target = (plural, name, subresource)
        result = self._write(method, target, _copy(body), content_type)
        if self.kill_at == (self.writes, "after"):
            raise OperatorKilledError
        return result

    def _get(self, plural: str, name: str | None, query: Json) -> Json | None:
        if name:
            return _copy(self.objects.get((plural, name)))
        key, _, value = query.get("labelSelector", "").partition("=")
        items = [
            _copy(item)
            for (kind, _), item in self.objects.items()
            if kind == plural and (not key or item["metadata"].get("labels", {}).get(key) == value)
        ]
        return {"items": items}

    def _write(self, method: str, target: tuple[str, str | None, str | None], body: Json, kind: str) -> Json | None:
        plural, name, subresource = target
        if method == "POST":
            return self._post(plural, body)
        assert name is not None
        current = self.objects.get((plural, name))
        if method == "DELETE":
            return self._delete(plural, name, body)
        if method == "PATCH" and kind.startswith("application/apply"):
            return self._store(plural, name, {**(current or {}), **body})
        if current is None:
            return None
        if method == "PATCH":
            self._check_version(current, body)
            current["metadata"] |= {key: value for key, value in body["metadata"].items() if key != "resourceVersion"}
            current["spec"] = {**current["spec"], **body.get("spec", {})}
            return self._store(plural, name, current)
        self._check_version(current, body)
        if subresource == "status":
            return self._store(plural, name, {**current, "status": body["status"]})
        return self._store(plural, name, {**current, **body})

    def _check_version(self, current: Json, body: Json) -> None:
        wanted = body["metadata"].get("resourceVersion")
        if wanted is not None and wanted != current["metadata"]["resourceVersion"]:
            raise ConflictError("the object has been modified")

    def _post(self, plural: str, body: Json) -> Json:
        name = body["metadata"]["name"]
        if (plural, name) in self.objects:
            raise ConflictError(f"{plural} {name} already exists")
        if plural == "jobs":
            self.created.append(name)
        return self._store(plural, name, body)

    def _store(self, plural: str, name: str, item: Json) -> Json:
        old = self.objects.get((plural, name), {}).get("metadata", {})
        number = str(next(self._numbers))
        uid = old.get("uid") or f"uid-{number}"
        item["metadata"] = {**item["metadata"], "uid": uid, "resourceVersion": number}
        item["metadata"].setdefault("creationTimestamp", TIME)
        self.objects[plural, name] = item
        return _copy(item)

    def _delete(self, plural: str, name: str, body: Json) -> Json | None:
        item = self.objects.get((plural, name))
        if item is None:
            return None
        wanted = ((body or {}).get("preconditions") or {}).get("uid")
        if wanted and wanted != item["metadata"]["uid"]:
            raise ConflictError("another object of that name")
        del self.objects[plural, name]
        uid = item["metadata"]["uid"]
        for key in [key for key, each in self.objects.items() if _owner(each) == uid]:
            del self.objects[key]
        return {}

    def find(self, plural: str, name: str) -> Json:
        """Return one object as it is kept."""
        return self.objects[plural, name]

    def names(self, plural: str) -> list[str]:
        """Return the names of all objects of a kind."""
        return sorted(name for kind, name in self.objects if kind == plural)

    def play(self, failing: tuple[str, ...] = ()) -> None:
        """Let the Job controller and the kubelet do their part: every Job ends, every Deployment answers."""
        for (plural, name), item in list(self.objects.items()):
            if plural == "persistentvolumeclaims":
                size = item["spec"]["resources"]["requests"]["storage"]
                item["status"] = {"phase": "Bound", "capacity": {"storage": size}}
            elif plural == "deployments":
                number = item["spec"]["replicas"]
                counts = ("replicas", "updatedReplicas", "availableReplicas", "readyReplicas")
                item["status"] = dict.fromkeys(counts, number) | {"observedGeneration": 1}
            elif plural == "jobs" and not item.get("status"):
                self._end_job(name, item, is_failing=name in failing)

    def _end_job(self, name: str, item: Json, *, is_failing: bool) -> None:
        template = item["spec"]["template"]
        component = template["metadata"]["labels"]["finetune.dev/component"]
        report = {"phase": component, "reason": "Completed", "message": "", "details": DETAILS.get(component, {})}
        if is_failing:
            report = {"phase": component, "reason": "RankFailed", "message": "boom", "details": {}}
        ended = {
            "exitCode": int(is_failing),
            "message": json.dumps(report),
            "finishedAt": TIME,
            "reason": "Error" if is_failing else "Completed",
        }
        pod = {
            "metadata": {
                "name": f"{name}-pod",
                "labels": template["metadata"]["labels"],
                "ownerReferences": [{"uid": item["metadata"]["uid"]}],
            },
            "spec": {"nodeName": "node-a"},
            "status": {
                "phase": "Failed" if is_failing else "Succeeded",
                "startTime": TIME,
                "containerStatuses": [{"name": "trainer", "state": {"terminated": ended}}],
            },
        }
        self._store("pods", f"{name}-pod", pod)
        condition = {"type": "Failed" if is_failing else "Complete", "status": "True", "lastTransitionTime": TIME}
        item["status"] = {"conditions": [condition]}


def _copy(item: Any) -> Any:
    return json.loads(json.dumps(item)) if item is not None else None


def _owner(item: Json) -> str:
    owners = item["metadata"].get("ownerReferences") or [{}]
    return str(owners[0].get("uid", ""))
