"""What the benchmarks share: a stopwatch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def timed(function: Callable[[], Result]) -> tuple[float, Result]:
    """Returns seconds and result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result
