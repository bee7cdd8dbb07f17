"""The generated CustomResourceDefinition: fresh, described, bounded, structural."""

from __future__ import annotations

import json

import pytest

from finetune_operator.api import crd, v1alpha1
from tests.support.manifests import REPOSITORY

MAX_CLIENT_SIDE_APPLY_BYTES = 262144


def walk(schema, path=""):
    """Yield every schema below this one with its path."""
    yield path, schema
    for name, item in schema.get("properties", {}).items():
        yield from walk(item, f"{path}.{name}")
    if "items" in schema:
        yield from walk(schema["items"], f"{path}[]")
    if "additionalProperties" in schema:
        yield from walk(schema["additionalProperties"], f"{path}{{}}")


SCHEMA = crd.build_schema()
GENERATED = crd.build_files()
NODES = [(path, node) for path, node in walk(SCHEMA) if path and path != ".metadata"]


@pytest.mark.parametrize("path", sorted(GENERATED))
def test_generated_files_are_fresh(path):
    assert (REPOSITORY / path).read_text() == GENERATED[path], "run: make generate"


def test_every_property_is_described_in_a_sentence():
    bare = [
        path
        for path, node in NODES
        if not path.endswith(("[]", "{}")) and not node.get("description", "").endswith((".", "finetune.dev/v1alpha1"))
    ]
    assert bare == []


def test_every_string_list_and_map_is_bounded():
    unbounded = []
    for path, node in NODES:
        kind = node.get("type")
        if path in (".apiVersion", ".kind") or "enum" in node or node.get("format") == "date-time":
            continue
        if (kind == "string" or node.get("x-kubernetes-int-or-string")) and "maxLength" not in node:
            unbounded.append(path)
        if kind == "array" and "maxItems" not in node:
            unbounded.append(path)
        if kind == "object" and "properties" not in node and "maxProperties" not in node:
            unbounded.append(path)
    assert unbounded == []


def test_every_number_of_the_spec_is_bounded_and_no_lower_bound_is_a_fraction():
    for path, node in NODES:
        if path.startswith(".spec") and node.get("type") in ("integer", "number"):
            assert {"minimum", "maximum"} <= set(node), path
            assert node["minimum"] == int(node["minimum"]), path


def test_the_schema_is_structural():
    for path, node in NODES:
        forbidden = {"$ref", "anyOf", "allOf", "oneOf", "title", "const", "nullable", "propertyNames"} & set(node)
        assert not forbidden, (path, forbidden)
        assert ("type" in node) != bool(node.get("x-kubernetes-int-or-string")), path
        assert not ("properties" in node and "additionalProperties" in node), path
        assert isinstance(node.get("exclusiveMinimum", True), bool), path


def test_defaults_that_do_not_depend_on_the_recipe_are_visible():
    defaults = {path: node["default"] for path, node in NODES if "default" in node and node["default"] != {}}
    assert defaults[".spec.resources.nodes"] == 1
    assert defaults[".spec.resources.gpusPerNode"] == 1
    assert defaults[".spec.workspace.size"] == "auto"
    assert defaults[".spec.checkpoint.retention.latest"] == 3
    assert defaults[".spec.checkpoint.resume"] == "LatestComplete"
    assert defaults[".spec.dataset.filter.refusals"] is True
    assert defaults[".spec.inference.enabled"] is True
    recipe = ("learningRate", "maxLength", "precision", "packing", "epochs", "perDeviceBatchSize", "warmupSteps")
    assert not [path for path in defaults if path.startswith(".spec.training.") and path.endswith(recipe)]


def test_every_section_with_defaults_defaults_itself():
    """Otherwise the API server would not fill in defaults of a section that the user left out."""
    for path, node in NODES:
        has_defaults = any("default" in item for item in node.get("properties", {}).values())
        parent = path.rpartition(".")[0]
        optional_section = (
            path.startswith(".spec.") and parent == ".spec" and path not in (".spec.model", ".spec.dataset")
        )
        if has_defaults and optional_section and not path.endswith(".pod"):
            assert node.get("default") == {}, path


def test_every_frozen_field_exists():
    for field in v1alpha1.FROZEN_FIELDS:
        section, name = field.split(".")
        assert name in SCHEMA["properties"]["spec"]["properties"][section]["properties"], field


def test_the_columns_are_those_people_look_for():
    columns = crd.build_crd()["spec"]["versions"][0]["additionalPrinterColumns"]
    assert [column["name"] for column in columns if not column.get("priority")] == [
        *("State", "Progress", "Loss", "ETA", "Restarts", "Age")
    ]
    assert [column["name"] for column in columns if column.get("priority")] == [
        *("Step", "Tokens/s", "Checkpoint", "Saved", "Goodput", "Endpoint")
    ]


def test_columns_and_selectable_fields_point_at_fields():
    paths = {path for path, _ in NODES}
    version = crd.build_crd()["spec"]["versions"][0]
    for column in version["additionalPrinterColumns"]:
        assert column["jsonPath"] in paths | {".metadata.creationTimestamp"}
    for field in version["selectableFields"]:
        assert field["jsonPath"] in paths


def test_the_definition_fits_into_a_client_side_apply():
    assert len(json.dumps(crd.build_crd())) < MAX_CLIENT_SIDE_APPLY_BYTES
