"""The part of a pod that a user may set: for every phase in `spec.pod`, and per phase merged over it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_operator.api.base import Model, Rule, matching
from finetune_operator.api.scalars import Name, Quantity, Text

LabelMap = Annotated[
    dict[str, Annotated[str, Field(max_length=63)]],
    Field(max_length=64),
    Rule(
        "self.all(key, !key.startsWith('finetune.dev/'))",
        "keys that start with finetune.dev/ are set by the operator: choose another prefix",
        lambda labels: not any(key.startswith("finetune.dev/") for key in labels),
    ),
]

AnnotationMap = Annotated[dict[str, Annotated[str, Field(max_length=4096)]], Field(max_length=64)]

NodeSelector = Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=32)]

QuantityMap = Annotated[dict[str, Quantity], Field(max_length=16)]

KeyName = Annotated[str, Field(min_length=1, max_length=253)]

EnvName = Annotated[
    str,
    Field(min_length=1, max_length=256),
    matching("[A-Za-z_][A-Za-z0-9_]*", "use letters, digits and '_', not starting with a digit"),
    Rule(
        "!self.startsWith('FINETUNE_')",
        "names that start with FINETUNE_ are set by the operator: choose another name",
        lambda name: not name.startswith("FINETUNE_"),
    ),
]


class SecretRef(Model):
    """A Secret in the job's namespace whose keys are environment names: HF_TOKEN, WANDB_API_KEY, AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL_S3, AWS_REGION, AWS_CA_BUNDLE (PEM text).
    """

    name: Name
    """Name of the Secret."""


class ObjectRef(Model):
    """An object in the job's namespace."""

    name: Name
    """Name of the object."""


class KeyRef(Model):
    """One key of a Secret or ConfigMap in the job's namespace."""

    name: Name
    """Name of the Secret or ConfigMap."""
    key: KeyName
    """Key in it."""
    optional: bool = False
    """Whether the pod may start without it."""


class FieldRef(Model):
    """A field of the pod itself."""

    field_path: Annotated[str, Field(max_length=256)]
    """Path of the field, as in status.podIP."""


class EnvSource(Model):
    """Where the value of an environment variable comes from."""

    secret_key_ref: KeyRef | None = None
    """A key of a Secret."""
    config_map_key_ref: KeyRef | None = None
    """A key of a ConfigMap."""
    field_ref: FieldRef | None = None
    """A field of the pod."""

    validations = (
        Rule(
            "(has(self.secretKeyRef) ? 1 : 0) + (has(self.configMapKeyRef) ? 1 : 0)"
            " + (has(self.fieldRef) ? 1 : 0) == 1",
            "write exactly one of secretKeyRef, configMapKeyRef and fieldRef",
            lambda source: len(source.model_fields_set) == 1,
        ),
    )


class EnvVar(Model):
    """An environment variable."""

    name: EnvName
    """Name of the variable."""
    value: Annotated[str, Field(max_length=32768)] | None = None
    """Its value."""
    value_from: EnvSource | None = None
    """Where its value comes from."""

    validations = (
        Rule(
            "!(has(self.value) && has(self.valueFrom))",
            "write either value or valueFrom, not both",
            lambda var: var.value is None or var.value_from is None,
        ),
    )


class EnvFrom(Model):
    """A Secret or ConfigMap whose keys become environment variables."""

    prefix: Annotated[str, Field(max_length=128)] = ""
    """Text put before every key."""
    secret_ref: ObjectRef | None = None
    """A Secret."""
    config_map_ref: ObjectRef | None = None
    """A ConfigMap."""

    validations = (
        Rule(
            "has(self.secretRef) != has(self.configMapRef)",
            "write exactly one of secretRef and configMapRef",
            lambda source: (source.secret_ref is None) != (source.config_map_ref is None),
        ),
    )


class Toleration(Model):
    """A taint that pods may be placed in spite of."""

    key: Annotated[str, Field(max_length=317)] | None = None
    """Key of the taint; none with operator Exists: every taint."""
    operator: Literal["Equal", "Exists"] = "Equal"
    """Equal compares the value, Exists does not."""
    value: Annotated[str, Field(max_length=63)] | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; none: all effects."""
    toleration_seconds: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """How long a NoExecute taint is tolerated."""


class PodResources(Model):
    """Resources of the phase's container, over what `spec.resources` gives."""

    requests: QuantityMap = {}
    """What the pod is placed by."""
    limits: QuantityMap = {}
    """What the container may use at most."""


class PodTemplate(Model):
    """Settings of pods. The operator sets everything else, the restricted security context included."""

    service_account_name: Name | None = None
    """ServiceAccount of the pods, for cloud identity; the administrators may limit the choice."""
    image_pull_secrets: Annotated[list[ObjectRef], Field(max_length=8)] = []
    """Secrets with registry credentials."""
    image: Text | None = None
    """Image instead of the administrators' default."""
    labels: LabelMap = {}
    """Labels added to the pods."""
    annotations: AnnotationMap = {}
    """Annotations added to the pods."""
    env: Annotated[list[EnvVar], Field(max_length=64)] = []
    """Environment variables added to the container."""
    env_from: Annotated[list[EnvFrom], Field(max_length=16)] = []
    """Secrets and ConfigMaps whose keys become environment variables."""
    node_selector: NodeSelector = {}
    """Labels that a node must carry."""
    tolerations: Annotated[list[Toleration], Field(max_length=16)] = []
    """Taints that the pods tolerate."""
    affinity: Annotated[dict[str, Any], Field(max_length=3)] | None = None
    """Affinity in the shape of a pod's `spec.affinity`."""
    priority_class_name: Name | None = None
    """PriorityClass of the pods."""
    resources: PodResources | None = None
    """Resources of the container."""
