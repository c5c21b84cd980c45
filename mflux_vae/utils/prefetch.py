"""Run a function over items ahead of the consumer, in threads: read images while a device computes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], *, limit: int | None = None, threads: int | None = None
) -> Iterator[Result]:
    """Yield `function(item)` for each item, in order.

    An exception is raised in place of its result. After that, an interrupt or an early stop of the consumer, no new
    item is started, and running ones are not waited for.

    Args:
        function: must be thread-safe. A gain needs work that releases the GIL, such as Pillow's decoders, resampling
            and hashing.
        limit: number of results that are computed or waiting (None: two per thread).
        threads: number of threads (None: one per core).
    """
    threads = threads or os.cpu_count() or 1
    limit = limit or 2 * threads
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > limit:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
