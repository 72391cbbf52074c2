"""Memory of the host: what one computation frees is kept for the next, within bounds."""

from __future__ import annotations

import ctypes
import math
import os
import threading
import time
from pathlib import Path

# <malloc.h> of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

# From this share of the machine's memory on, what is kept and not in use goes back to the system.
SHARE = 0.25
SECONDS_BETWEEN_LOOKS = 1.0
# Memory that has grown as large again by then is in use.
SECONDS_TO_GROW_AGAIN = 10.0

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def keep_freed() -> None:
    """Tells malloc to keep what is freed, where it is glibc's; elsewhere nothing changes.

    On CPUs XLA asks for the scratch memory of a program at every call, hundreds of MB for a training step.
    glibc maps so large a piece anew each time, and the system hands it out page by page, cleared first: a
    fifth of the processor time of a step of MiniLM.

    What is kept is soon in pieces, where programs of several shapes need scratch memory of several sizes: a
    run that needs 4 GB has held 15. So a thread looks at what the process has, and past a share of the
    machine's memory hands back all that is free.

    To be called before threads are started: those that have a heap of their own keep it.
    """
    libc = ctypes.CDLL(None)
    mallopt, trim = getattr(libc, "mallopt", None), getattr(libc, "malloc_trim", None)
    if mallopt is None or trim is None:  # musl, macOS
        return
    for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
        mallopt(parameter, value)

    def watch() -> None:
        limit = Limit(SHARE * machine_bytes())
        while True:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            if limit.is_passed(resident_bytes(), time.monotonic()):
                trim(0)

    threading.Thread(target=watch, name="kept memory", daemon=True).start()


class Limit:
    """Says when memory goes back: past so many bytes, which become more where they prove to be in use."""

    def __init__(self, limit: float):
        self._bytes, self._since = limit, -math.inf

    def is_passed(self, resident: int, now: float) -> bool:
        """Whether a process of `resident` bytes gives back what is free; `now` in seconds, of any clock."""
        if resident < self._bytes:
            return False
        if now - self._since < SECONDS_TO_GROW_AGAIN:
            self._bytes *= 1.5
        self._since = now
        return True


def resident_bytes() -> int:
    """Memory that the process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def machine_bytes() -> int:
    """Memory of the machine, or of the container."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(physical, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit: "max"
        return physical
