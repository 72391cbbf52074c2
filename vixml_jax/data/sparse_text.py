"""Sparse matrices as the extreme-classification repository stores them: `label:value` text and scipy `.npz`.

Files are parsed in pieces of a few megabytes with numpy over whole pieces: 13 million entries take seconds,
and little more memory than the matrix. Only a piece that is wrong is gone through line by line, to name the
line.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import scipy.sparse

from vixml_jax import files
from vixml_jax.data import text_lines
from vixml_jax.errors import UserError

PIECE_BYTES = 1 << 22
MAX_SIZE = 2**31 - 1  # indices are int32
# Rows that a header counts and the file lacks are empty: so many, else a few bytes ask for gigabytes.
MOST_LACKING = 1 << 24
HEADER_FIX = "the first line must be two whole numbers: rows columns"

# Digits in two places next to each other would be tried in every split: minutes for a long number.
_ENTRY = re.compile(
    rb"(\d+):([-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|[-+]?inf|[-+]?nan)", re.IGNORECASE
)
# What numbers, colons and white space are made of; any other byte is an error before numbers are read.
_ALLOWED = np.zeros(256, bool)
_ALLOWED[list(b"0123456789+-.eEinfaINFA: \t\r\n\v\f")] = True
_SPACE = np.zeros(256, bool)
_SPACE[list(b" \t\r\n\v\f")] = True
_BREAK = _SPACE.copy()
_BREAK[ord(":")] = True


@dataclasses.dataclass
class SparseReport:
    """What had to be repaired in a file, by one-based line (by row plus one in an `.npz`).

    Attributes:
      unsorted: lines whose labels were not in increasing order; sorted.
      duplicated: lines that name a label twice; its largest value is kept.
    """

    unsorted: list[int] = dataclasses.field(default_factory=list)
    duplicated: list[int] = dataclasses.field(default_factory=list)

    @property
    def repaired(self) -> int:
        """Number of lines that were repaired."""
        return len(set(self.unsorted) | set(self.duplicated))


def read_sparse(path: str | os.PathLike[str], report: SparseReport | None = None) -> scipy.sparse.csr_matrix:
    """Reads a relevance or score matrix.

    Text has a header `rows columns`, then a line a row of `label:value` pairs, zero-based; a blank line is an
    empty row. Rows that the header counts and the file lacks are empty. `.npz` is what
    `scipy.sparse.save_npz` writes. Stored zeros are kept.

    Args:
      path: `.npz`, else text, which may be gzipped.
      report: filled with the lines that were repaired.

    Returns:
      csr_matrix [rows, columns]: float32 values, int32 indices, increasing in each row.

    Raises:
      UserError: naming file and line, if the file is not of this form, has more rows than its header says, or
        a label outside the header's columns.
    """
    path = Path(path)
    report = SparseReport() if report is None else report
    if not path.is_file():
        raise UserError("no such file", file=path)
    if path.suffix == ".npz":
        return _read_npz(path, report)
    return _read_text(path, report)


def write_sparse_text(path: str | os.PathLike[str], matrix: scipy.sparse.csr_matrix) -> None:
    """Writes a matrix as text that `read_sparse` reads back exactly (float32)."""
    rows: Any = scipy.sparse.csr_matrix(matrix)
    with files.atomic_file(path, "w") as file:
        file.write(f"{rows.shape[0]} {rows.shape[1]}\n")
        for start, end in zip(rows.indptr[:-1], rows.indptr[1:], strict=True):
            labels, values = rows.indices[start:end].tolist(), rows.data[start:end].tolist()
            file.write(" ".join(map("{}:{:.9g}".format, labels, values)) + "\n")


def read_filter_pairs(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads pairs that are left out of the evaluation: `row label` a line, zero-based, no header.

    Returns:
      int64 [n, 2].

    Raises:
      UserError: naming file and line, if a line is not two whole numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("no such file", file=path)
    pairs = []
    for row, line in enumerate(text_lines.lines(path), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or not all(word.isdigit() and len(word) < 19 for word in words):
            raise UserError(
                f"{_shown(line)} is not a filter pair",
                file=path,
                row=row,
                fix="a line is: row label, zero-based",
            )
        pairs.append((int(words[0]), int(words[1])))
    return np.asarray(pairs, np.int64).reshape(-1, 2)


def _read_text(path: Path, report: SparseReport) -> scipy.sparse.csr_matrix:
    pieces = text_lines.pieces(path, PIECE_BYTES)
    first = next(pieces, b"")
    header, _, first = first.partition(b"\n")
    rows, columns = _header(path, header)
    indices, values, counts = [], [], []
    line = 2  # the one-based line that the piece starts with
    for piece in _chain(first, pieces):
        parsed = _parse(path, piece, line, columns)
        counts.append(parsed[2])
        line += len(parsed[2])
        indices_of, values_of, counts[-1] = _repair(*parsed, line - len(parsed[2]), columns, report)
        indices.append(indices_of)
        values.append(values_of)
    lengths = np.concatenate(counts) if counts else np.zeros(0, np.int64)
    if len(lengths) > rows:
        surplus = np.flatnonzero(lengths[rows:])  # blank lines at the end are no rows
        if len(surplus):
            raise UserError(
                f"a row more than the {rows} of the header",
                file=path,
                row=rows + 2 + int(surplus[0]),
                fix="the header (line 1) must count all rows",
            )
        lengths = lengths[:rows]
    _check_lacking(path, rows, len(lengths))
    indptr = np.zeros(rows + 1, np.int64)
    np.cumsum(lengths, out=indptr[1 : len(lengths) + 1])
    indptr[len(lengths) + 1 :] = indptr[len(lengths)]
    indices_all = np.concatenate(indices) if indices else np.zeros(0, np.int32)
    del indices
    values_all = np.concatenate(values) if values else np.zeros(0, np.float32)
    del values
    matrix = scipy.sparse.csr_matrix((values_all, indices_all, indptr), shape=(rows, columns), copy=False)
    matrix.has_sorted_indices = matrix.has_canonical_format = True
    return matrix


def _check_lacking(path: Path, rows: int, there: int) -> None:
    if rows - there > MOST_LACKING:
        raise UserError(
            f"counts {rows:,} rows, but holds something for {there:,}",
            file=path,
            fix=f"at most {MOST_LACKING:,} rows may be lacking",
        )


def _header(path: Path, line: bytes) -> tuple[int, int]:
    words = line.split()
    if len(words) != 2 or not all(word.isdigit() for word in words):
        raise UserError(f"{_shown(line)} is not a header", file=path, row=1, fix=HEADER_FIX)
    if max(len(word) for word in words) > 12 or max(map(int, words)) > MAX_SIZE:
        raise UserError("the header's sizes exceed 2^31 - 1", file=path, row=1, fix=HEADER_FIX)
    return int(words[0]), int(words[1])


def _parse(path: Path, piece: bytes, line: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whole lines to labels int64 [n], values float32 [n] and entries per line int64 [lines]."""
    data = np.frombuffer(piece, np.uint8)
    newlines = np.flatnonzero(data == ord("\n"))
    if not _ALLOWED[data].all():
        _explain(path, piece, line, columns)
    breaks = _BREAK[data]
    edges = np.flatnonzero(breaks[1:] != breaks[:-1]) + 1
    if not breaks[0]:
        edges = np.concatenate(([0], edges))
    # Words begin at even edges and end at odd ones (a piece ends with a newline); a label and its value
    # are two words with just a colon between.
    starts, ends = edges[0::2], edges[1::2]
    labels_end, values_start, values_end = ends[0::2], starts[1::2], ends[1::2]
    well_formed = (
        len(labels_end) == len(values_end)
        and bool((data[labels_end] == ord(":")).all())
        and bool((values_start == labels_end + 1).all())
        and bool(_SPACE[data[values_end]].all())
        and np.count_nonzero(data == ord(":")) == len(labels_end)
    )
    if not well_formed:
        _explain(path, piece, line, columns)
    labels, values = _integers(data, starts[0::2], labels_end), _decimals(data, values_start, values_end)
    if labels is None or values is None:  # an unusual way to write numbers: slower, and any way is read
        numbers = _numbers(piece.replace(b":", b" "))
        if numbers is None or len(numbers) != len(starts):
            _explain(path, piece, line, columns)
        labels, values = numbers[0::2], numbers[1::2]
    wrong = (labels != np.floor(labels)) | (labels < 0) | (labels >= columns) | np.isnan(values)
    if wrong.any():
        _explain(path, piece, line, columns)
    counts = np.diff(np.searchsorted(labels_end, newlines), prepend=0)
    with np.errstate(over="ignore"):
        return labels.astype(np.int64), values.astype(np.float32), counts


