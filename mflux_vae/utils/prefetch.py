"""Work that runs ahead of the one who waits for it, in threads: reading pictures while a device computes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, limit: int | None = None, threads: int | None = None
) -> Iterator[Result]:
    """`function` of each item, in the items' order.

    An error of the function is raised in its result's place; then, as after an interrupt or when the caller stops
    early, nothing new is begun and nothing is waited for.

    Args:
        function: must be safe to call from several threads; it helps where it spends its time outside of Python,
            as Pillow's decoders, resampling and hashes do.
        limit: so many results are in the making, or wait, while the caller works on one; None for two to a thread.
        threads: None for one to a core.
    """
    threads = threads or os.cpu_count() or 1
    limit = limit or 2 * threads
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
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
