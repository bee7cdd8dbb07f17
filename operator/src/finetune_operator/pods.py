"""The resolved pod settings of each phase: `spec.pod`, then the phase's own `pod`, over what the administrators give.

Pure; used by `plan`. A list or map that a phase writes is merged over the general one, a scalar replaces it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .api.v1alpha1 import PodTemplate
from .conditions import Reason
from .errors import InvalidJobError
from .settings import Settings


@dataclasses.dataclass(frozen=True)
class PodPlan:
    """Everything about a phase's pods that does not follow from the phase itself."""

    image: str
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()
    service_account: str = ""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    annotations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    env: tuple[Mapping[str, Any], ...] = ()
    env_from: tuple[Mapping[str, Any], ...] = ()
    node_selector: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    affinity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    priority_class: str = ""
    requests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    limits: Mapping[str, str] = dataclasses.field(default_factory=dict)


def resolve_pod(image: str, templates: Sequence[PodTemplate | None], settings: Settings) -> PodPlan:
    """Return the pod settings of a phase from its templates, the general one first. Raises InvalidJobError."""
    defaults = settings.defaults
    pod = PodPlan(
        image=image,
        pull_policy=settings.images.image_pull_policy,
        pull_secrets=settings.images.image_pull_secrets,
        service_account=defaults.service_account_name,
        node_selector=dict(defaults.node_selector),
        tolerations=tuple(dict(each) for each in defaults.tolerations),
    )
    for template in templates:
        if template is not None:
            pod = _merge(pod, template)
    written = any(template is not None and template.service_account_name for template in templates)
    allowed = settings.limits.allowed_service_accounts
    if written and "*" not in allowed and pod.service_account not in allowed:
        raise InvalidJobError(
            f"pod.serviceAccountName: {pod.service_account} is not allowed by the administrators: use "
            + (" or ".join(allowed) or "none"),
            reason=Reason.NOT_ALLOWED,
        )
    return pod


def _merge(pod: PodPlan, template: PodTemplate) -> PodPlan:
    resources = template.resources
    written = {name: _to_data(value) for name, value in template.to_dict().items()}
    env = {each["name"]: each for each in (*pod.env, *written.get("env", ()))}
    pull_secrets = tuple(each["name"] for each in written.get("imagePullSecrets", ()))
    return dataclasses.replace(
        pod,
        image=template.image or pod.image,
        pull_secrets=tuple(dict.fromkeys((*pod.pull_secrets, *pull_secrets))),
        service_account=template.service_account_name or pod.service_account,
        labels={**pod.labels, **template.labels},
        annotations={**pod.annotations, **template.annotations},
        env=tuple(env.values()),
        env_from=(*pod.env_from, *written.get("envFrom", ())),
        node_selector={**pod.node_selector, **template.node_selector},
        tolerations=(*pod.tolerations, *written.get("tolerations", ())),
        affinity={**pod.affinity, **(template.affinity or {})},
        priority_class=template.priority_class_name or pod.priority_class,
        requests={**pod.requests, **(_to_texts(resources.requests) if resources else {})},
        limits={**pod.limits, **(_to_texts(resources.limits) if resources else {})},
    )


def _to_texts(quantities: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in quantities.items()}


def _to_data(value: Any) -> Any:
    """Drop empty maps and texts that mean "not written" from what goes into a manifest."""
    if isinstance(value, Mapping):
        return {key: _to_data(item) for key, item in value.items() if item not in ({}, "", [], None)}
    if isinstance(value, list):
        return [_to_data(item) for item in value]
    return value
