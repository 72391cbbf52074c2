"""What became of every URL: a CSV that grows while pictures are downloaded, and from which a run goes on."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv

from vixml_jax import files
from vixml_jax.errors import UserError

pc: Any = pyarrow.compute  # its functions are made at import: type checkers do not see them

OK = "ok"
NAME = "downloads.csv"
COLUMNS = ("url", "outcome", "file", "bytes", "again")
TYPES = dict(zip(COLUMNS, (pa.string(), pa.string(), pa.string(), pa.int64(), pa.int64()), strict=True))


class Outcome(NamedTuple):
    """One line of the report.

    Attributes:
      url: as the list has it.
      outcome: "ok", or the reason why there is no picture.
      file: path within the folder of pictures, "" if there is none.
      bytes: size of that file.
      again: whether a later run should try again.
    """

    url: str
    outcome: str
    file: str = ""
    bytes: int = 0
    again: bool = False


class DownloadReport:
    """The report of a folder of pictures; open for one process at a time.

    Args:
      directory: the folder.

    Raises:
      UserError: if another process has it open, or it is no such report.
    """

    def __init__(self, directory: Path):
        self._path = path = directory / NAME
        self._stack = contextlib.ExitStack()
        path.parent.mkdir(parents=True, exist_ok=True)
        # The folder is what is locked: the file will be replaced.
        self._lock = os.open(path.parent, os.O_RDONLY)
        self._stack.callback(os.close, self._lock)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stack.close()
            problem = "another run is downloading into this folder"
            raise UserError(problem, file=path.parent, fix="wait for it, or end it") from None
        except OSError:  # a file system without locks
            pass
        self._file = -1

    def __enter__(self) -> DownloadReport:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, outcome: Outcome) -> None:
        """Appends a line; it survives the death of this process."""
        if self._file < 0:
            self._drop_half_line()
            new = not self._path.exists()
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            self._stack.callback(os.close, self._file)
            if new:
                self._append(COLUMNS)
        self._append([*outcome[:-1], int(outcome.again)])

    def _append(self, row: Sequence[object]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(row)
        data = line.getvalue().encode()
        if os.write(self._file, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)

    def last(self) -> pa.Table:
        """Returns the newest line of every URL, columns as `COLUMNS`."""
        if self._file < 0:
            self._drop_half_line()
        table = _read(self._path)
        codes = np.asarray(table["url"].combine_chunks().dictionary_encode().indices)
        newest = len(codes) - 1 - np.unique(codes[::-1], return_index=True)[1]
        return table.take(pa.array(newest))

    def tidy(self, urls: pa.Array) -> pa.Table:
        """Rewrites the file with one line a URL, those of `urls` first and in their order.

        Returns:
          The lines of `urls`; one that has no line is missing.
        """
        table = self.last()
        rows = pc.index_in(urls, value_set=table["url"].combine_chunks()).drop_null()
        others = pc.invert(pc.is_in(table["url"], value_set=urls))
        with files.atomic_file(self._path, "wb") as file:
            pyarrow.csv.write_csv(
                pa.concat_tables([table.take(rows), table.filter(others)]).combine_chunks(), file
            )
        return table.take(rows)

    def done(self, urls: pa.Array, held: Callable[[str, int], bool], again: bool) -> np.ndarray:
        """Returns which URLs need no download any more, bool [U].

        Args:
          urls: string [U].
          held: whether a file of this path and size is there.
          again: whether failures that were for good count as not done, too.
        """
        table = self.last()
        row_U = pc.index_in(urls, value_set=table["url"].combine_chunks()).fill_null(-1)
        ok = pc.equal(table["outcome"], OK).to_numpy(zero_copy_only=False)
        done = ~ok & (np.asarray(table["again"]) == 0) & (not again)
        for row in np.flatnonzero(ok):
            done[row] = held(table["file"][row].as_py(), table["bytes"][row].as_py())
        return np.append(done, False)[np.asarray(row_U)]

    def _drop_half_line(self) -> None:
        """Takes off what a killed process did not finish writing."""
        if not self._path.exists():
            return
        with open(self._path, "r+b") as file:
            end = file.seek(0, os.SEEK_END)
            for start, block in _blocks_from_end(file, end):
                newline = block.rfind(b"\n")
                if newline >= 0:
                    file.truncate(start + newline + 1)
                    return
        self._path.unlink()


def _read(path: Path) -> pa.Table:
    """Reads all lines; none where there is no file."""
    if not path.exists():
        return pa.table({name: pa.array([], kind) for name, kind in TYPES.items()})
    try:
        return pyarrow.csv.read_csv(
            path,
            convert_options=pyarrow.csv.ConvertOptions(column_types=TYPES, include_columns=list(COLUMNS)),
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError):
        raise UserError("not a report of downloads", file=path, fix="move it away") from None


def _blocks_from_end(file: IO[bytes], end: int, size: int = 1 << 16) -> Iterator[tuple[int, bytes]]:
    while end > 0:
        start = max(end - size, 0)
        file.seek(start)
        yield start, file.read(end - start)
        end = start
