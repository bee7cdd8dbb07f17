"""A function applied to items by threads, a few items ahead of the one that is asked for, in order."""

from __future__ import annotations

import collections
import concurrent.futures
import os
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_MAX_THREADS = 8
_AHEAD = 2
"""Items in memory at once, for each thread."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def map_ahead(function: Callable[[Item], Answer], items: Iterable[Item]) -> Iterator[Answer]:
    """Yield `function(item)` in the order of the items; what it raises is raised here."""
    waiting: collections.deque[concurrent.futures.Future[Answer]] = collections.deque()
    # Whoever asks waits most of the time, so that a thread for each processor is not one too many.
    num_threads = min(os.cpu_count() or 2, _MAX_THREADS)
    with concurrent.futures.ThreadPoolExecutor(max_workers=num_threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= _AHEAD * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
