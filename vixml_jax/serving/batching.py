"""Concurrent requests into batches: one worker, a bounded queue.

While a batch is computed the queue fills, and the next batch takes what is there; only a worker that is idle
waits a moment for company. So a lone request is not slowed down, and many share the cost of a call.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

Query = TypeVar("Query")
Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


class Full(Exception):
    """The queue has no room: try again later."""


class Batcher(Generic[Query, Answer]):
    """Answers queries in batches.

    `start` and `stop` frame its life, on the event loop that `ask` runs on.

    Args:
      answer: answers a batch, in order; runs in a thread of its own, one batch at a time.
      max_batch: most queries of a batch.
      max_wait: seconds that an idle worker waits for more queries after the first.
      max_queue: queries that may wait; more are refused.
      on_batch: called with the size of every batch.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Query]], Sequence[Answer]],
        *,
        max_batch: int,
        max_wait: float,
        max_queue: int,
        on_batch: Callable[[int], Any] = lambda _: None,
    ):
        self._answer, self._max_batch, self._max_wait = answer, max_batch, max_wait
        self._on_batch = on_batch
        self._queue: asyncio.Queue[tuple[Query, asyncio.Future[Answer]]] = asyncio.Queue(max_queue)
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "predict")

    def start(self) -> None:
        """Begins to answer."""
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Ends; what waits is refused."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        while not self._queue.empty():
            _, future = self._queue.get_nowait()
            if not future.done():
                future.set_exception(Full())
        self._thread.shutdown()

    @property
    def waiting(self) -> int:
        """Queries in the queue."""
        return self._queue.qsize()

    async def ask(self, query: Query) -> Answer:
        """Returns the answer to a query.

        Raises:
          Full: if too many queries wait already.
          Exception: what `answer` raised on the query's batch.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        try:
            self._queue.put_nowait((query, future))
        except asyncio.QueueFull:
            raise Full from None
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [item for item in await self._gather() if not item[1].done()]  # else its client has left
            if not batch:
                continue
            try:
                self._on_batch(len(batch))
                answers = await loop.run_in_executor(
                    self._thread, self._answer, [query for query, _ in batch]
                )
                answered = list(zip(batch, answers, strict=True))
            except asyncio.CancelledError:
                for _, future in batch:
                    future.cancel()
                raise
            except Exception as error:
                # A bug, or the machine's memory: the queries of this batch fail, the service goes on.
                logger.exception("a batch of %d queries failed", len(batch))
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in answered:
                if not future.done():
                    future.set_result(answer)

    async def _gather(self) -> list[tuple[Query, asyncio.Future[Answer]]]:
        batch = [await self._queue.get()]
        deadline = asyncio.get_running_loop().time() + self._max_wait
        while len(batch) < self._max_batch:
            if self._queue.empty():
                left = deadline - asyncio.get_running_loop().time()
                if left <= 0:
                    break
                try:
                    batch.append(await asyncio.wait_for(self._queue.get(), left))
                except TimeoutError:
                    break
            else:
                batch.append(self._queue.get_nowait())
        return batch
