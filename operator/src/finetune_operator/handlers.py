"""Maps what Kopf hears to one pass over one job, and holds what the process runs. No domain knowledge.

Kopf watches; it keeps no finalizers, no annotations and no progress of its own: events and the timer alike only ask
the work queue for a pass. `__main__` starts Kopf on this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import logging
import time
from typing import Any

import kopf
from aiohttp import web

from . import naming
from .certificates import Certificates, from_secret, is_usable, make_certificates, to_secret
from .cluster import Cluster
from .connection import Connection, load_configuration
from .errors import ClusterUnavailableError, ConflictError, RefusedError
from .metrics import EVENTS
from .progress import ProgressStore
from .progress_server import ServerThread, Verifier, build_app, build_tls
from .reconcile import Reconciler
from .settings import Settings
from .work_queue import WorkQueue

HEARTBEAT_SECONDS = 2.0
FINISHED_EVERY = 10
"""Finished jobs are looked at in one of so many resyncs."""
CHILD = {naming.LABEL_JOB: kopf.PRESENT}
SILENT_SECONDS = 60.0
"""How long the loop may be silent before the process counts as dead."""
logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Operator:
    """What the process runs; Kopf hands it to every handler as its memo."""

    settings: Settings
    beat: float = dataclasses.field(default_factory=time.monotonic)
    """When the loop was last seen alive."""
    queue: WorkQueue | None = None
    connection: Connection | None = None
    tasks: list[asyncio.Task[None]] = dataclasses.field(default_factory=list)
    servers: list[ServerThread] = dataclasses.field(default_factory=list)

    def request(self, namespace: str | None, name: str | None) -> None:
        """Ask for a pass over a job."""
        if self.queue is not None and namespace and name:
            self.queue.request((namespace, name))

    def is_alive(self) -> bool:
        """Has the loop moved lately, and does every task of it still run?"""
        return time.monotonic() - self.beat < SILENT_SECONDS and not any(task.done() for task in self.tasks)


@kopf.on.login(id="login")
def log_in(**kwargs: Any) -> kopf.ConnectionInfo | None:
    """Log Kopf in without its copy of the client, which would cost 20 MB."""
    return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)


@kopf.on.startup(id="start")
async def start(settings: kopf.OperatorSettings, memo: Operator, **_: Any) -> None:
    """Configure Kopf, and start everything that is not Kopf's."""
    _configure(settings, memo.settings)
    configuration = await load_configuration()
    memo.connection = Connection(configuration)
    cluster = Cluster(memo.connection)
    clock = _now
    certificates = await _load_certificates(cluster, memo.settings)
    store = ProgressStore(clock())
    reconciler = Reconciler(cluster, memo.settings, store, certificates.ca, clock)
    queue = WorkQueue(reconciler.reconcile)
    memo.queue = queue

    async def make_progress_app() -> tuple[web.Application, Any]:
        connection = Connection(configuration)
        tokens = Cluster(connection)
        verifier = Verifier(tokens.review_token, tokens.read_pod)
        return build_app(verifier, store, queue.request_threadsafe), connection.close

    progress = ServerThread(make_progress_app, memo.settings.progress.port, build_tls(certificates), "progress")
    health = ServerThread(lambda: _make_health_app(memo), memo.settings.health.port, None, "health")
    memo.servers = [health, progress]
    for server in memo.servers:
        server.start()
    memo.tasks = [asyncio.create_task(_beat(memo)), asyncio.create_task(_resync(memo, cluster))]


@kopf.on.cleanup(id="stop")
async def stop(memo: Operator, **_: Any) -> None:
    """Stop what `start` started."""
    for task in memo.tasks:
        task.cancel()
    if memo.queue is not None:
        await memo.queue.close()
    for server in memo.servers:
        await asyncio.to_thread(server.stop)
    if memo.connection is not None:
        await memo.connection.close()


@kopf.on.event(naming.GROUP, naming.VERSION, naming.PLURAL, id="job")
async def hear_job(namespace: str | None, name: str | None, memo: Operator, **_: Any) -> None:
    """A job was made, changed or removed."""
    EVENTS.labels("FineTuneJob").inc()
    memo.request(namespace, name)


