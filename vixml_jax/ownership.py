"""One run a workdir: a file in it names the run that owns it, and a second run is refused.

The file `owner.json` holds host, process and time, and is touched while its run lives. So an owner is dead
when its process is gone, on the same host, or, on any other, when its file has not been touched for long;
ages are taken by the file system's own clock. What a dead owner has left is taken over.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vixml_jax import distributed, files
from vixml_jax.errors import UserError

OWNER = "owner.json"
TOUCH_SECONDS = 20.0
DEAD_SECONDS = 300.0


@contextlib.contextmanager
def owned(workdir: Path) -> Iterator[None]:
    """Makes this run the owner of `workdir` until the end of the block; its lead holds it for all processes.

    Raises:
      UserError: if another run owns it, naming that.
    """
    distributed.on_lead(lambda: take(workdir))
    if not distributed.is_lead():
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_touch, args=(workdir / OWNER, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        release(workdir)


def take(workdir: Path) -> None:
    """Makes this process the owner of `workdir`; see `owned`."""
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / OWNER
    with _one_at_a_time(workdir):
        if path.exists():
            owner = _read(path)
            if not _is_own(owner) and _lives(owner, path):
                raise UserError(
                    f"another run has owned it since {owner.get('since', '?')}: "
                    f"process {owner.get('process', '?')} on {owner.get('host', '?')}",
                    file=workdir,
                    fix=f"wait for it, stop it, or give another --workdir; if it is gone, delete {OWNER}",
                )
            logging.info("%s: taken over from a run that is gone: %s", workdir, owner)
        files.write_json(path, {**_self(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})


def release(workdir: Path) -> None:
    """Gives `workdir` up, if this process still owns it; removes it if nothing else is in it."""
    with _one_at_a_time(workdir):
        if (workdir / OWNER).exists() and _is_own(_read(workdir / OWNER)):
            (workdir / OWNER).unlink()
            with contextlib.suppress(OSError):
                workdir.rmdir()


def _lives(owner: dict[str, Any], path: Path) -> bool:
    if owner.get("host") == socket.gethostname() and isinstance(owner.get("process"), int):
        return owner.get("started") == _started(owner["process"])
    return _age(path) < DEAD_SECONDS


def _self() -> dict[str, Any]:
    process = os.getpid()
    return {
        "host": socket.gethostname(),
        "process": process,
        "started": _started(process),
        "command": " ".join(sys.argv),
    }


def _is_own(owner: dict[str, Any]) -> bool:
    return {**owner, **_self()} == owner


def _read(path: Path) -> dict[str, Any]:
    try:
        owner = files.read_json(path)
    except UserError:  # cut off, or gone since
        return {}
    return owner if isinstance(owner, dict) else {}


def _started(process: int) -> str | None:
    """When a process of this host started, as its system counts; None where there is none of this number.

    A number is given again, after a restart even soon.
    """
    try:
        # The name, in brackets, may hold anything; the start is the 20th field after it.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:  # no /proc: whether it lives is all there is to know
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"


def _age(path: Path) -> float:
    """Seconds since `path` was touched, by the clock of its file system."""
    with tempfile.TemporaryFile(dir=path.parent) as now:
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime


def _touch(path: Path, stop: threading.Event) -> None:
    while not stop.wait(TOUCH_SECONDS):
        try:
            if not _is_own(_read(path)):
                logging.warning("%s: another run has taken over, since this one looked dead", path)
                return
            os.utime(path)
        except OSError as error:
            logging.warning("%s: %s", path, error)


@contextlib.contextmanager
def _one_at_a_time(workdir: Path) -> Iterator[None]:
    """Keeps the other processes that look at the owner's file waiting."""
    handle = os.open(workdir, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
