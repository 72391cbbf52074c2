"""Queries as JSON lines: `{"title", "content", "images", "uid"}`, cleaned as `prepare` cleans raw folders."""

from __future__ import annotations

import gzip
import io
import logging
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from vixml_jax.data import fields, text_lines
from vixml_jax.data.fields import Where
from vixml_jax.data.report import Report
from vixml_jax.errors import UserError

STREAM = "-"  # names standard input
QUERY_FIX = 'every line is one JSON object such as {"title": "kettle"}'
TITLE_FIX = 'give a text, "" if there is none: {"title": "kettle"}'

logger = logging.getLogger(__name__)


def read_queries(
    source: str | os.PathLike[str] | IO[bytes] | IO[str], name: str | None = None
) -> Iterator[dict[str, Any]]:
    """Opens queries, one JSON object a line, and yields them checked and cleaned, in constant memory.

    A file may be gzipped, may begin with a byte-order mark, and is read as latin-1 if it is not UTF-8. What
    can be read only once, a stream or a pipe, must be UTF-8, gzipped or not. Blank lines are skipped.

    Args:
      source: a path, or an open stream of bytes or text; a text stream with a buffer is read by its bytes.
      name: what errors call the source, by default its path. Picture paths are taken from the directory of
        this name, for "-" from the current one.

    Yields:
      "uid" (the row number from zero where it has none), "title", "content", and "images" as paths.

    Raises:
      UserError: at once for a file that cannot be read; with file and row for a line that is no such object.
    """
    if not isinstance(source, str | os.PathLike):
        return _queries(_stream_lines(source, name or STREAM), "utf-8", name or STREAM)
    path, name = Path(source), name or os.fspath(source)
    if path.exists() and not path.is_file() and not path.is_dir():
        return _queries(_pipe_lines(path, name), "utf-8", name)
    file = text_lines.scan(path)
    if file.not_utf8_line:
        logger.warning("%s: row %d: not UTF-8; the whole file is read as latin-1", name, file.not_utf8_line)
    return _queries(text_lines.lines(path), file.encoding, name)


class _Repaired(Report):
    """Forgets repairs: there may be one for every query of an endless stream."""

    def repair(self, file: Path, line: int, problem: str, done: str) -> None:
        """Does nothing."""


def _queries(lines: Iterable[bytes], encoding: str, name: str) -> Iterator[dict[str, Any]]:
    base = Path.cwd() if name == STREAM else Path(name).parent
    report = _Repaired(base)
    for row, line in enumerate(lines, 1):
        if line.strip():
            yield _query(line, encoding, base, Where(Path(name), row, report))


def _query(line: bytes, encoding: str, base: Path, where: Where) -> dict[str, Any]:
    try:
        text = line.decode(encoding)
    except UnicodeDecodeError:
        raise where.error("not valid UTF-8", "save it as UTF-8") from None
    try:
        record = fields.parse_object(text, where)
    except UserError as error:
        raise where.error(error.problem, QUERY_FIX) from None
    if "title" not in record:
        raise where.error('no "title"', TITLE_FIX)
    uid = fields.uid(record, where.line - 1, where)
    return {
        # A number stays one, so that the caller finds its own uids again.
        "uid": record["uid"] if isinstance(record.get("uid"), int) else uid,
        "title": fields.title(record["title"], where),
        "content": fields.content(record, where),
        "images": [base / path for path in fields.texts_of(record, "images", where, fields.IMAGES_FIX)],
    }


def _pipe_lines(path: Path, name: str) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        yield from _stream_lines(stream, name)


def _stream_lines(stream: IO[bytes] | IO[str], name: str) -> Iterator[bytes]:
    """Yields lines as they come, without waiting for more of them."""
    lines: Any = getattr(stream, "buffer", stream)
    if isinstance(lines, io.BufferedReader) and lines.peek(2)[:2] == b"\x1f\x8b":
        lines = gzip.GzipFile(fileobj=lines)
    row = 0
    try:
        for row, line in enumerate(lines, 1):
            # Bytes that a text stream could not decode come out as they were.
            data = line.encode("utf-8", "surrogateescape") if isinstance(line, str) else line
            data = data.removesuffix(b"\n").removesuffix(b"\r")
            yield data.removeprefix(text_lines.BOM) if row == 1 else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"a broken gzip stream ({error})", file=name, row=row + 1) from None
