"""Real vLLM on CPUs, and pods of an endpoint on it."""

from __future__ import annotations

import pathlib

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if pathlib.Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)
