"""The connection to the API server: one request at a time into the three errors that the operator knows.

Used by `cluster`, and made by `handlers`. Plain REST through the official client's connection: objects stay the
dictionaries they are.
"""

from __future__ import annotations

import asyncio
import json
import urllib.parse
from collections.abc import Mapping
from typing import Any

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException

from .errors import ClusterUnavailableError, ConflictError, RefusedError, redact

TIMEOUT_SECONDS = 30
CONCURRENT_REQUESTS = 16
JSON_TYPE, MERGE_TYPE, APPLY_TYPE = "application/json", "application/merge-patch+json", "application/apply-patch+yaml"
Json = dict[str, Any]


async def load_configuration() -> client.Configuration:
    """Return how to reach the cluster: from inside it when we run there, else from KUBECONFIG."""
    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
    except config.ConfigException:
        await config.load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
    return configuration


class Connection:
    """Requests to the API server, of one event loop."""

    def __init__(self, configuration: client.Configuration) -> None:
        self._api = client.ApiClient(configuration)
        self._slots = asyncio.Semaphore(CONCURRENT_REQUESTS)

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()  # type: ignore[no-untyped-call]

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        content_type: str = JSON_TYPE,
    ) -> Json | None:
        """Send one request; None when there is no such object. Raises the three errors of the cluster."""
        headers = {"Accept": f"{JSON_TYPE}, application/jwk-set+json", "Content-Type": content_type}
        url = f"{self._api.configuration.host}{path}"
        if query:
            url = f"{url}?{urllib.parse.urlencode(query)}"
        async with self._slots:
            try:
                await self._api.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
                response = await self._api.call_api(method, url, headers, body, _request_timeout=TIMEOUT_SECONDS)
                data = await response.read()  # type: ignore[no-untyped-call]
                status = response.status
            except (aiohttp.ClientError, TimeoutError, OSError, ApiException) as error:
                raise ClusterUnavailableError(f"{method} {path}: {type(error).__name__}: {error}") from error
        return _interpret(method, path, status, data)


def _interpret(method: str, path: str, status: int, data: bytes) -> Json | None:
    if status == 404:
        return None
    if 200 <= status < 300:
        result: Json = json.loads(data) if data else {}
        return result
    try:
        message = str(json.loads(data).get("message") or "")
    except (ValueError, AttributeError):
        message = data[:300].decode(errors="replace")
    text = redact(f"{method} {path}: HTTP {status}: {message}")
    if status == 409:
        raise ConflictError(text)
    if status in (400, 403, 405, 413, 415, 422):
        raise RefusedError(status, redact(message) or text)
    raise ClusterUnavailableError(text)
