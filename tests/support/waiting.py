"""Wait for a condition with a deadline: what tests do instead of sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def eventually(
    look: Callable[[], Value | None], *, within: float, otherwise: Callable[[], str] | str = "", every: float = 0.3
) -> Value:
    """Return the first truthy value of `look`. Raises AssertionError with `otherwise` when none came in time."""
    deadline = time.monotonic() + within
    while True:
        value = look()
        if value:
            return value
        if time.monotonic() > deadline:
            detail = otherwise() if callable(otherwise) else otherwise
            raise AssertionError(f"not so within {within:.0f} s: {detail or look}")
        time.sleep(every)
