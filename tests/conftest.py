"""Options of every rung."""

from __future__ import annotations


def pytest_addoption(parser):
    parser.addoption(
        "--update-test-data",
        action="store_true",
        help="rewrite the golden files under tests/data from what the code makes",
    )
