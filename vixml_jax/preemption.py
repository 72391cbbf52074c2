"""SIGTERM: what a scheduler sends some time before it takes a machine away.

Between two steps of training it is put off until the step is done, so that all can be saved; of several
processes that get it at different moments, or not at all, every one stops after the same step. Anywhere else
there is nothing to save that is not on disk, and the process ends at once.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

from vixml_jax.errors import Preempted


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Turns SIGTERM into `Preempted` within the block.

    Of several processes it does nothing: there JAX notices SIGTERM, and `put_off` asks JAX.
    """

    def stop(*_: int | FrameType | None) -> None:
        raise Preempted("interrupted by SIGTERM; the same command continues")

    with _handler(stop):
        yield


@contextlib.contextmanager
def put_off() -> Iterator[Callable[[int], bool]]:
    """Yields a function that says after a step of training whether to save and leave the block.

    It must be called after every step, in every process. SIGTERM does nothing else within the block.

    Raises:
      Preempted: at the end of the block, if SIGTERM has come.
    """
    asked = threading.Event()

    def reached(step: int) -> bool:
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            asked.set()
        return asked.is_set()

    with _handler(lambda *_: asked.set()):
        yield reached
    if asked.is_set():
        raise Preempted("stopped by SIGTERM; all is saved, the same command continues")


@contextlib.contextmanager
def _handler(handle: Callable[..., None]) -> Iterator[None]:
    """Handles SIGTERM within the block; only the main thread of a process that runs alone can."""
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
