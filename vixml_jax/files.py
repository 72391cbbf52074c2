"""Writing files so that nobody ever reads half of one: a temporary name first, then a rename."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vixml_jax.errors import UserError

# Temporary neighbours that nothing has touched for so long, and nobody holds, are those of a killed run.
STALE_SECONDS = 24 * 60 * 60


def check_run(workdir: Path, *written: str) -> None:
    """Makes sure that a run has been begun in a directory.

    Args:
      workdir: of the run.
      written: names of what it has written; one of them must be there.

    Raises:
      UserError: if none of them is.
    """
    if not any((workdir / name).exists() for name in written):
        raise UserError("not a run's directory", file=workdir, fix="give one that `vixml train` filled")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a temporary neighbour of `path`; renames it to `path` on success, removes it on failure.

    A link stays one: the file that it leads to is replaced. What is there and cannot be replaced, such as
    /dev/null or a named pipe, is written to as it is.
    """
    path = Path(path)
    encoding = None if "b" in mode else "utf-8"
    if path.exists() and not path.is_file():
        with open(path, mode, encoding=encoding) as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, mode, encoding=encoding) as file:
            _hold(handle)
            yield file
            file.flush()
            os.fsync(handle)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong before is what there is to say
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary sibling directory; renames it to `path` on success, removes it on failure.

    An existing `path` is replaced only once the new one is complete, and on disk.
    """
    path = Path(path)
    with scratch_dir(path) as temporary:
        yield temporary
        _to_disk(temporary)
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():
            _exchange(path, temporary)
        else:
            os.replace(temporary, path)


@contextlib.contextmanager
def scratch_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary directory beside `path`, removed at the end.

    What a killed run has left is removed a day later, by whoever next writes `path` or has a directory beside
    it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    handle = os.open(temporary, os.O_RDONLY)
    try:
        _hold(handle)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(handle)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_file(path, "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file; a missing or broken one is a UserError that names it."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise UserError("no such file", file=path) from None
    except (ValueError, RecursionError) as error:  # also of numbers of thousands of digits
        row = getattr(error, "lineno", None)
        raise UserError("not valid JSON", file=path, row=row) from None


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON file that holds an object; anything else is a UserError."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError("not a JSON object", file=path, fix="bring back the file as it was written")
    return value


def read_figures(path: str | os.PathLike[str]) -> dict[str, float]:
    """Reads a JSON file that holds a number for each name; anything else is a UserError."""
    figures = read_object(path)
    for name, value in figures.items():
        if type(value) is not float and not (type(value) is int and abs(value) < 2**63):
            raise UserError(
                f"{name!r} is not a number", file=path, fix="bring back the file as it was written"
            )
    return figures


def sha256(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*parts: Any) -> str:
    """Returns 16 hex digits that change when any of the JSON-able `parts` changes."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _exchange(path: Path, temporary: Path) -> None:
    """Renames `temporary` to `path`, which is there; where that fails or is interrupted, the old stays."""
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    try:
        os.replace(path, old / path.name)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            if (old / path.name).exists() and not path.exists():
                os.replace(old / path.name, path)
            old.rmdir()  # refuses where something is in it
        raise
    shutil.rmtree(old)


def _to_disk(directory: Path) -> None:
    """Has the system write all files of a directory: after a power cut its name must not stand for half."""
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _remove_stale(path: Path) -> None:
    """Removes the temporary neighbours of `path` that killed runs left behind."""
    temporary = re.compile(re.escape(f".{path.name}.") + r"[a-z0-9_]{8}\.(part|old)")
    with os.scandir(path.parent) as entries:
        found = [Path(entry.path) for entry in entries if temporary.fullmatch(entry.name)]
    for entry in found:
        # Without `path` the old one may be the only copy there is.
        if entry.suffix == ".old" and not path.exists():
            continue
        with contextlib.suppress(OSError):  # another run has removed it, or it belongs to somebody else
            if _is_stale(entry):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _is_stale(temporary: Path) -> bool:
    """Whether nothing in a temporary file or directory is recent, and no process holds it."""
    if temporary.is_symlink() or not (temporary.is_file() or temporary.is_dir()):
        return False
    newest = max(path.lstat().st_mtime for path in [temporary, *temporary.rglob("*")])
    if time.time() - newest < STALE_SECONDS:
        return False
    handle = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: the age must do
        return True
    finally:
        os.close(handle)
    return True


def _hold(handle: int) -> None:
    """Marks a temporary file or directory as one that is still being written, until `handle` is closed."""
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
