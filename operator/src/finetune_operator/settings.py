"""The administrators' settings: one file, read once at startup, refused when it holds anything unknown.

The chart renders its `config` values into that file. Read by `__main__` and handed down; nothing else reads files or
the environment for settings.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import yaml
from pydantic.alias_generators import to_camel

ENVIRONMENT_NAME = "FINETUNE_OPERATOR_SETTINGS"
DEFAULT_PATH = "/etc/finetune-operator/settings.yaml"


class SettingsError(Exception):
    """The settings file cannot be used; the message names the file and the field."""


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )


class Images(_Section):
    """Images of the pods, by digest where it matters."""

    trainer: str
    inference: str
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    """Names of pull Secrets in the jobs' namespaces."""


class Defaults(_Section):
    """What a job gets where it says nothing."""

    storage_class_name: str = ""
    """Empty: the cluster's default class."""
    node_selector: Mapping[str, str] = {}
    tolerations: tuple[Mapping[str, Any], ...] = ()
    gpu_resource_name: str = "nvidia.com/gpu"
    preparation_resources: Mapping[str, Mapping[str, str]] = {
        "requests": {"cpu": "500m", "memory": "1Gi"},
        "limits": {"memory": "8Gi"},
    }
    """Requests and limits of pods that need no GPU."""
    service_account_name: str = ""


class Limits(_Section):
    """What no job may exceed."""

    allowed_schemes: tuple[str, ...] = ("hf", "s3", "https", "pvc")
    allowed_service_accounts: tuple[str, ...] = ("*",)
    trust_remote_code: bool = False
    """Run code that comes with a model. A job alone cannot turn this on."""
    max_nodes: int = 0
    """Per job; 0: no limit."""
    max_gpus: int = 0
    """Per job, over all nodes; 0: no limit."""


class Proxies(_Section):
    """Proxies that pods use to reach model hubs and object stores."""

    http_proxy: str = ""
    https_proxy: str = ""
    no_proxy: str = ""


class Progress(_Section):
    """Where pods report progress to."""

    url: str = "https://finetune-operator-progress.finetune-system.svc:8443"
    port: int = 8443
    tls_secret_name: str = "finetune-operator-progress-tls"
    namespace: str = "finetune-system"
    """Namespace of the Secret, the operator's own."""


class Listener(_Section):
    """A port that the operator listens on."""

    port: int


class Settings(_Section):
    """Everything an administrator decides."""

    images: Images
    defaults: Defaults = Defaults()
    limits: Limits = Limits()
    proxies: Proxies = Proxies()
    ca_bundle: str = ""
    """PEM text of certificates that pods trust besides the image's own."""
    progress: Progress = Progress()
    metrics: Listener = Listener(port=8080)
    health: Listener = Listener(port=8081)
    watch_namespaces: tuple[str, ...] = ()
    """Namespaces to work in; empty: all."""
    resync_seconds: float = 30.0
    """How often every job is looked at although nothing was heard of it."""
    unschedulable_seconds: float = 45.0
    """How long a pod may be unschedulable before the job says so."""


def read_settings(path: str | None = None) -> Settings:
    """Read the settings file. Raises SettingsError that names the file and the field at fault."""
    where = pathlib.Path(path or os.environ.get(ENVIRONMENT_NAME) or DEFAULT_PATH)
    try:
        data = yaml.safe_load(where.read_text())
        return Settings.model_validate(data or {})
    except OSError as error:
        raise SettingsError(
            f"{where}: cannot read the settings: {error.strerror}; name the file in {ENVIRONMENT_NAME}"
        ) from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{where}: not YAML: {error}") from error
    except pydantic.ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in each['loc']) or 'settings'}: {each['msg']}" for each in error.errors()
        )
        raise SettingsError(f"{where}: {problems}") from error
