"""Pictures fetched by several threads, each with a connection of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from data_prep.addresses import Address, is_public
from data_prep.download_report import OK, Outcome
from data_prep.transfers import Client, Failed, Limits

AHEAD = 4  # downloads submitted for each thread


class PictureDownloads:
    """Fetches pictures and hands them on; close it afterwards.

    Args:
      keep: takes the bytes of a file and returns its name and size where it is kept; raises Failed for what
        is no picture. Called by several threads.
      limits: of each transfer.
      allowed: which addresses may be fetched from.
      workers: downloads at the same time.
    """

    def __init__(
        self,
        keep: Callable[[bytes], tuple[str, int]],
        limits: Limits,
        allowed: Callable[[Address], bool] = is_public,
        workers: int = 16,
    ):
        self._keep, self._limits, self._allowed, self._workers = keep, limits, allowed, workers
        self._local = threading.local()
        self._clients: list[Client] = []
        self._pool = ThreadPoolExecutor(workers)

    def __enter__(self) -> PictureDownloads:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads; what they fetch just now is finished, what waits is not begun."""
        self._pool.shutdown(cancel_futures=True)
        for client in self._clients:
            client.close()

    def outcomes(self, urls: Iterable[str]) -> Generator[Outcome, None, None]:
        """Yields what became of each URL, as it is finished; reads only so far ahead."""
        waiting: set[Future[Outcome]] = set()
        for url in urls:
            waiting.add(self._pool.submit(self._one, url))
            if len(waiting) >= AHEAD * self._workers:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)

    def _one(self, url: str) -> Outcome:
        if not hasattr(self._local, "client"):
            self._local.client = Client(self._limits, self._allowed)
            self._clients.append(self._local.client)
        try:
            return Outcome(url, OK, *self._keep(self._local.client.fetch(url)))
        except Failed as failure:
            return Outcome(url, failure.reason, again=failure.again)
