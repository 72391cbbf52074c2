"""Memory of the host: what one computation frees is kept for the next."""

from __future__ import annotations

import ctypes

# <malloc.h> of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed() -> None:
    """Tells malloc to keep all that is freed, where it is glibc's; elsewhere nothing changes.

    On CPUs XLA asks for the scratch memory of a program at every call, hundreds of MB for a training step.
    glibc maps so large a piece anew each time, and the system hands it out page by page, cleared first: a
    fifth of the processor time of a step of MiniLM. From here on the process holds on to the most that it
    ever used.

    To be called before threads are started: those that have a heap of their own keep it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl, macOS
        return
    for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
        mallopt(parameter, value)
