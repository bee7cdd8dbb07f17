"""Names, labels and annotations of everything the operator makes. Pure; used by every module that names an object."""

from __future__ import annotations

import dataclasses
import hashlib

GROUP = "finetune.dev"
VERSION = "v1alpha1"
PLURAL = "finetunejobs"
KIND = "FineTuneJob"
FIELD_MANAGER = "finetune-operator"

LABEL_JOB = "finetune.dev/job"
LABEL_COMPONENT = "finetune.dev/component"
LABEL_ATTEMPT = "finetune.dev/attempt"
LABEL_ENDPOINT = "finetune.dev/endpoint"
LABEL_VERSION = "finetune.dev/version"
"""Of the pods of one version of an endpoint; the endpoint's Service selects by it."""
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_QUEUE = "kueue.x-k8s.io/queue-name"
LABEL_PRIORITY_CLASS = "kueue.x-k8s.io/priority-class"
LABEL_WORKSPACE = "finetune.dev/workspace"
"""Of pods that must be on the node of a volume that only one node can mount: a digest of its claim's name."""
ANNOTATION_DIGEST = "finetune.dev/model-digest"
ANNOTATION_JOB_UID = "finetune.dev/job-uid"
ANNOTATION_SOURCES = "finetune.dev/sources-digest"
ANNOTATION_LEAST = "finetune.dev/least-replicas"
"""On an autoscaled version's Deployment: with so many pods it is ready, whatever the autoscaler wants just now."""
ANNOTATION_SMOKE = "finetune.dev/smoke-prompt"
"""On an endpoint's Service: the figures of the smoke prompt that the live version answered, as JSON."""
ANNOTATION_PREVIOUS = "finetune.dev/previous-version"
"""On an endpoint's Service: the version that was live before."""
ANNOTATION_SWITCHED = "finetune.dev/switched-at"
ANNOTATION_REFUSED = "finetune.dev/refused-version"
"""On an endpoint's Service: a version that died soon after it took traffic; it is not tried again."""
FINALIZER = "finetune.dev/endpoint"
"""Kept on a job while it serves an endpoint that must go with it: endpoint objects have no owner reference."""

CONTAINER = "trainer"
SERVE_CONTAINER = "server"
WORKSPACE_VOLUME = "workspace"
SMOKE = "smoke"
"""Component of the Job that asks a version of an endpoint the smoke prompt."""
NO_VERSION = "none"
"""What an endpoint's Service selects before its first version answers: no pod carries it."""
FIRST_VERSION = "first"
"""Stands for the one Deployment of an endpoint that a release without versions made."""


@dataclasses.dataclass(frozen=True)
class Names:
    """Names of the children of one job."""

    job: str
    endpoint: str
    claim: str

    @property
    def plan_map(self) -> str:
        return f"{self.job}-plan"

    @property
    def record_map(self) -> str:
        return f"{self.job}-record"

    @property
    def training_service(self) -> str:
        return f"{self.job}-train"

    def phase_job(self, phase: str) -> str:
        """Name of the Job of a phase that runs once; that of its ConfigMap begins so."""
        return f"{self.job}-{phase}"

    def compose_job(self, request: str) -> str:
        """Name of the Job that composes the adapters of one request; also that of its ConfigMap."""
        return f"{self.job}-compose-{request}"

    def training_job(self, attempt: int) -> str:
        """Name of the Job of one attempt; also that of its ConfigMap."""
        return f"{self.job}-train-{attempt}"

    @property
    def first_serving_map(self) -> str:
        """ConfigMap of an endpoint that a release without versions made."""
        return f"{self.endpoint}-serve"

    def version(self, label: str) -> str:
        """Name of the Deployment of one version of the endpoint; also that of all that goes with it."""
        return f"{self.endpoint}-{label}"

    def smoke_job(self, label: str) -> str:
        """Name of the Job that asks a version the smoke prompt."""
        return f"{self.version(label)}-{SMOKE}"

    def rendezvous_host(self, attempt: int) -> str:
        """Host name of the pod with rank 0."""
        return f"{self.training_job(attempt)}-0.{self.training_service}"


def make_names(job: str, endpoint: str = "", existing_claim: str = "") -> Names:
    """Return the names of a job's children."""
    return Names(job=job, endpoint=endpoint or job, claim=existing_claim or f"{job}-workspace")


def short_digest(text: str, length: int = 12) -> str:
    """Return the first hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]
