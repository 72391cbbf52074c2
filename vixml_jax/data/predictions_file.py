"""Prediction files: JSONL as `vixml predict` writes it, a CSR matrix in `.npz`, or sparse text.

A line of the JSONL is {"uid": ..., "labels": [{"index": 3, "score": 0.71, ...}, ...]}: row i of the matrix is
line i, and only `index` and `score` are read.
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from vixml_jax import files
from vixml_jax.data import sparse_text, text_lines
from vixml_jax.errors import UserError

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
FIX = 'a line is {"labels": [{"index": 3, "score": 0.71}, ...]}'


def read(path: str | os.PathLike[str], num_labels: int | None = None) -> scipy.sparse.csr_matrix:
    """Reads predictions of any of the three kinds, told apart by suffix; text and JSONL may be gzipped.

    Args:
      path: `.npz`, `.jsonl`, `.json`, else sparse text.
      num_labels: columns of a JSONL file's matrix, which does not say; by default up to its largest index.

    Returns:
      csr_matrix [rows, labels] of float32 scores, int32 indices rising in each row; every stored entry is a
      prediction. Of a label that a row names twice the higher score is kept.

    Raises:
      UserError: naming file and line, if the file is not of its form.
    """
    path = Path(path)
    if path.name.lower().endswith(JSONL_SUFFIXES):
        return _read_jsonl(path, num_labels)
    return sparse_text.read_sparse(path)


def write_npz(path: str | os.PathLike[str], predictions: scipy.sparse.csr_matrix) -> None:
    """Writes predictions as `read` reads them, atomically."""
    with files.atomic_file(path) as file:
        scipy.sparse.save_npz(file, predictions, compressed=False)


def _read_jsonl(path: Path, num_labels: int | None) -> scipy.sparse.csr_matrix:
    counts, labels, scores = [], [], []
    line = 1
    for piece in text_lines.pieces(path):
        parsed = _parse_fast(piece)
        if parsed is None or not _well_formed(*parsed, num_labels):
            parsed = _parse_slowly(piece, path, line, num_labels)
        counts.append(parsed[0])
        labels.append(parsed[1].astype(np.int32))
        with np.errstate(over="ignore"):  # beyond float32 is infinite
            scores.append(parsed[2].astype(np.float32))
        line += piece.count(b"\n")
    if not counts:
        raise UserError("no predictions", file=path, fix=FIX)
    indptr = np.concatenate(([0], np.cumsum(np.concatenate(counts))))
    indices, values = np.concatenate(labels), np.concatenate(scores)
    del labels, scores
    columns = num_labels if num_labels is not None else int(indices.max(initial=-1)) + 1
    matrix: Any = scipy.sparse.csr_matrix((values, indices, indptr), shape=(len(indptr) - 1, columns))
    matrix.sort_indices()
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    twice = (np.diff(matrix.indices) == 0) & (np.diff(rows) == 0)
    if not twice.any():
        matrix.has_canonical_format = True
        return matrix
    order = np.lexsort((-matrix.data, matrix.indices, rows))
    kept = np.concatenate(([True], ~twice))
    indptr = np.concatenate(([0], np.cumsum(np.bincount(rows[kept], minlength=matrix.shape[0]))))
    return scipy.sparse.csr_matrix(
        (matrix.data[order][kept], matrix.indices[order][kept], indptr), shape=matrix.shape
    )


def _parse_fast(piece: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Predictions per line int64 [lines], labels int64 and scores float64 of whole lines.

    None unless every line has the usual form; what is unusual, or wrong, is read line by line.
    """
    import pyarrow as pa
    import pyarrow.json

    # At a first record that is null pyarrow 26 ends the process; the usual form is an object a line.
    num_lines = piece.count(b"\n")
    if piece.count(b"\n{") != num_lines - 1 or not piece.startswith(b"{"):
        return None
    schema = pa.schema([("labels", pa.list_(pa.struct([("index", pa.int64()), ("score", pa.float64())])))])
    options = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    # One block, so that a long line never has to fit a smaller one.
    reading = pyarrow.json.ReadOptions(block_size=len(piece) + 1)
    try:
        table = pyarrow.json.read_json(io.BytesIO(piece), reading, options)
    except pa.ArrowInvalid:
        return None
    if table.num_rows != num_lines:
        return None
    column: Any = table.column("labels").combine_chunks()
    entries = column.flatten()
    labels, scores = entries.field("index"), entries.field("score")
    if column.null_count or entries.null_count or labels.null_count or scores.null_count:
        return None
    counts = np.asarray(column.value_lengths().to_numpy(zero_copy_only=False), np.int64)
    return counts, labels.to_numpy(), scores.to_numpy()


def _well_formed(counts: np.ndarray, labels: np.ndarray, scores: np.ndarray, num_labels: int | None) -> bool:
    highest = sparse_text.MAX_SIZE if num_labels is None else num_labels
    return not len(labels) or bool(labels.min() >= 0 and labels.max() < highest and np.isfinite(scores).all())


def _parse_slowly(
    piece: bytes, path: Path, line: int, num_labels: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `_parse_fast`; skips blank lines.

    Raises:
      UserError: for the first line that is wrong.
    """
    counts, labels, scores = [], [], []
    highest = sparse_text.MAX_SIZE if num_labels is None else num_labels
    for row, text in enumerate(piece[:-1].split(b"\n"), line):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):  # also of numbers of thousands of digits
            raise UserError("not valid JSON", file=path, row=row, fix=FIX) from None
        entries = record.get("labels") if isinstance(record, dict) else None
        if not isinstance(entries, list):
            raise UserError('no list "labels"', file=path, row=row, fix=FIX)
        for entry in entries:
            found: dict[str, Any] = entry if isinstance(entry, dict) else {}
            index, score = found.get("index"), found.get("score")
            if type(index) is not int or not (type(score) is int or type(score) is float):
                raise UserError('a label without "index" and "score"', file=path, row=row, fix=FIX)
            if not 0 <= index < highest:
                raise UserError(
                    f"label {index} of {highest} labels", file=path, row=row, fix=f"give 0 to {highest - 1}"
                )
            if score != score or (type(score) is int and abs(score) > sys.float_info.max):
                problem = "is not a number" if score != score else "is too large"
                raise UserError(f"the score of label {index} {problem}", file=path, row=row, fix=FIX)
            labels.append(index)
            scores.append(float(score))
        counts.append(len(entries))
    return np.array(counts, np.int64), np.array(labels, np.int64), np.array(scores, np.float64)
