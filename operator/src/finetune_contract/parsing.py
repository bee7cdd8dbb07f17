"""Between dataclasses and JSON, by their annotations: nothing unknown is guessed at. Pure."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

SENT_IF_SET: Mapping[str, Any] = {"sentIfSet": True}
"""Marks a field that came later: `to_plain` leaves it out while it has its default, so that images that do not know it
go on, and digests of settings stay what they were."""


class RunConfigError(ValueError):
    """The JSON is not a run configuration of this version; the message names the field."""


def parse(wanted: Any, value: Any, path: str) -> Any:
    """Turn parsed JSON into the annotated type; `path` names the value in errors. Raises RunConfigError."""
    if dataclasses.is_dataclass(wanted):
        return _parse_dataclass(wanted, value, path)
    origin = typing.get_origin(wanted)
    if origin is tuple:
        if not isinstance(value, list):
            raise RunConfigError(f"{path}: expected a list, found {value!r}")
        item = typing.get_args(wanted)[0]
        return tuple(parse(item, element, f"{path}[{index}]") for index, element in enumerate(value))
    if origin in (Mapping, dict) or isinstance(origin, types.GenericAlias):
        if not isinstance(value, dict):
            raise RunConfigError(f"{path}: expected an object, found {value!r}")
        return value
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is not Any and (not isinstance(value, wanted) or (wanted is int and isinstance(value, bool))):
        raise RunConfigError(f"{path}: expected {wanted.__name__}, found {value!r}")
    return value


def _parse_dataclass(wanted: Any, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise RunConfigError(f"{path}: expected an object, found {value!r}")
    hints = typing.get_type_hints(wanted)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise RunConfigError(f"{path}.{unknown[0]}: unknown field; is the image older than the operator?")
    required = {
        field.name
        for field in dataclasses.fields(wanted)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(value))
    if missing:
        raise RunConfigError(f"{path}.{missing[0]}: missing")
    return wanted(**{name: parse(hints[name], item, f"{path}.{name}") for name, item in value.items()})


def to_plain(value: Any) -> Any:
    """Return settings as what JSON knows: as `dataclasses.asdict`, but for the fields that are sent only if set."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: (field, getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {
            name: to_plain(item)
            for name, (field, item) in fields.items()
            if not ("sentIfSet" in field.metadata and item == field.default)
        }
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value
