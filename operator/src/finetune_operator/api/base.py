"""What every model of the API shares: naming, strictness, and rules that pydantic and the API server judge alike.

A `Rule` is written once and used twice: its CEL expression goes into the CRD, its Python predicate is run by pydantic,
and both give the same message. Nothing here knows a field of the API.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pydantic
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


@dataclasses.dataclass(frozen=True)
class Rule:
    """One validation rule, for a model (in `Model.validations`) or for a scalar (in `Annotated`)."""

    cel: str
    """The rule as the API server evaluates it; `self` is the value."""
    message: str
    """What is wrong and what to type instead."""
    holds: Callable[[Any], bool] | None = None
    """The same rule in Python. None for a rule on the change of an object, which only the API server can judge."""
    field: str = ""
    """Field at fault, relative to the value, in camelCase: `lora`, `retentionPolicy.whenDeleted`."""

    def to_schema(self) -> dict[str, Any]:
        """Return the rule as an entry of x-kubernetes-validations."""
        entry = {"rule": self.cel, "message": self.message}
        return entry | {"fieldPath": f".{self.field}"} if self.field else entry

    def apply(self, value: Any) -> Any:
        """Return the value; raise the error that pydantic collects when the rule does not hold."""
        if self.holds is not None and not self.holds(value):
            raise PydanticCustomError("rule", "{message}", {"message": self.message, "field": self.field})
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: pydantic.GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.apply, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: pydantic.GetJsonSchemaHandler
    ) -> dict[str, Any]:
        result = handler(schema)
        result["x-kubernetes-validations"] = [*result.get("x-kubernetes-validations", ()), self.to_schema()]
        return result


def matching(pattern: str, message: str) -> Rule:
    """Return a rule on a string: the whole of it matches the regular expression."""
    compiled = re.compile(pattern)
    cel_pattern = f"^(?:{pattern})$".replace("\\", "\\\\").replace("'", "\\'")
    return Rule(f"self.matches('{cel_pattern}')", message, lambda text: compiled.fullmatch(text) is not None)


class Model(pydantic.BaseModel):
    """Base of every model of the spec: camelCase in YAML, snake_case in Python, unknown fields refused."""

    model_config = pydantic.ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        extra="forbid",
        strict=True,
        frozen=True,
        use_attribute_docstrings=True,
    )

    validations: ClassVar[tuple[Rule, ...]] = ()
    """Rules across the fields of this model."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        """Treat null as absent, as the API server does for fields that are not nullable."""
        if isinstance(value, Mapping):
            return {key: item for key, item in value.items() if item is not None}
        return value

    @pydantic.model_validator(mode="after")
    def _apply_rules(self) -> Model:
        for rule in self.validations:
            rule.apply(self)
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: pydantic.GetJsonSchemaHandler) -> dict[str, Any]:
        result = handler(schema)
        if cls.validations:
            own = handler.resolve_ref_schema(result)
            own["x-kubernetes-validations"] = [rule.to_schema() for rule in cls.validations]
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return the object as it stands in YAML: camelCase, JSON types, without absent fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class StatusModel(Model):
    """Base of every model of the status. Unknown fields are ignored: another release may have written them."""

    model_config = pydantic.ConfigDict(extra="ignore")


def explain_problems(error: pydantic.ValidationError, model: type[pydantic.BaseModel]) -> list[str]:
    """Return one line per problem: the field's path as in YAML, what is wrong, and the nearest name for a typo."""
    return [_explain(problem, model) for problem in error.errors(include_url=False)]


def _explain(problem: Any, model: type[pydantic.BaseModel]) -> str:
    location = [part for part in problem["loc"] if isinstance(part, int) or not part.startswith(("function-", "lax-"))]
    field = problem.get("ctx", {}).get("field") if problem["type"] == "rule" else ""
    path = _to_path([*location, *([field] if field else [])])
    if problem["type"] == "extra_forbidden":
        names = _list_field_names(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.6)
        return f"{path}: unknown field" + (f"; did you mean {near[0]}?" if near else "")
    if problem["type"] == "missing":
        return f"{path}: required, but missing"
    return f"{path}: {problem['msg']}".removeprefix(": ")


def _to_path(location: list[Any]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")


def _list_field_names(model: type[pydantic.BaseModel], location: list[Any]) -> list[str]:
    """Return the camelCase field names of the model at `location` below `model`; empty when it is no model."""
    schema = model.model_json_schema(by_alias=True)
    node: Any = schema
    for part in [None, *location]:
        if part is not None:
            node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, {})
        for option in node.get("anyOf", ()):
            if option.get("type") != "null":
                node = option
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].removeprefix("#/$defs/")]
    return list(node.get("properties", ()))
