"""Builds the CustomResourceDefinition from the models, and writes every file that is generated from them.

`python -m finetune_operator.api.crd [ROOT]` is what `make generate` calls: it writes crds/finetunejobs.yaml, the
chart's copy of it and the API reference. Builders are pure; only `main` writes.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import yaml

from finetune_operator.api import v1alpha1
from finetune_operator.api.base import Rule
from finetune_operator.api.reference import build_reference
from finetune_operator.api.structural import Schema, build_structural_schema

_STARTED = "has(oldSelf.status) && has(oldSelf.status.startTime)"

_BANNER = "# Generated from operator/src/finetune_operator/api by `make generate`; do not edit.\n"

_KEEP = """  {{- if .Values.crds.keep }}
  annotations:
    helm.sh/resource-policy: keep
  {{- end }}
"""

_COLUMNS = (
    ("State", "string", ".status.state", 0, "What the job is doing."),
    ("Progress", "string", ".status.progress.summary", 0, "Share of the training steps that are done."),
    ("Loss", "number", ".status.progress.loss", 0, "Training loss, last logged."),
    ("ETA", "string", ".status.progress.eta", 0, "Estimated time to the end of training."),
    ("Restarts", "integer", ".status.restarts", 0, "Restarts so far."),
    ("Age", "date", ".metadata.creationTimestamp", 0, "Time since the job was made."),
    ("Step", "integer", ".status.progress.step", 1, "Optimizer steps done."),
    ("Tokens/s", "number", ".status.progress.tokensPerSecond", 1, "Tokens trained on per second."),
    ("Checkpoint", "integer", ".status.checkpoints.latestComplete", 1, "Step of the newest complete checkpoint."),
    ("Saved", "date", ".status.checkpoints.time", 1, "Time since the newest complete checkpoint was committed."),
    ("Goodput", "number", ".status.progress.goodput", 1, "Share of the allocated time that was productive."),
    ("Endpoint", "string", ".status.serving.url", 1, "URL of the endpoint inside the cluster."),
)

_SELECTABLE = (
    ".status.state",
    ".spec.model.source",
    ".spec.training.recipe",
    ".spec.training.method",
    ".spec.placement.queueName",
    ".spec.inference.endpoint",
    ".spec.suspend",
)


def build_crd() -> dict[str, Any]:
    """Return the CustomResourceDefinition of FineTuneJob."""
    version = {
        "name": v1alpha1.VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": [_build_column(*column) for column in _COLUMNS],
        "selectableFields": [{"jsonPath": path} for path in _SELECTABLE],
        "schema": {"openAPIV3Schema": build_schema()},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{v1alpha1.PLURAL}.{v1alpha1.GROUP}"},
        "spec": {
            "group": v1alpha1.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": v1alpha1.KIND,
                "listKind": f"{v1alpha1.KIND}List",
                "plural": v1alpha1.PLURAL,
                "singular": "finetunejob",
                "shortNames": ["ftj"],
                "categories": ["ml", "finetune"],
            },
            "versions": [version],
        },
    }


def build_schema() -> Schema:
    """Return the structural schema of a FineTuneJob."""
    schema = build_structural_schema(v1alpha1.FineTuneJob.model_json_schema(by_alias=True))
    properties = schema["properties"]
    for name, text in (
        ("apiVersion", "Version of the API: finetune.dev/v1alpha1."),
        ("kind", "Kind of the object: FineTuneJob."),
    ):
        properties[name] = {"type": "string", "description": text}
    properties["metadata"] = {"type": "object"}
    properties["status"].pop("default", None)
    schema["required"] = ["spec"]
    schema["x-kubernetes-validations"] += [rule.to_schema() for rule in build_frozen_rules()]
    properties["spec"]["properties"]["workspace"]["properties"]["size"]["x-kubernetes-validations"].append(
        {
            "rule": "self == 'auto' || oldSelf == 'auto' || quantity(self).compareTo(quantity(oldSelf)) >= 0",
            "message": "a volume only grows: write a larger size",
            "messageExpression": "'a volume only grows: write ' + oldSelf + ' or more'",
        }
    )
    return schema


def build_frozen_rules() -> list[Rule]:
    """Return the rules on changes of a job that has started: one per field that decides what the job is."""
    message = "cannot change once the job has started: put the old value back, or make a job with another name"
    rules = []
    for path in v1alpha1.FROZEN_FIELDS:
        new, old = f"self.spec.{path}", f"oldSelf.spec.{path}"
        # Not the shorter `self.spec.?a != oldSelf.spec.?a`: the cost of optionals is estimated without their bounds.
        same = f"has({new}) == has({old}) && (!has({new}) || {new} == {old})"
        rules.append(Rule(f"!({_STARTED}) || ({same})", message, field=f"spec.{path}"))
    return rules


def _build_column(name: str, kind: str, path: str, priority: int, description: str) -> dict[str, Any]:
    column = {"name": name, "type": kind, "jsonPath": path, "description": description}
    return column | {"priority": priority} if priority else column


class _Dumper(yaml.SafeDumper):
    """Writes shapes that occur twice twice: Kubernetes' readers know no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def to_yaml(document: Mapping[str, Any]) -> str:
    """Return the document as YAML without anchors."""
    return yaml.dump(dict(document), Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)


def build_files() -> dict[str, str]:
    """Return the generated files: path below the repository's root, and text."""
    crd = build_crd()
    name = f"  name: {crd['metadata']['name']}\n"
    chart = to_yaml(crd).replace(name, name + _KEEP, 1)
    return {
        "crds/finetunejobs.yaml": _BANNER + to_yaml(crd),
        "charts/finetune-operator/templates/crds/finetunejobs.yaml": (
            _BANNER + "{{- if .Values.crds.enabled }}\n" + chart + "{{- end }}\n"
        ),
        "operator/docs/api-reference.md": build_reference(crd, v1alpha1.FROZEN_FIELDS),
    }


def main(root: pathlib.Path) -> int:
    """Write the generated files below `root` and name those that changed."""
    for path, text in build_files().items():
        target = root / path
        if target.exists() and target.read_text() == text:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
