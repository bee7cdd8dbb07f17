"""Turns pydantic's JSON schema into the structural schema that a CustomResourceDefinition needs. Pure; used by crd.py.

The differences: references are inlined, a field that may be absent is not nullable, unknown fields are refused by
pruning instead of `additionalProperties: false`, and nested defaults stand where the nested field is.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_DROPPED = ("title", "$defs")


def build_structural_schema(json_schema: Schema) -> Schema:
    """Return the structural schema of a pydantic model's JSON schema."""
    return _convert(json_schema, json_schema.get("$defs", {}))


def _convert(schema: Schema, definitions: Schema) -> Schema:
    schema = _merge_reference(_merge_optional(schema), definitions)
    result = {key: value for key, value in schema.items() if key not in _DROPPED}
    if "description" in result:
        result["description"] = " ".join(result["description"].split())
    if "const" in result:
        result["enum"] = [result.pop("const")]
    for bound in ("minimum", "maximum"):
        _convert_exclusive(result, bound)
    if "properties" in result:
        result["properties"] = {name: _convert(item, definitions) for name, item in result["properties"].items()}
    if "items" in result:
        result["items"] = _convert(result["items"], definitions)
    _convert_additional_properties(result, definitions)
    _convert_default(result)
    return result


def _merge_optional(schema: Schema) -> Schema:
    """Replace `anyOf [X, null]` by X: the API server drops nulls before it validates."""
    options = [option for option in schema.get("anyOf", ()) if option.get("type") != "null"]
    if not options:
        return schema
    if len(options) > 1:
        raise ValueError(f"no structural schema for a union: {schema}")
    outer = {key: value for key, value in schema.items() if key != "anyOf"}
    merged: Schema = options[0] | outer
    return merged


def _merge_reference(schema: Schema, definitions: Schema) -> Schema:
    """Inline a reference; what the field says itself, such as its description, wins over the model's own words."""
    reference = schema.get("$ref")
    if reference is None:
        return schema
    outer = {key: value for key, value in schema.items() if key != "$ref"}
    merged: Schema = definitions[reference.removeprefix("#/$defs/")] | outer
    return merged


def _convert_exclusive(result: Schema, bound: str) -> None:
    """Write an exclusive bound as Kubernetes' older JSON schema does: the bound, and a flag beside it.

    Lower bounds of float fields are whole numbers, exclusive where need be: the API server cuts a fractional bound to a
    whole number when it compares it with a value that is written as an integer.
    """
    key = f"exclusive{bound.capitalize()}"
    if key in result:
        result[bound], result[key] = result[key], True


def _convert_additional_properties(result: Schema, definitions: Schema) -> None:
    extra = result.pop("additionalProperties", None)
    if isinstance(extra, dict):
        result["additionalProperties"] = _convert(extra, definitions)
    elif extra is True:
        result["x-kubernetes-preserve-unknown-fields"] = True


def _convert_default(result: Schema) -> None:
    """Drop defaults that say nothing, and leave those of a nested object to its own fields."""
    default = result.get("default")
    if default is None or default in ([], ""):
        result.pop("default", None)
    elif isinstance(default, dict):
        result.pop("default")
        if "properties" in result and _has_defaults(result):
            result["default"] = {}


def _has_defaults(schema: Schema) -> bool:
    return any("default" in item for item in schema["properties"].values())