@kopf.on.event("batch", "v1", "jobs", labels=CHILD, id="child-job")
@kopf.on.event("v1", "pods", labels=CHILD, id="child-pod")
@kopf.on.event("v1", "persistentvolumeclaims", labels=CHILD, id="child-claim")
@kopf.on.event("apps", "v1", "deployments", labels=CHILD, id="child-deployment")
async def hear_child(namespace: str | None, labels: kopf.Labels, body: kopf.Body, memo: Operator, **_: Any) -> None:
    """A child of a job was made, changed or removed."""
    EVENTS.labels(body.get("kind") or "child").inc()
    memo.request(namespace, labels.get(naming.LABEL_JOB))


def _configure(settings: kopf.OperatorSettings, own: Settings) -> None:
    settings.posting.enabled = False
    # Kopf asks for namespaces and CRDs for a minute before it watches anything; limited installs may not see them.
    settings.scanning.disabled = bool(own.watch_namespaces)
    settings.peering.standalone = True
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 360
    settings.watching.inactivity_timeout = 70
    settings.watching.connect_timeout = 10
    settings.networking.request_timeout = 30
    settings.networking.enforce_retry_after = True
    settings.queueing.worker_limit = 100
    settings.queueing.idle_timeout = 1
    settings.execution.max_workers = 2
    settings.persistence.finalizer = f"{naming.GROUP}/kopf"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=naming.GROUP)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=naming.GROUP)
    settings.process.ultimate_exiting_timeout = 30


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


async def _load_certificates(cluster: Cluster, settings: Settings) -> Certificates:
    """Read the certificates, or make them: of several copies that start at once, the first one's count."""
    place, delay = settings.progress, 1.0
    while True:
        try:
            secret = await cluster.read_secret(place.namespace, place.tls_secret_name)
            certificates = from_secret(secret or {})
            if is_usable(certificates, place.url, _now()):
                return certificates
            made = to_secret(make_certificates(place.url, _now()), place.tls_secret_name, place.namespace)
            if secret is not None:
                made["metadata"]["resourceVersion"] = secret["metadata"]["resourceVersion"]
            with contextlib.suppress(ConflictError):
                await cluster.write_secret(made)
        except (ClusterUnavailableError, RefusedError) as error:
            logger.warning("cannot keep the progress server's certificate: %s; trying again in %.0f s", error, delay)
            await asyncio.sleep(delay)
            delay = min(30.0, delay * 2)


async def _beat(memo: Operator) -> None:
    while True:
        memo.beat = time.monotonic()
        await asyncio.sleep(HEARTBEAT_SECONDS)


async def _resync(memo: Operator, cluster: Cluster) -> None:
    """Ask for a pass over every job now and then: what a lost watch would have said is found so."""
    number = 0
    while True:
        for namespace in memo.settings.watch_namespaces or ("",):
            try:
                jobs = await cluster.list_jobs(namespace)
            except (ClusterUnavailableError, ConflictError, RefusedError) as error:
                logger.warning("cannot list jobs: %s", error)
                continue
            for job in jobs:
                if number % FINISHED_EVERY == 0 or not _is_at_rest(job):
                    memo.request(job["metadata"]["namespace"], job["metadata"]["name"])
        number += 1
        await asyncio.sleep(memo.settings.resync_seconds)


def _is_at_rest(job: dict[str, Any]) -> bool:
    """Has the job finished, and has nobody asked anything of it since?"""
    meta, status = job["metadata"], job.get("status") or {}
    if meta.get("deletionTimestamp") or meta.get("generation") != status.get("observedGeneration"):
        return False
    conditions = status.get("conditions") or ()
    return any(each.get("type") == "Finished" and each.get("status") == "True" for each in conditions)


async def _make_health_app(memo: Operator) -> tuple[web.Application, Any]:
    async def answer(_: web.Request) -> web.Response:
        alive = memo.is_alive()
        return web.Response(text="ok\n" if alive else "the loop does not move\n", status=200 if alive else 503)

    async def close() -> None:
        return None

    app = web.Application()
    app.router.add_get("/healthz", answer)
    app.router.add_get("/readyz", answer)
    return app, close
