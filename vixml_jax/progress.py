"""Progress of long work: a bar with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from types import TracebackType

from tqdm import tqdm

PLAIN_LINE_SECONDS = 10.0
ANNOUNCED_SECONDS = 1.0

_muted = False


def mute() -> None:
    """Shows no progress from here on: of several processes one does."""
    global _muted
    _muted = True


class Progress:
    """Counts `total` units of work and shows how many are done, how fast, and the time left.

    A total of None is not known beforehand; a title of None shows nothing.

    Use as a context manager and call `update(n, **figures)` as work is done; figures (loss, ...) stand
    behind the bar. On a terminal it is a tqdm bar; elsewhere one line every ten seconds and one at the end.
    """

    def __init__(self, total: int | None, title: str | None, unit: str = "rows", initial: int = 0):
        self.total, self.title, self.unit, self.done, self.initial = total, title, unit, initial, initial
        self._started = self._last_line = time.monotonic()
        self._figures: dict[str, float | str] = {}
        self._bar = None
        if title is not None and sys.stderr.isatty() and not _muted:
            self._bar = tqdm(total=total, desc=title, unit=f" {unit}", initial=initial, dynamic_ncols=True)

    def update(self, n: int = 1, **figures: float | str) -> None:
        """Adds `n` finished units; `figures` replace those shown before."""
        self.done += n
        self._figures.update(figures)
        if self._bar is not None:
            if figures:
                self._bar.set_postfix({k: _short(v) for k, v in figures.items()}, refresh=False)
            self._bar.update(n)
        elif self.title is not None and time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._line()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self.title is not None:
            self._line(ended=True)

    def _line(self, ended: bool = False) -> None:
        self._last_line = time.monotonic()
        if _muted:
            return
        seconds = max(self._last_line - self._started, 1e-9)
        rate = (self.done - self.initial) / seconds
        total = self.done if self.total is None and ended else self.total
        figures = "".join(f"  {k} {_short(v)}" for k, v in self._figures.items())
        timing = _clock(seconds)
        if total is None:
            timing += " so far"
        elif self.done < total:
            left = (total - self.done) / rate if rate else float("inf")
            timing = f"{timing} so far, {_clock(left)} left"
        of = "" if total is None else f"/{total:,}"
        print(
            f"{self.title}: {self.done:,}{of} {self.unit}  {rate:,.1f}/s  {timing}{figures}",
            file=sys.stderr,
            flush=True,
        )


@contextlib.contextmanager
def announced(title: str) -> Iterator[None]:
    """Says what is under way where its length is not known, and how long it took.

    On a terminal at once; elsewhere at the end, and nothing of what takes less than a second.
    """
    started = time.monotonic()
    terminal = sys.stderr.isatty()
    if terminal:
        print(f"{title} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if terminal:
            print("\r\033[K", end="", file=sys.stderr)
    if (seconds := time.monotonic() - started) >= ANNOUNCED_SECONDS:
        print(f"{title}: {_clock(seconds)}", file=sys.stderr, flush=True)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _clock(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
