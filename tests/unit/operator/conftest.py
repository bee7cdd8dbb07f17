"""Goldens: whole objects in YAML files, compared field by field; --update-test-data rewrites them."""

from __future__ import annotations

import json
import pathlib

import pytest
import yaml

DATA = pathlib.Path(__file__).parents[2] / "data" / "manifests"


@pytest.fixture
def assert_golden(request):
    """Compare objects with the golden of this name."""

    def check(name: str, *objects: dict) -> None:
        path = DATA / f"{name}.yaml"
        # As the API server sees them: enumerations are their texts.
        plain = json.loads(json.dumps(objects))
        text = "---\n".join(yaml.safe_dump(each, sort_keys=True, width=120) for each in plain)
        if request.config.getoption("--update-test-data"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        wanted = list(yaml.safe_load_all(path.read_text())) if path.exists() else []
        assert list(yaml.safe_load_all(text)) == wanted, (
            f"{path.name} differs: pytest --update-test-data, and read the diff"
        )

    return check
