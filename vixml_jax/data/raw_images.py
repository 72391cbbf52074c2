"""Pictures of a raw folder: lists of paths by uid, and the bytes of the files."""

from __future__ import annotations

import csv
import hashlib
import os
from array import array
from pathlib import Path
from typing import NamedTuple

from vixml_jax.data import fields, pictures
from vixml_jax.data.pictures import UnreadablePicture
from vixml_jax.data.report import Finding, Report
from vixml_jax.data.text_lines import TextFile
from vixml_jax.errors import UserError


class ImagePath(NamedTuple):
    """A picture as a raw file names it.

    Attributes:
      path: as written.
      line: one-based line that names it.
    """

    path: str
    line: int


class ImageList:
    """The list `img_paths.*.csv` of a split: columns `uid` and `path`, any number of lines a uid.

    Args:
      file: the list, gone through once, or None where the folder has none.
      report: takes lines that are not used.

    Raises:
      UserError: if it has no header, or is not CSV.
    """

    def __init__(self, file: TextFile | None, report: Report):
        self._file, self._report = file, report
        self._numbers: dict[str, int] = {}
        self._images: list[list[ImagePath]] = []
        self._used = bytearray()
        if file is not None:
            self._read(file)

    def images(self, uid: str) -> list[ImagePath]:
        """Returns the pictures of a row, in the order of the list."""
        number = self._numbers.get(uid)
        if number is None:
            return []
        self._used[number] = 1
        return self._images[number]

    def report_unused(self) -> None:
        """Notes the lines whose uid no row asked for."""
        if self._file is None:
            return
        unused = array("q")
        for used, images in zip(self._used, self._images, strict=True):
            if not used:
                unused.extend(image.line for image in images)
        for line in sorted(unused):
            self._report.reject(self._file.path, line, "a uid that no row has")

    def _read(self, file: TextFile) -> None:
        rows = csv.reader(text + "\n" for _, text in file.lines())
        try:
            header = [name.strip().lower() for name in next(rows, [])]
            if "uid" not in header or "path" not in header:
                raise UserError(
                    "no header", file=file.path, row=1, fix="the first line names the columns: uid,path"
                )
            uid_column, path_column = header.index("uid"), header.index("path")
            for row in rows:
                if not row:
                    continue
                values = [value.strip() for value in row]
                if len(values) <= max(uid_column, path_column) or not values[uid_column]:
                    self._report.reject(file.path, rows.line_num, "not a uid and a path")
                    continue
                self._add(fields.clean(values[uid_column]), ImagePath(values[path_column], rows.line_num))
        except csv.Error as error:
            raise UserError(
                f"not CSV ({error})", file=file.path, row=rows.line_num, fix="a line is: uid,path"
            ) from None

    def _add(self, uid: str, image: ImagePath) -> None:
        number = self._numbers.setdefault(uid, len(self._images))
        if number == len(self._images):
            self._images.append([])
            self._used.append(0)
        self._images[number].append(image)


class PictureFacts(NamedTuple):
    """What is known of a picture without its bytes.

    Attributes:
      size: bytes of its file; 0 if it counts as missing.
      digest: SHA-256 of what was read, whether it can be used or not.
    """

    size: int
    digest: bytes


class RawPicture(NamedTuple):
    """A picture as it lies in a raw folder.

    Attributes:
      data: the bytes of its file; empty if it counts as missing.
      digest: SHA-256 of what was read, whether it can be used or not.
      problem: why it cannot be used; None also for a file that is not there.
    """

    data: bytes
    digest: bytes
    problem: UnreadablePicture | None = None

    @property
    def facts(self) -> PictureFacts:
        """What stays known when its bytes are let go."""
        return PictureFacts(len(self.data), self.digest)


class ImageReader:
    """Reads pictures of a raw folder as the bytes that lie on disk; safe to share between threads.

    Args:
      root: the raw folder; relative paths start there and must stay inside.
      report: of the folder; names files as it does.
    """

    def __init__(self, root: str | os.PathLike[str], report: Report):
        self._root, self._report = os.path.abspath(root), report

    def read(self, images: list[ImagePath], *, check: bool) -> list[RawPicture]:
        """Returns the pictures of a row; those that cannot be used keep their places.

        Args:
          images: as the raw files name them.
          check: whether each is decoded, to see whether it can be. What cannot be read counts as missing.
        """
        return [self._read(image.path, check) for image in images]

    def findings(self, images: list[ImagePath], file: Path, found: list[RawPicture]) -> list[Finding]:
        """Returns a finding for each picture of a row that is there but cannot be used.

        Args:
          images: as the raw files name them.
          file: the raw file that does.
          found: what `read` returned.
        """
        return [
            Finding(
                self._report.relative(file), image.line, picture.problem.problem, "counted as missing",
                image.path, picture.problem.detail,
            )
            for image, picture in zip(images, found, strict=True)
            if picture.problem is not None
        ]  # fmt: skip

    def _read(self, path: str, check: bool) -> RawPicture:
        data = b""
        try:
            data = self._bytes(path)
            digest = hashlib.sha256(data).digest()
            if check:
                pictures.load(data)
            return RawPicture(data, digest)
        except FileNotFoundError:
            return RawPicture(b"", hashlib.sha256(b"").digest())
        except UnreadablePicture as problem:
            return RawPicture(b"", hashlib.sha256(data).digest(), problem)

    def _bytes(self, path: str) -> bytes:
        if not path or "\0" in path:
            raise UnreadablePicture("not a path")
        absolute = os.path.normpath(os.path.join(self._root, path))
        if not os.path.isabs(path) and not absolute.startswith(self._root + os.sep):
            raise UnreadablePicture("a path outside the raw folder")
        return pictures.read_file(absolute)
