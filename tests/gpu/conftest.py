"""Needs GPUs; skipped without one."""

import pathlib
import shutil
import subprocess

import pytest


def count_gpus():
    """Return how many GPUs the driver lists."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(("nvidia-smi", "-L"), check=False, capture_output=True, text=True)
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0


def pytest_collection_modifyitems(items):
    has_gpu = count_gpus() > 0
    for item in items:
        if pathlib.Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not has_gpu:
                item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))


@pytest.fixture(scope="session")
def num_gpus():
    return count_gpus()
