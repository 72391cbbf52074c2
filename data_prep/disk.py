"""Room on the disk: asked for before something large is written, and told in one line when it runs out."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from vixml_jax.errors import UserError

RESERVE_BYTES = 1 << 26  # of a disk that nothing here touches


def require_room(directory: Path, needed: int, what: str) -> None:
    """Raises UserError if a disk has not so many bytes free, and a little more."""
    free = shutil.disk_usage(directory).free
    if free < needed + RESERVE_BYTES:
        problem = f"{what} needs {needed / 1e9:,.2f} GB, of which {free / 1e9:,.2f} GB are free"
        raise UserError(problem, file=directory, fix="make room, or give a directory on another disk")


@contextlib.contextmanager
def may_fill_up(path: Path) -> Iterator[None]:
    """Turns the error of a full disk, which names no file, into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fix = "make room and run the same command again"
        raise UserError("the disk is full", file=path, fix=fix) from None
