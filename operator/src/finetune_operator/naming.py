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
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_QUEUE = "kueue.x-k8s.io/queue-name"
LABEL_PRIORITY_CLASS = "kueue.x-k8s.io/priority-class"
ANNOTATION_DIGEST = "finetune.dev/model-digest"
ANNOTATION_JOB_UID = "finetune.dev/job-uid"
ANNOTATION_SOURCES = "finetune.dev/sources-digest"
FINALIZER = "finetune.dev/endpoint"
"""Kept on a job while it serves an endpoint that must go with it: endpoint objects have no owner reference."""

CONTAINER = "trainer"
SERVE_CONTAINER = "server"
WORKSPACE_VOLUME = "workspace"


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
        """Name of the Job of a phase that runs once; also that of its ConfigMap."""
        return f"{self.job}-{phase}"

    def training_job(self, attempt: int) -> str:
        """Name of the Job of one attempt; also that of its ConfigMap."""
        return f"{self.job}-train-{attempt}"

    @property
    def serving_map(self) -> str:
        return f"{self.endpoint}-serve"

    def rendezvous_host(self, attempt: int) -> str:
        """Host name of the pod with rank 0."""
        return f"{self.training_job(attempt)}-0.{self.training_service}"


def make_names(job: str, endpoint: str = "", existing_claim: str = "") -> Names:
    """Return the names of a job's children."""
    return Names(job=job, endpoint=endpoint or job, claim=existing_claim or f"{job}-workspace")


def short_digest(text: str, length: int = 12) -> str:
    """Return the first hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]
