"""Large files: downloads that go on after a break or a kill, with room checked before and content after."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from typing import IO, Any

from data_prep.disk import may_fill_up, require_room
from data_prep.transfers import Client, Failed, Reply
from vixml_jax import files
from vixml_jax.errors import UserError
from vixml_jax.progress import Progress

PART, STATE = ".part", ".part.json"
MB = 1_000_000


def download(url: str, path: Path, client: Client, *, sha256: str = "", size: int | None = None) -> str:
    """Downloads a file, unless it is there.

    What was received lies in `path`.part until it is whole; a later call goes on from there if the server
    says that the file is still the same. After a break the next attempt follows, while they bring something.

    Args:
      url: http or https.
      path: the file.
      client: makes the transfers.
      sha256: of the whole file, in hex, if known; also a file that is there already is checked.
      size: of the whole file in bytes, if known.

    Returns:
      The SHA-256 of the file, in hex.

    Raises:
      UserError: if the file cannot be had or is not the one expected, or there is no room for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return _checked(path, sha256, size, f"delete it to download it again from {url}")
    part = path.with_name(path.name + PART)
    try:
        with may_fill_up(part), open(part, "ab") as file:
            _lock(file, part)
            _fill(url, path, file, client, size)
            os.fsync(file.fileno())
            # Still locked: another run may not go on with what is looked at here.
            found = _checked(part, sha256, size, "it was removed; the server may have sent another version")
            os.replace(part, path)
    except Failed as failure:
        raise UserError(failure.reason, file=url, fix=f"or put the file at {path} yourself") from None
    path.with_name(path.name + STATE).unlink(missing_ok=True)
    return found


def _fill(url: str, path: Path, file: IO[bytes], client: Client, size: int | None) -> None:
    """Makes attempts until the part file is whole."""
    fruitless = 0
    while True:
        before = file.tell()
        try:
            return _attempt(url, path, file, client, size)
        except Failed as failure:
            fruitless = fruitless + 1 if file.tell() <= before else 1
            if not failure.again or fruitless > client.limits.retries:
                raise
            client.pause(fruitless - 1, failure)


def _attempt(url: str, path: Path, file: IO[bytes], client: Client, size: int | None) -> None:
    state_path = path.with_name(path.name + STATE)
    state: dict[str, Any] = files.read_json(state_path) if state_path.exists() else {}
    have = file.seek(0, os.SEEK_END)
    headers = {}
    if have and state.get("url") == url and state.get("validator"):
        headers = {"Range": f"bytes={have}-", "If-Range": state["validator"]}
    with client.open(url, headers, accept=(200, 206, 416)) as reply:
        if reply.status != 200 and _start(reply, have) != have:
            _restart(file)
            raise Failed("does not go on where it broke off", again=True)
        if reply.status == 416:  # nothing is left to send
            return
        if reply.status == 200:
            if reply.headers.get_content_type() == "text/html" and path.suffix not in (".html", ".htm"):
                # Google Drive does so when a file was asked for too often.
                raise Failed("answers with a web page instead of the file", again=False)
            have = 0
            _restart(file)
            files.write_json(state_path, {"url": url, "validator": _validator(reply)})
        total = None if reply.length is None else have + reply.length
        if size is not None and total is not None and total != size:
            raise Failed(f"has {total:,} bytes instead of {size:,}", again=False)
        if total is not None:
            require_room(path.parent, total - have, path.name)
        counts = (total or size or 0) // MB, f"download {path.name}", "MB", have // MB
        with Progress(*counts) as progress:
            for piece in reply.pieces():
                file.write(piece)
                progress.update((have + len(piece)) // MB - have // MB)
                have += len(piece)
        file.flush()


def _start(reply: Reply, have: int) -> int:
    """Where the sent part begins; for a range beyond the end, the size of the file."""
    pattern = r"bytes \*/(\d+)" if reply.status == 416 else r"bytes (\d+)-"
    found = re.match(pattern, reply.headers.get("Content-Range", ""))
    return int(found[1]) if found and have else -1


def _validator(reply: Reply) -> str:
    """What tells one version of the file from another; a weak ETag does not, byte by byte."""
    tag = reply.headers.get("ETag", "")
    return reply.headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag


def _restart(file: IO[bytes]) -> None:
    file.truncate(0)
    file.seek(0)


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError("another run is downloading it", file=path, fix="wait for it, or end it") from None
    except OSError:  # a file system without locks
        pass


def _checked(path: Path, sha256: str, size: int | None, fix: str) -> str:
    """Returns the SHA-256 of a file that is whole; a part file that is not what it should be is removed."""
    found_size, found = path.stat().st_size, files.sha256(path)
    problem = ""
    if size is not None and found_size != size:
        problem = f"has {found_size:,} bytes instead of {size:,}"
    elif sha256 and found != sha256.lower():
        problem = f"its SHA-256 is {found} instead of {sha256.lower()}"
    if problem:
        if path.suffix == PART:
            path.unlink()
        raise UserError(problem, file=path, fix=fix)
    return found
