"""What the benchmarks share: a stopwatch, runs in turn, and how figures are shown and kept."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from vixml_jax import files

Result = TypeVar("Result")


def timed(function: Callable[[], Result]) -> tuple[float, Result]:
    """Returns seconds and result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def in_turn(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Runs all functions one after the other, `rounds` times: what slows the machine down meets each of them.

    Returns:
      The seconds of each function's runs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(timed(function)[0])
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Returns the median of each."""
    return {name: statistics.median(runs) for name, runs in seconds.items()}


def ratio(slow: list[float], fast: list[float]) -> float:
    """How often the runs of `fast` fit those of `slow`: the median over the rounds, each taken by itself."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def machine() -> dict[str, Any]:
    """Returns what figures depend on: processor, cores, date."""
    return {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
    }


def report(figures: Mapping[str, Any], out: str | None) -> None:
    """Prints figures, a line each, and writes them with the machine's to the JSON file `out`, if given."""
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:{width}}  {value:.4g}" if isinstance(value, float) else f"{name:{width}}  {value}")
    if out:
        files.write_json(out, {**machine(), **figures})
