"""Environment variables that the operator sets in its pods and the trainer reads."""

from __future__ import annotations

RUN_CONFIG = "FINETUNE_RUN_CONFIG"
"""Path of the run's settings as JSON (`run_config.RunConfig`)."""

RUN_CONFIG_PATH = "/etc/finetune/run.json"
"""Where the operator mounts those settings."""

ATTEMPT = "FINETUNE_ATTEMPT"
"""Number of the attempt, from 1."""

NOTICE_SECONDS = "FINETUNE_NOTICE_SECONDS"
"""Seconds from SIGTERM to SIGKILL, at the least; unset: nobody is in a hurry."""

SAVE_SECONDS = "FINETUNE_SAVE_SECONDS"
"""Seconds that a save is expected to take before this process has measured one."""

NODE_RANK = "JOB_COMPLETION_INDEX"
"""Index of this pod in the attempt, from 0; Kubernetes sets it in pods of an Indexed Job."""

TERMINATION_LOG = "FINETUNE_TERMINATION_LOG"
"""File that receives the exit report; unset outside a cluster, where the report goes to the workspace only."""

TERMINATION_LOG_PATH = "/dev/termination-log"
"""The file that Kubernetes reads the termination message from."""

CA_BUNDLE_PATH = "/etc/finetune/ca-bundle.crt"
"""Where the administrators' CA bundle is mounted, when there is one; named by SSL_CERT_FILE and AWS_CA_BUNDLE."""

PROGRESS_URL = "KUBEFLOW_TRAINER_SERVER_URL"
"""URL that progress is posted to, in the Kubeflow Trainer protocol (KEP-2779). Unset: no posts."""

PROGRESS_TOKEN = "KUBEFLOW_TRAINER_SERVER_TOKEN"
"""Path of the file with the bearer token for the progress URL."""

PROGRESS_CA_CERT = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
"""Path of the CA certificate that signs the progress URL's certificate."""

PROGRESS_CA_PATH = "/etc/finetune/progress-ca.crt"
"""Where the operator mounts that certificate."""

PROGRESS_TOKEN_PATH = "/var/run/secrets/finetune.dev/token"
"""Where the operator mounts the projected token."""

PROGRESS_AUDIENCE = "finetune.dev/progress"
"""Audience of the projected token."""

METRICS_PORT = "FINETUNE_METRICS_PORT"
"""Port on which a training pod of rank 0 serves Prometheus metrics; unset: none."""

CREDENTIAL_KEYS = (
    "HF_TOKEN",
    "HF_ENDPOINT",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_CA_BUNDLE",
)
"""Keys that a Secret named by `secretRef` may hold for a source or a destination. In the pod each carries the prefix
that the run's settings give for that source, so that two sources may use two accounts. AWS_CA_BUNDLE holds PEM text
in a Secret, and a path in an unprefixed variable."""
