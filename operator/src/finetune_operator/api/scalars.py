"""Scalar types of the API: bounded strings, quantities, URLs, times. Each says in its message what to type instead."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from finetune_operator.api.base import Rule, matching
from finetune_operator.api.patterns import is_pattern

Text = Annotated[str, Field(max_length=1024)]
"""Free text of one line."""

Name = Annotated[
    str,
    Field(min_length=1, max_length=253),
    matching(
        "[a-z0-9]([-a-z0-9.]*[a-z0-9])?",
        "use lower-case letters, digits, '-' and '.', starting and ending with a letter or digit",
    ),
]
"""Name of a Kubernetes object."""

DnsLabel = Annotated[
    str,
    Field(min_length=1, max_length=45),
    matching(
        "[a-z]([-a-z0-9]*[a-z0-9])?",
        "use lower-case letters, digits and '-', starting with a letter and ending with a letter or digit",
    ),
]
"""Name from which a Service is named."""

SourceUrl = Annotated[
    str,
    Field(max_length=2048),
    matching(
        "(hf|s3|https|pvc)://[^\\s]+",
        "start with hf:// (a hub repository), s3:// (bucket and key), https:// or pvc:// (a path on the workspace)",
    ),
]
"""Where a model or a data set is read from."""

DestinationUrl = Annotated[
    str,
    Field(max_length=2048),
    matching(
        "(s3|pvc|hf)://[^\\s]+", "start with s3:// (bucket and prefix), pvc:// (a path on the workspace) or hf://"
    ),
]
"""Where a promoted model is copied to."""

S3Url = Annotated[
    str,
    Field(max_length=2048),
    matching("s3://[^/\\s]+/[^\\s]+", "write s3://, a bucket and a prefix, as in s3://bucket/checkpoints"),
]
"""A bucket and a prefix in object storage."""

Revision = Annotated[str, Field(max_length=256)]
"""Branch, tag, commit or object version."""

LogPattern = Annotated[
    str,
    Field(min_length=1, max_length=512),
    Rule(
        # RE2 itself judges: a pattern that it does not take makes the evaluation of the rule fail.
        "[''.matches(self)].size() == 1",
        "write a regular expression of RE2, without look-around and back-references, as in NCCL (error|timeout)",
        is_pattern,
    ),
]
"""A regular expression, matched line by line."""

RelativePath = Annotated[
    str,
    Field(max_length=512),
    Rule(
        "!self.startsWith('/') && !self.split('/').exists(part, part == '..')",
        "use a relative path without '..', as in team-a/support-7b",
        lambda path: not path.startswith("/") and ".." not in path.split("/"),
    ),
]
"""A folder below the root of a volume."""

_QUANTITY = r"[0-9]+(\.[0-9]+)?(m|k|[MGTPE]|[KMGTPE]i)?"


class _IntOrString:
    """Makes the schema of `int | str` the one that Kubernetes has for it."""

    @staticmethod
    def __get_pydantic_json_schema__(schema: Any, handler: pydantic.GetJsonSchemaHandler) -> dict[str, Any]:
        result = handler(schema)
        for key in ("anyOf", "enum", "type"):
            result.pop(key, None)
        return result | {"x-kubernetes-int-or-string": True, "maxLength": 32}


_quantity = matching(_QUANTITY, "not a quantity: write a number with a unit, as in 500m, 8 or 64Gi")

Quantity = Annotated[
    int | str,
    _IntOrString,
    Rule(
        f"type(self) == int ? int(self) >= 0 : string(self).{_quantity.cel.removeprefix('self.')}",
        _quantity.message,
        lambda value: _quantity.holds is not None and _quantity.holds(str(value)),
    ),
]
"""An amount of CPU, memory or devices."""

VolumeSize = Annotated[
    str,
    Field(max_length=32),
    matching(
        r"auto|[0-9]+(\.[0-9]+)?(k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)",
        "write auto, or a number with a unit, as in 500Gi or 1Ti",
    ),
]
"""Size of the workspace."""

ZeroStage = Annotated[
    Literal["auto", 1, 2, 3],
    _IntOrString,
    Rule(
        "type(self) == int ? int(self) >= 1 && int(self) <= 3 : string(self) == 'auto'",
        "write auto, 1, 2 or 3",
        lambda value: True,
    ),
]
"""ZeRO stage of DeepSpeed."""

Timestamp = Annotated[
    dt.datetime,
    Field(strict=False),
    pydantic.AfterValidator(lambda time: time.astimezone(dt.UTC).replace(microsecond=0)),
]
"""A point in time, in whole seconds."""


def _shorten(limit: int) -> pydantic.BeforeValidator:
    """Return a validator that cuts a text in its middle: a status that is too long would not be written at all."""

    def cut(value: Any) -> Any:
        if not isinstance(value, str) or len(value) <= limit:
            return value
        half = (limit - 5) // 2
        return f"{value[:half]} ... {value[-half:]}"

    return pydantic.BeforeValidator(cut)


StatusText = Annotated[str, Field(max_length=1024), _shorten(1024)]
"""One line of the status."""

StatusMessage = Annotated[str, Field(max_length=4096), _shorten(4096)]
"""A message of the status, with the last lines of a log where they help."""
