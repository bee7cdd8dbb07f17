"""Renders the API reference in Markdown from the CustomResourceDefinition. Pure; called by crd.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_HEAD = """# API reference

Generated from `operator/src/finetune_operator/api` by `make generate`; do not edit. `kubectl explain {plural}.spec`
says the same in a terminal.

`{group}/{version}`, kind `{kind}` (short: `{short}`). A field in **bold** is required. Of fields that are joined by
"either" in the rules, write one.

The settings of pods, which `spec.pod` and each phase's own `pod` share, are described once, under `spec.pod`. A
`secretRef` has one field, `name`: a Secret in the job's namespace with any of the keys `HF_TOKEN`, `HF_ENDPOINT`,
`WANDB_API_KEY`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_ENDPOINT_URL_S3`, `AWS_REGION`
and `AWS_CA_BUNDLE` (PEM text).
"""

_FROZEN = """## What cannot change

Once a job has started (`status.startTime`), the API server refuses a change of the fields that decide what it is:
{fields}. `workspace.size` only grows. Everything else may change: what a job runs on applies from its next attempt;
`suspend`, `ttlSecondsAfterFinished`, `inference` and the gates apply at once.
"""


def build_reference(crd: Mapping[str, Any], frozen_fields: Iterable[str]) -> str:
    """Return the reference: one table per object of the spec and the status."""
    spec, names = crd["spec"], crd["spec"]["names"]
    version = spec["versions"][0]
    properties = version["schema"]["openAPIV3Schema"]["properties"]
    head = _HEAD.format(
        plural=names["plural"],
        group=spec["group"],
        version=version["name"],
        kind=names["kind"],
        short=names["shortNames"][0],
    )
    frozen = _FROZEN.format(fields=",\n".join(f"`{field}`" for field in frozen_fields))
    objects = [_render_object(*item) for root in ("spec", "status") for item in _walk(root, properties[root])]
    return "\n".join([head, frozen, *objects])


def _walk(path: str, schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every object below `path` with its path, parents first."""
    yield path, schema
    for name, item in schema["properties"].items():
        child = f"{path}.{name}"
        if name.endswith("Ref") or (name == "pod" and path != "spec"):
            continue
        if "properties" in item:
            yield from _walk(child, item)
        elif "properties" in item.get("items", {}):
            yield from _walk(f"{child}[]", item["items"])


def _render_object(path: str, schema: Mapping[str, Any]) -> str:
    lines = [f"## {path}\n", f"{schema['description']}\n", "| Field | Type | Default | Meaning |", "|---|---|---|---|"]
    required = schema.get("required", ())
    for name, item in schema["properties"].items():
        label = f"**`{name}`**" if name in required else f"`{name}`"
        cells = (label, _describe_type(item), _describe_default(item), _escape(item["description"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_render_rules(schema)])


def _render_rules(schema: Mapping[str, Any]) -> list[str]:
    rules = schema.get("x-kubernetes-validations", ())
    fields = [rule.get("fieldPath", "").removeprefix(".") for rule in rules]
    lines = [
        f"- {f'`{field}`: ' if field else ''}{_escape(rule['message'])}"
        for rule, field in zip(rules, fields, strict=True)
    ]
    return ["Refused, with these words:\n", *lines, ""] if lines else []


def _describe_type(item: Mapping[str, Any]) -> str:
    if item.get("x-kubernetes-int-or-string"):
        return "integer or string"
    if "enum" in item:
        return " or ".join(f"`{value}`" for value in item["enum"])
    kind: str = item["type"]
    if kind == "array":
        return f"list of {_describe_type(item['items'])}, at most {item['maxItems']}"
    if "additionalProperties" in item:
        return f"map to {_describe_type(item['additionalProperties'])}"
    least = ">" if item.get("exclusiveMinimum") else "≥"
    bounds = [f"{sign} {item[key]}" for sign, key in ((least, "minimum"), ("≤", "maximum")) if key in item]
    return f"{kind} {', '.join(bounds)}".strip()


def _describe_default(item: Mapping[str, Any]) -> str:
    default = item.get("default")
    if default is None or isinstance(default, dict):
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
