"""Rows of unequal length in two arrays on disk: all values end to end, and where each row starts.

It holds token ids, UTF-8 bytes and sizes alike. Loaded, it is memory-mapped: opening costs nothing, and the
processes of one machine share its pages.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from vixml_jax import files, npy
from vixml_jax.errors import UserError

VALUES, OFFSETS = "values.npy", "offsets.npy"


class Ragged:
    """N rows of unequal length.

    Args:
      values: [V]; the rows end to end.
      offsets: int64 [N + 1]; row i is `values[offsets[i]:offsets[i + 1]]`.
    """

    def __init__(self, values: np.ndarray, offsets: np.ndarray):
        fits = offsets.ndim == 1 and values.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets)
        if not fits or not 0 <= int(offsets[0]) <= int(offsets[-1]) <= len(values):
            raise ValueError(f"values {values.shape} do not fit offsets {offsets.shape}")
        self.values, self.offsets = values, offsets

    @classmethod
    def from_rows(cls, rows: Iterable[np.ndarray], dtype: np.typing.DTypeLike) -> Ragged:
        """Builds one in memory from arrays of one dimension."""
        rows = [np.asarray(row, dtype) for row in rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return cls(np.concatenate(rows) if rows else np.zeros(0, dtype), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row = row % len(self)
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def lengths(self) -> np.ndarray:
        """Returns the length of every row, int64 [N]."""
        return np.diff(self.offsets).astype(np.int64, copy=False)

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gathers rows, in the order given.

        Args:
          rows: int [n]; repeated rows are fine.

        Returns:
          values [V'] of these rows end to end, and their lengths, int64 [n].
        """
        rows = np.asarray(rows, np.int64)
        starts = np.asarray(self.offsets[rows], np.int64)
        lengths = np.asarray(self.offsets[rows + 1], np.int64) - starts
        # Position p of the result lies in a row's span: shift p by how far that row moved.
        shift = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
        return self.values[shift + np.arange(len(shift))], lengths

    @staticmethod
    def write(directory: str | os.PathLike[str], values: np.ndarray, offsets: np.ndarray) -> None:
        """Writes the two arrays to `directory`, which appears only when both are whole."""
        Ragged(values, offsets)
        with files.atomic_dir(directory) as temporary:
            np.save(temporary / VALUES, values, allow_pickle=False)
            np.save(temporary / OFFSETS, np.asarray(offsets, np.int64), allow_pickle=False)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes it to `directory`; `load` reads it back."""
        self.write(directory, self.values, self.offsets)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Ragged:
        """Opens what `write` or `RaggedWriter` wrote, memory-mapped and read-only.

        Raises:
          UserError: if the directory holds no ragged array, or a broken one.
        """
        directory = Path(directory)
        fix = "delete it and rebuild"
        values, offsets = (npy.load(directory / name, fix=fix) for name in (VALUES, OFFSETS))
        try:
            return cls(values, offsets)
        except ValueError as error:
            raise UserError(f"not a ragged array ({error})", file=directory, fix=fix) from None


class RaggedWriter:
    """Writes a ragged array row by row without holding its values; a context manager.

    The directory must be one that nobody reads yet, such as one inside `files.atomic_dir`.
    """

    def __init__(self, directory: str | os.PathLike[str], dtype: np.typing.DTypeLike):
        self._directory, self._dtype = Path(directory), np.dtype(dtype)
        self._ends = array("q", [0])
        self._file: IO[bytes] | None = None

    def __enter__(self) -> RaggedWriter:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._file = open(self._directory / VALUES, "wb")
        self._header(0)
        self._start = self._file.tell()
        return self

    def append(self, row: bytes | np.ndarray) -> None:
        """Adds a row: an array of the dtype, or its bytes."""
        assert self._file is not None, "use it in a with statement"
        data = row if isinstance(row, bytes) else np.asarray(row, self._dtype).tobytes()
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data) // self._dtype.itemsize)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        with self._file:
            if kind is None:
                # numpy pads the header so that a grown first axis still fits in it.
                self._file.seek(0)
                self._header(self._ends[-1])
                assert self._file.tell() == self._start
        if kind is None:
            np.save(self._directory / OFFSETS, np.frombuffer(self._ends, np.int64), allow_pickle=False)

    def _header(self, length: int) -> None:
        assert self._file is not None
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
