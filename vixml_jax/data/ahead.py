"""Work done by threads some items ahead of whoever uses the results."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def mapped_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, per_thread: int = 4
) -> Iterator[Result]:
    """Yields `function(item)` for every item, in order.

    Items are drawn by the caller's thread, and a bounded number ahead: unlike `Executor.map`, it takes an
    iterable of any length.

    Args:
      function: called in threads.
      items: what it is called with.
      per_thread: items that are drawn ahead, times the number of processors.
    """
    workers = os.cpu_count() or 1
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > per_thread * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # an error here should not wait for work that nobody wants
