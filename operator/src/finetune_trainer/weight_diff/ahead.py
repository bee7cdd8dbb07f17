"""A function applied to items by threads, a few items ahead of the one that is asked for, in order."""

from __future__ import annotations

import collections
import concurrent.futures
import os
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_AHEAD = 4
"""Items in memory at once."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def map_ahead(function: Callable[[Item], Answer], items: Iterable[Item]) -> Iterator[Answer]:
    """Yield `function(item)` in the order of the items; what it raises is raised here."""
    waiting: collections.deque[concurrent.futures.Future[Answer]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) - 1)) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
