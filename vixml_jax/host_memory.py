"""Memory of the host in huge pages: the system hands out 2 MB at a time where it would hand out 4 KB."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Begins the process anew with a malloc that asks for huge pages, where system and glibc have them.

    On CPUs XLA asks for the scratch memory of a program at every call, GBs for a training step, and glibc
    maps so large a piece anew each time: the system hands it out page by page, cleared first. Pages of 2 MB
    are 512 times fewer. malloc reads its settings as a process starts, so that the process replaces itself:
    same number, same arguments. Nothing happens where that is done already, and where it cannot be.

    To be called before anything else; only where the process is ours.
    """
    tunables = os.environ.get(_TUNABLES, "")
    if _HUGE_PAGES in tunables or not _are_there():
        return
    os.environ[_TUNABLES] = ":".join(filter(None, [tunables, f"{_HUGE_PAGES}=1"]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _are_there() -> bool:
    """Whether the system has huge pages for those who ask, and malloc knows how to: Linux with glibc 2.35."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        settings = _SYSTEM.read_text()
    except (AttributeError, ValueError, OSError):  # musl, macOS, Windows; a kernel without them
        return False
    return (
        name == "glibc"
        and tuple(map(int, version.split(".")[:2])) >= (2, 35)
        and "[never]" not in settings
        and bool(sys.executable)
    )
