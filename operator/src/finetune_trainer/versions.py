"""Versions of what is installed, for records of what made something."""

from __future__ import annotations

import importlib.metadata


def read_version(package: str) -> str:
    """Return the version of an installed package; empty where it is not installed as one, as ours in its image."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
