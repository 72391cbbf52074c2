"""Lines of raw files: gzipped or not, whatever their name says, and with the encoding found out first."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vixml_jax import files
from vixml_jax.errors import UserError

PIECE_BYTES = 1 << 22
BOM = codecs.BOM_UTF8


@contextlib.contextmanager
def open_bytes(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Opens a file for reading, unpacking it if it is gzipped.

    Raises:
      UserError: if the file is missing, or turns out to be broken while it is read.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(2)
            file.seek(0)
            if magic == b"\x1f\x8b":
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield unpacked  # type: ignore[misc]
            elif Path(path).suffix == ".gz":
                raise UserError("not a gzip file", file=path, fix="gzip it, or take .gz off its name")
            else:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"a broken gzip file ({error})", file=path, fix="copy or download it again") from None
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError((error.strerror or "unreadable").lower(), file=path) from None


def pieces(path: str | os.PathLike[str], piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
    """Yields the file without its byte-order mark, in pieces of whole lines that each end with a newline."""
    rest, start = b"", True
    with open_bytes(path) as file:
        while block := file.read(piece_bytes):
            end = block.rfind(b"\n") + 1
            if not end:
                rest += block
                continue
            piece, rest = rest + block[:end], block[end:]
            if start:
                piece, start = piece.removeprefix(BOM), False
            if piece:
                yield piece
    if start:
        rest = rest.removeprefix(BOM)
    if rest:
        yield rest + b"\n"


def lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Yields the lines of a file without their newlines; only \\n and \\r\\n end a line."""
    for piece in pieces(path):
        for line in piece[:-1].split(b"\n"):
            yield line.removesuffix(b"\r")


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A text file that has been gone through once.

    Attributes:
      path: where it is.
      encoding: "utf-8", or "latin-1" for a file that is not valid UTF-8.
      not_utf8_line: the first one-based line that is not UTF-8, 0 if none.
      num_lines: lines, blank ones included.
      num_filled: lines that are not blank.
      digest: SHA-256 of the bytes on disk, in hex.
    """

    path: Path
    encoding: str
    not_utf8_line: int
    num_lines: int
    num_filled: int
    digest: str

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yields (one-based line number, text) of every line."""
        for number, line in enumerate(lines(self.path), 1):
            yield number, line.decode(self.encoding)


def scan(path: str | os.PathLike[str]) -> TextFile:
    """Goes through a file once: is it whole, what encoding is it in, how many lines has it.

    Raises:
      UserError: if it is missing, a broken gzip file (naming the line after the last whole one), or UTF-16.
    """
    path = Path(path)
    num_lines = num_filled = not_utf8 = 0
    try:
        for piece in pieces(path):
            if not num_lines and piece.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError("UTF-16 text", file=path, row=1, fix="save it as UTF-8")
            split = piece[:-1].split(b"\n")
            if not not_utf8 and not _is_utf8(piece):
                not_utf8 = num_lines + 1 + next(i for i, line in enumerate(split) if not _is_utf8(line))
            num_lines += len(split)
            num_filled += sum(1 for line in split if line and not line.isspace())
    except UserError as error:
        if error.row is None and "gzip" in error.problem and num_lines:
            raise UserError(error.problem, file=path, row=num_lines + 1, fix=error.fix) from None
        raise
    encoding = "latin-1" if not_utf8 else "utf-8"
    return TextFile(path, encoding, not_utf8, num_lines, num_filled, files.sha256(path))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
