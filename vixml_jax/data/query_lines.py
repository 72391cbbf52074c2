"""Queries as JSON lines: `{"title", "content", "images", "uid"}`, cleaned as `prepare` cleans raw folders."""

from __future__ import annotations

import gzip
import io
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from vixml_jax.data import fields, pictures, text_lines
from vixml_jax.data.fields import Where
from vixml_jax.data.report import Report
from vixml_jax.errors import UserError

STREAM = "-"  # names standard input
QUERY_FIX = 'every line is one JSON object such as {"title": "kettle"}'
TITLE_FIX = 'give a text, "" if there is none: {"title": "kettle"}'
LABEL_FIX = 'give lines such as {"uid": "l7", "title": "kettles"}'
# Called with the error of a line that is no query; the line is then left out.
OnError = Callable[[UserError], None]

logger = logging.getLogger(__name__)


def read_queries(
    source: str | os.PathLike[str] | IO[bytes] | IO[str],
    name: str | None = None,
    on_error: OnError | None = None,
) -> Iterator[dict[str, Any]]:
    """Opens queries, one JSON object a line, and yields them checked and cleaned, in constant memory.

    A file may be gzipped, may begin with a byte-order mark, and is read as latin-1 if it is not UTF-8. What
    can be read only once, a stream or a pipe, must be UTF-8, gzipped or not. Blank lines are skipped.

    Args:
      source: a path, or an open stream of bytes or text; a text stream with a buffer is read by its bytes.
      name: what errors call the source, by default its path. Picture paths are taken from the directory of
        this name, for "-" from the current one.
      on_error: called for a line that is no such object, which is then left out; None raises its error.

    Yields:
      "uid" (the row number from zero where it has none), "title", "content", and "images" as paths.

    Raises:
      UserError: at once for a file that cannot be read; with file and row for a line that is no such object.
    """
    if not isinstance(source, str | os.PathLike):
        return _queries(_stream_lines(source, name or STREAM), "utf-8", name or STREAM, on_error)
    path, name = Path(source), name or os.fspath(source)
    if path.exists() and not path.is_file() and not path.is_dir():
        return _queries(_pipe_lines(path, name), "utf-8", name, on_error)
    file = text_lines.scan(path)
    if file.not_utf8_line:
        logger.warning("%s: row %d: not UTF-8; the whole file is read as latin-1", name, file.not_utf8_line)
    return _queries(text_lines.lines(path), file.encoding, name, on_error)


def count_queries(path: str | os.PathLike[str]) -> int:
    """Counts the lines of a file that are not blank; 0 for what can be read only once."""
    return text_lines.scan(path).num_filled if Path(path).is_file() else 0


def read_labels(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yields labels, one JSON object a line, as `read_queries` yields queries; "uid" is a text.

    Raises:
      UserError: with file and row for a label without uid, whose uid an earlier line has, without text and
        pictures, or with a picture that cannot be read; if there is no label at all.
    """
    file = text_lines.scan(path)
    report = _Repaired(Path(path).parent)
    rows: dict[str, int] = {}
    for row, text in file.lines():
        if not text.strip():
            continue
        where = Where(Path(path), row, report)
        record = _record(text, where)
        label = _checked(record, Path(path).parent, where)
        if record.get("uid") in (None, ""):
            raise where.error('no "uid"', LABEL_FIX)
        label["uid"] = str(label["uid"])
        if label["uid"] in rows:
            raise where.error(
                f"uid {label['uid']!r} stands in row {rows[label['uid']]} already", "give it once"
            )
        rows[label["uid"]] = row
        if not (label["title"] or label["content"] or label["images"]):
            raise where.error("a label without text and pictures", LABEL_FIX)
        for image in label["images"]:
            try:
                pictures.load(image)
            except pictures.UnreadablePicture as problem:
                raise where.error(
                    f"the picture {image} is missing or cannot be read: {problem}", "give one that can"
                ) from None
        yield label
    if not rows:
        raise UserError("no labels", file=path, fix=LABEL_FIX)


class _Repaired(Report):
    """Forgets repairs: there may be one for every query of an endless stream."""

    def repair(self, file: Path, line: int, problem: str, done: str) -> None:
        """Does nothing."""


def _queries(
    lines: Iterable[bytes], encoding: str, name: str, on_error: OnError | None
) -> Iterator[dict[str, Any]]:
    base = Path.cwd() if name == STREAM else Path(name).parent
    report = _Repaired(base)
    for row, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            query = _query(line, encoding, base, Where(Path(name), row, report))
        except UserError as error:
            if on_error is None:
                raise
            on_error(error)
        else:
            yield query


def _query(line: bytes, encoding: str, base: Path, where: Where) -> dict[str, Any]:
    try:
        text = line.decode(encoding)
    except UnicodeDecodeError:
        raise where.error("not valid UTF-8", "save it as UTF-8") from None
    return _checked(_record(text, where), base, where)


def _record(text: str, where: Where) -> dict[str, Any]:
    try:
        return fields.parse_object(text, where)
    except UserError as error:
        raise where.error(error.problem, QUERY_FIX) from None


def _checked(record: dict[str, Any], base: Path, where: Where) -> dict[str, Any]:
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
