"""LoRA adapters that are served over the promoted model, composed into one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_operator.api.base import Model, Rule, matching
from finetune_operator.api.pods import SecretRef
from finetune_operator.api.scalars import DnsLabel, Revision

AdapterUrl = Annotated[
    str,
    Field(max_length=2048),
    matching(
        "(hf|s3|pvc)://[^\\s]+", "start with hf:// (a hub repository), s3:// (bucket and prefix) or pvc:// (a path)"
    ),
]


class Adapter(Model):
    """One adapter of the composition."""

    name: Annotated[
        DnsLabel,
        Rule(
            "!(self in ['base', 'own', 'composition'])",
            "base, own and composition stand for something else where adapters are measured: choose another name",
            lambda name: name not in ("base", "own", "composition"),
        ),
    ]
    """What it is called in reports and in the status."""
    source: AdapterUrl
    """Folder that PEFT wrote, or promoted model of a LoRA job: hf://organisation/name, s3://bucket/prefix, or
    pvc://path on the workspace. It must have been trained on the promoted model; with method: lora, on the base."""
    revision: Revision | None = None
    """Branch, tag or commit of a hub repository; the newest by default."""
    weight: Annotated[float, Field(ge=-100, le=100)] = 1.0
    """What its change is multiplied with; negative: taken away."""
    secret_ref: SecretRef | None = None
    """Secret with credentials for the source."""


class Composition(Model):
    """How several adapters become the one that a server applies."""

    method: Literal["concatenate", "svd", "linear", "ties", "dare-linear", "dare-ties"] = "concatenate"
    """concatenate and svd are exact at the sum of the ranks; the others are lossy."""
    rank: Annotated[int, Field(ge=1, le=512)] | None = None
    """Largest rank of the result; by default what the method needs."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the changes that ties and dare keep."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Seed of what dare drops."""


ADAPTER_RULES = (
    Rule(
        "!has(self.adapters) || self.adapters.all(one, self.adapters.exists_one(other, other.name == one.name))",
        "give every adapter a name of its own",
        lambda inference: len({each.name for each in inference.adapters}) == len(inference.adapters),
        field="adapters",
    ),
    Rule(
        "!has(self.adapters) || size(self.adapters) == 0 || self.adapters.exists(one, one.weight != 0.0)",
        "with every weight at 0 nothing is composed: give one another weight, or leave adapters out",
        lambda inference: not inference.adapters or any(each.weight for each in inference.adapters),
        field="adapters",
    ),
    Rule(
        "!has(self.composition) || (has(self.adapters) && size(self.adapters) > 0)",
        "there is nothing to compose: name adapters, or leave composition out",
        lambda inference: inference.composition is None or bool(inference.adapters),
        field="composition",
    ),
)
"""Rules of `spec.inference` on its adapters."""
