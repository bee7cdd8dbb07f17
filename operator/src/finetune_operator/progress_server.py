"""The HTTPS server that pods post progress to, in the Kubeflow Trainer protocol (KEP-2779).

Runs in a thread and an event loop of its own, so that neither a slow client nor a slow pass holds up the other.
Started by `handlers`. A post counts only when its token, checked by the API server, belongs to a pod of the job.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import hashlib
import logging
import os
import ssl
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from finetune_contract.environment import PROGRESS_AUDIENCE
from finetune_contract.reports import Phase, ProgressReport

from . import naming
from .certificates import Certificates
from .errors import ClusterUnavailableError, ConflictError, RefusedError
from .metrics import PROGRESS_POSTS
from .progress import ProgressStore

MAX_BODY_BYTES = 64 * 1024
CACHE_SECONDS = 300.0
CACHE_ENTRIES = 10_000
POD_NAME_KEY, POD_UID_KEY = "authentication.kubernetes.io/pod-name", "authentication.kubernetes.io/pod-uid"
PATHS = (
    "/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs/{name}/status",
    "/apis/trainer.kubeflow.org/v1alpha1/namespaces/{namespace}/trainjobs/{name}/status",
)
Key = tuple[str, str]
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Poster:
    """The pod behind a token."""

    namespace: str
    job: str
    component: str
    attempt: int


class DeniedError(Exception):
    """The post does not count."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, message


class Verifier:
    """Tells whose token it is, and remembers it for a while."""

    def __init__(
        self,
        review_token: Callable[[str, str], Awaitable[dict[str, Any]]],
        read_pod: Callable[[str, str], Awaitable[dict[str, Any] | None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._review_token = review_token
        self._read_pod = read_pod
        self._clock = clock
        self._cache: dict[str, tuple[float, Poster]] = {}

    async def verify(self, header: str, namespace: str) -> Poster:
        """Return the pod that a token belongs to. Raises DeniedError."""
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise DeniedError(401, "Unauthorized", "send the pod's token as Authorization: Bearer")
        digest = hashlib.sha256(token.encode()).hexdigest()
        known = self._cache.get(digest)
        # A token is good for its own namespace only, however often it was good there.
        if known is not None and known[0] > self._clock() and known[1].namespace == namespace:
            return known[1]
        poster = await self._ask(token.strip(), namespace)
        if len(self._cache) >= CACHE_ENTRIES:
            self._cache.clear()
        self._cache[digest] = (self._clock() + CACHE_SECONDS, poster)
        return poster

    async def _ask(self, token: str, namespace: str) -> Poster:
        status = await self._review_token(token, PROGRESS_AUDIENCE)
        user = status.get("user") or {}
        extra = user.get("extra") or {}
        pod_name = next(iter(extra.get(POD_NAME_KEY) or ()), "")
        parts = str(user.get("username") or "").split(":")
        if not status.get("authenticated") or PROGRESS_AUDIENCE not in (status.get("audiences") or ()):
            raise DeniedError(401, "Unauthorized", "the token is not valid here")
        if parts[:2] != ["system", "serviceaccount"] or len(parts) != 4 or parts[2] != namespace or not pod_name:
            raise DeniedError(403, "Forbidden", "the token belongs to no pod of this namespace")
        pod = await self._read_pod(namespace, pod_name)
        uid = next(iter(extra.get(POD_UID_KEY) or ()), "")
        if pod is None or pod["metadata"].get("uid") != uid:
            raise DeniedError(403, "Forbidden", "the token's pod is gone")
        labels = pod["metadata"].get("labels") or {}
        return Poster(
            namespace=namespace,
            job=labels.get(naming.LABEL_JOB, ""),
            component=labels.get(naming.LABEL_COMPONENT, ""),
            attempt=int(labels.get(naming.LABEL_ATTEMPT) or 0),
        )


def build_app(verifier: Verifier, store: ProgressStore, wake: Callable[[Key], None]) -> web.Application:
    """Return the server's application."""

    async def post(request: web.Request) -> web.Response:
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        try:
            payload = await _accept(request, namespace, name)
        except DeniedError as denied:
            PROGRESS_POSTS.labels(str(denied.code)).inc()
            return web.json_response(_status(denied), status=denied.code)
        PROGRESS_POSTS.labels("200").inc()
        return web.json_response(payload)

    async def _accept(request: web.Request, namespace: str, name: str) -> dict[str, Any]:
        try:
            poster = await verifier.verify(request.headers.get("Authorization", ""), namespace)
        except (ClusterUnavailableError, ConflictError, RefusedError) as error:
            raise DeniedError(503, "ServiceUnavailable", "tokens cannot be checked now") from error
        if poster.job != name:
            raise DeniedError(403, "Forbidden", f"the token's pod is not one of job {name}")
        try:
            body = await request.json()
            report = ProgressReport.from_body(body if isinstance(body, dict) else {})
        except web.HTTPRequestEntityTooLarge as error:
            raise DeniedError(413, "RequestEntityTooLarge", f"at most {MAX_BODY_BYTES} bytes") from error
        except (ValueError, TypeError) as error:
            raise DeniedError(422, "Invalid", f"not a progress post: {error}") from error
        if poster.component == Phase.TRAIN:
            now = datetime.datetime.now(datetime.UTC)
            if store.put((namespace, name), poster.attempt, report, now):
                wake((namespace, name))
        return dict(body)

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    for path in PATHS:
        app.router.add_post(path, post)
    return app


def _status(denied: DeniedError) -> dict[str, Any]:
    """Return the error as Kubernetes writes errors."""
    return {
        "apiVersion": "v1",
        "kind": "Status",
        "status": "Failure",
        "code": denied.code,
        "reason": denied.reason,
        "message": denied.message,
    }


def build_tls(certificates: Certificates) -> ssl.SSLContext:
    """Return the server side of TLS. Python reads certificates from files only; they are gone at once."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("tls.crt", "tls.key")]
        for path, text in zip(paths, (certificates.certificate, certificates.private_key), strict=True):
            with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
                file.write(text)
        context.load_cert_chain(*paths)
    return context


class ServerThread:
    """An aiohttp application in a thread of its own, until `stop`."""

    def __init__(
        self,
        make_app: Callable[[], Awaitable[tuple[web.Application, Callable[[], Awaitable[None]]]]],
        port: int,
        tls: ssl.SSLContext | None,
        name: str,
    ) -> None:
        self._make_app, self._port, self._tls, self._name = make_app, port, tls, name
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._stop = asyncio.Event()
        self._started = threading.Event()
        self._error: BaseException | None = None

    def start(self) -> None:
        """Start, and return when the port is open. Raises what kept it from opening."""
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Stop, and wait for the thread to end."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout=10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:
            self._error = error
            logger.error("%s server: %s", self._name, error)
        finally:
            self._started.set()
            self._loop.close()

    async def _serve(self) -> None:
        app, close = await self._make_app()
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=2)
        await runner.setup()
        try:
            await web.TCPSite(runner, None, self._port, ssl_context=self._tls).start()
            self._started.set()
            await self._stop.wait()
        finally:
            await runner.cleanup()
            await close()