def _integers(data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray | None:
    """The whole numbers at data[starts[i]:ends[i]], int64; None unless all have at most 15 digits."""
    lengths = ends - starts
    longest = int(lengths.max(initial=0))
    if longest > 15:
        return None
    numbers = np.zeros(len(starts), np.int64)
    for i in range(longest):
        digits = data[np.minimum(starts + i, len(data) - 1)] - np.uint8(ord("0"))  # wraps below "0"
        inside = i < lengths
        if (inside & (digits > 9)).any():
            return None
        numbers = np.where(inside, numbers * 10 + digits, numbers)
    return numbers


def _decimals(data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray | None:
    """The decimal fractions at data[starts[i]:ends[i]], float64; None unless all are plain.

    Up to 15 digits and a power of ten are exact in float64, so that the quotient is the nearest number.
    """
    negative = data[starts] == ord("-")
    starts = starts + negative
    dots = np.flatnonzero(data == ord("."))
    words = np.searchsorted(starts, dots, side="right") - 1
    if not len(starts) or (words < 0).any() or (dots >= ends[words]).any() or (np.diff(words) == 0).any():
        return None if len(starts) else np.zeros(0)
    dot_at = ends.copy()
    dot_at[words] = dots
    fraction_starts = np.minimum(dot_at + 1, ends)
    digits = ends - fraction_starts
    if (ends - starts).max() > 16 or ((dot_at - starts) + digits).min() < 1:
        return None
    whole, fraction = _integers(data, starts, dot_at), _integers(data, fraction_starts, ends)
    if whole is None or fraction is None:
        return None
    scale = np.power(10.0, digits)
    numbers = (whole * scale + fraction) / scale
    return np.where(negative, -numbers, numbers)


def _numbers(text: bytes) -> np.ndarray | None:
    """All numbers of white-space separated text, float64; None if something is not a number."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # how older numpy says "unmatched data"
        try:
            return np.fromstring(text, np.float64, sep=" ") if text.strip() else np.zeros(0)
        except (DeprecationWarning, ValueError):
            return None


def _explain(path: Path, piece: bytes, line: int, columns: int) -> NoReturn:
    """Raises for the first line of a wrong piece that is wrong, saying how."""
    fix = "a line is label:value pairs separated by blanks, zero-based"
    for row, text in enumerate(piece.split(b"\n"), line):
        for word in text.split():
            match = _ENTRY.fullmatch(word)
            if match is None:
                raise UserError(f"{_shown(word)} is not label:value", file=path, row=row, fix=fix)
            label = match[1].lstrip(b"0") or b"0"
            if len(label) > 12 or int(label) >= columns:
                raise UserError(
                    f"label {_shown(label)[1:-1]} is outside the {columns} columns of the header",
                    file=path,
                    row=row,
                    fix=f"labels are 0 to {columns - 1}" if columns else "the header must count the columns",
                )
            if match[2].lower().endswith(b"nan"):
                raise UserError("a value is not a number (nan)", file=path, row=row, fix=fix)
    raise UserError("cannot be read", file=path, row=line, fix=fix)


def _repair(
    labels: np.ndarray, values: np.ndarray, counts: np.ndarray, line: int, columns: int, report: SparseReport
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorts the rows of a piece and drops repeated labels; returns labels (int32), values and counts."""
    rows = np.repeat(np.arange(len(counts)), counts)
    keys = rows * max(columns, 1) + labels  # increasing if and only if every row is
    steps = np.diff(keys)
    if (steps > 0).all():
        return labels.astype(np.int32), values, counts
    report.unsorted += (np.unique(rows[1:][steps < 0]) + line).tolist()
    wrong_rows = np.zeros(len(counts), bool)
    wrong_rows[rows[1:][steps <= 0]] = True
    wrong = np.flatnonzero(wrong_rows[rows])
    order = np.arange(len(keys))
    order[wrong] = wrong[np.lexsort((-values[wrong], keys[wrong]))]
    keys, labels, values = keys[order], labels[order], values[order]  # entries stay in their rows
    kept = np.concatenate(([True], np.diff(keys) > 0))
    report.duplicated += (np.unique(rows[~kept]) + line).tolist()
    return labels[kept].astype(np.int32), values[kept], np.bincount(rows[kept], minlength=len(counts))


def load_npz(path: str | os.PathLike[str], fix: str) -> scipy.sparse.csr_matrix:
    """Opens what `scipy.sparse.save_npz` wrote, its indices checked.

    Raises:
      UserError: if it is anything but a matrix of numbers.
    """
    try:
        # scipy loads with allow_pickle=False: a file cannot run code.
        with open(path, "rb") as file:
            matrix: Any = scipy.sparse.load_npz(file)
        if hasattr(matrix, "check_format"):
            matrix.check_format(full_check=True)
            # Of a matrix that ends empty SciPy's check passes over what comes between, and then reads there.
            if (np.diff(matrix.indptr) < 0).any():
                raise ValueError("indptr must not decrease")
        if matrix.ndim != 2 or matrix.dtype.kind not in "buif":
            raise ValueError(f"{matrix.ndim} dimensions of {matrix.dtype}")
        if matrix.format != "csr":  # whose rows are all in the file
            _check_lacking(Path(path), matrix.shape[0], matrix.nnz)
        return scipy.sparse.csr_matrix(matrix)
    except FileNotFoundError:
        raise UserError("no such file", file=path, fix=fix) from None
    except (UserError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # SciPy takes what it finds for what it wrote, and stumbles on anything else
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"not a sparse matrix ({reason})", file=path, fix=fix) from None


def _read_npz(path: Path, report: SparseReport) -> scipy.sparse.csr_matrix:
    matrix: Any = load_npz(path, fix="write it with scipy.sparse.save_npz")
    if max(matrix.shape) > MAX_SIZE:
        raise UserError(f"a matrix of {matrix.shape} is too large", file=path)
    values = matrix.data.astype(np.float32, copy=False)
    if np.isnan(values).any():
        row = int(np.searchsorted(matrix.indptr, np.flatnonzero(np.isnan(values))[0], side="right"))
        raise UserError("a value is not a number (nan)", file=path, row=row, fix="drop the entry")
    indices, counts = matrix.indices, np.diff(matrix.indptr)
    steps = np.diff(indices.astype(np.int64))
    steps[matrix.indptr[1:-1][(matrix.indptr[1:-1] > 0) & (matrix.indptr[1:-1] < matrix.nnz)] - 1] = 1
    if (steps <= 0).any():
        labels = indices.astype(np.int64)
        indices, values, counts = _repair(labels, values, counts, 1, matrix.shape[1], report)
    indptr = np.concatenate(([0], np.cumsum(counts)))
    result = scipy.sparse.csr_matrix(
        (values, indices.astype(np.int32, copy=False), indptr), shape=matrix.shape, copy=False
    )
    result.has_sorted_indices = result.has_canonical_format = True
    return result


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest


def _shown(text: bytes) -> str:
    shown = text.strip().decode("utf-8", "replace")
    return repr(shown if len(shown) <= 40 else shown[:37] + "...")
