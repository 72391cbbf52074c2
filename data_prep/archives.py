"""Zip archives from elsewhere: only the wanted files come out, and no more bytes than expected."""

from __future__ import annotations

import contextlib
import errno
import lzma
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from data_prep.disk import may_fill_up, require_room
from data_prep.downloads import MB
from vixml_jax.errors import UserError
from vixml_jax.progress import Progress

PIECE_BYTES = 1 << 20
FIX = "delete it to download it again"


def names(archive: Path) -> set[str]:
    """Returns the names of an archive's files, without their folders.

    Raises:
      UserError: if it is no archive.
    """
    with _opened(archive) as packed:
        return {PurePosixPath(info.filename).name for info in packed.infolist() if not _is_dir(info)}


def unpack(archive: Path, wanted: Mapping[str, str], directory: Path, max_bytes: float) -> set[str]:
    """Unpacks some of an archive's files into one directory.

    Args:
      archive: a zip file.
      wanted: names without folders -> names in `directory`.
      directory: an existing one.
      max_bytes: of all that is unpacked; what the archive says about itself is checked first, then counted.

    Returns:
      The names in `directory` that were written.

    Raises:
      UserError: if the archive is broken or hostile, or there is no room.
    """
    with _opened(archive) as packed:
        members: dict[str, zipfile.ZipInfo] = {}
        for info in packed.infolist():
            _check(info, archive)
            name = wanted.get(PurePosixPath(info.filename).name)
            if name is None or _is_dir(info):
                continue
            if name in members:
                problem = f"holds both {members[name].filename!r} and {info.filename!r}"
                raise UserError(problem, file=archive, fix="unpack it yourself")
            members[name] = info
        total = sum(info.file_size for info in members.values())
        if total > max_bytes:
            problem = f"unpacks to {total / 1e9:,.2f} GB, more than {max_bytes / 1e9:,.2f} GB"
            raise UserError(problem, file=archive, fix="give a larger --max_unpacked_gb if that is right")
        require_room(directory, total, f"unpacking {archive.name}")
        with Progress(total // MB, f"unpack {archive.name}", "MB") as progress:
            for name, info in members.items():
                _extract(packed, info, directory / name, progress)
    return set(members)


def _extract(packed: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, progress: Progress) -> None:
    """Writes one file; zipfile checks its CRC, and stops at the size that the archive states for it."""
    done = 0
    with may_fill_up(path), packed.open(info) as source, open(path, "wb") as target:
        while piece := source.read(PIECE_BYTES):
            target.write(piece)
            progress.update((done + len(piece)) // MB - done // MB)
            done += len(piece)
        target.flush()
        os.fsync(target.fileno())
    if done != info.file_size:
        raise zipfile.BadZipFile(f"{info.filename!r} is shorter than it should be")


def _is_dir(info: zipfile.ZipInfo) -> bool:
    return info.filename.endswith("/")  # zipfile's own `is_dir` fails where the name is empty


def _check(info: zipfile.ZipInfo, archive: Path) -> None:
    """Refuses an archive that was made to do harm, also where the file in question is not wanted."""
    path = PurePosixPath(info.filename)
    mode = info.external_attr >> 16
    if (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in info.filename
        or ":" in info.filename.split("/")[0]
    ):
        problem = f"holds a file outside its folder: {info.filename!r}"
        raise UserError(problem, file=archive, fix="do not use it")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UserError(f"holds a link or a device: {info.filename!r}", file=archive, fix="do not use it")


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(archive) as packed:
            yield packed
    except FileNotFoundError:
        raise UserError("no such file", file=archive) from None
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError) as error:
        raise UserError(f"a broken zip file ({error})", file=archive, fix=FIX) from None
    except OSError as error:
        # A position before the file's start, or bad data in bzip2, which has no error of its own.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise UserError(f"a broken zip file ({error})", file=archive, fix=FIX) from None
    except (NotImplementedError, RuntimeError) as error:
        # An unknown method of compression, or a password.
        raise UserError(f"cannot be unpacked ({error})", file=archive, fix="unpack it yourself") from None
