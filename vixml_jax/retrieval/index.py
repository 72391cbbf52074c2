"""What every label index can do, and how one lies on disk.

A saved index is a directory with the data files of its kind and `index.json`: format version, kind, number of
labels, dim, what was measured, and the SHA-256 of every data file. All paths in it are relative.

Shape suffixes: Q queries, L labels, D width of an embedding, K the top k. docs/notation.md has them all.
"""

from __future__ import annotations

import abc
import operator
import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vixml_jax import files
from vixml_jax.errors import UserError

HEADER = "index.json"
VERSION = 1
REBUILD = "delete the directory and build the index again"
# Products of embeddings no larger than this are finite in float32 at any width.
LARGEST = 1e15
# Rows looked at together when values are checked: keeps the working memory small.
CHECK_ROWS = 65536


class Index(abc.ABC):
    """Searches L label embeddings for the highest inner products.

    Attributes:
      kind: name of the kind, as `retrieval.build` takes it.
      num_labels: L.
      dim: D.
      measured: what was measured when the index was built, JSON-able; empty for exact search.
    """

    kind: ClassVar[str]

    def __init__(self, num_labels: int, dim: int, measured: dict[str, Any] | None = None):
        self.num_labels, self.dim, self.measured = num_labels, dim, dict(measured or {})

    def search(self, queries: np.typing.ArrayLike, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Finds the k labels with the highest inner product for each query.

        Args:
          queries: [Q, D], any float type, finite. Need not be normalised; scores are plain inner products.
          k: labels a query, at least 1; may be more than there are.

        Returns:
          ids, int32 [Q, k], best first, and scores, float32 [Q, k]; -1 and -inf where a query has fewer than
          k.

        Raises:
          UserError: if queries are not a finite matrix of `dim` columns, or k is not a positive number.
        """
        queries_QD = checked(queries, "queries")
        if queries_QD.shape[1] != self.dim:
            raise UserError(
                f"queries have {queries_QD.shape[1]} columns, the index {self.dim}",
                fix="embed both with the same model",
            )
        check_k(k)
        ids_QK = np.full((len(queries_QD), k), -1, np.int32)
        scores_QK = np.full((len(queries_QD), k), -np.inf, np.float32)
        found = min(k, self.num_labels)
        if len(queries_QD):
            ids_QK[:, :found], scores_QK[:, :found] = self._search(queries_QD, found)
        return ids_QK, scores_QK

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the index to `directory`, which appears, or is replaced, only when it is whole."""
        with files.atomic_dir(directory) as temporary:
            self._write(temporary)
            names = sorted(path.name for path in temporary.iterdir())
            header = {
                "version": VERSION,
                "kind": self.kind,
                "num_labels": self.num_labels,
                "dim": self.dim,
                "measured": self.measured,
                "sha256": {name: files.sha256(temporary / name) for name in names},
            }
            files.write_json(temporary / HEADER, header)

    @abc.abstractmethod
    def _search(self, queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """`search` for checked queries, Q > 0 and 1 <= k <= num_labels."""

    @abc.abstractmethod
    def _write(self, directory: Path) -> None:
        """Writes the data files, all directly into `directory`."""


def read(directory: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Reads the header of a saved index and checks its data files against it.

    Returns:
      The directory, and the header: "kind", "num_labels", "dim" and "measured".

    Raises:
      UserError: if there is no index, or one of another version, or a file is missing, added or changed.
    """
    directory = Path(directory)
    path = directory / HEADER
    if not path.is_file():
        raise UserError("no index here", file=directory, fix=REBUILD)
    header = files.read_json(path)
    if not isinstance(header, dict) or header.get("version") != VERSION:
        raise UserError(f"not an index of format version {VERSION}", file=path, fix=REBUILD)
    types = {"kind": str, "num_labels": int, "dim": int, "measured": dict, "sha256": dict}
    if broken := [name for name, kind in types.items() if not isinstance(header.get(name), kind)]:
        raise UserError(f"{broken[0]!r} is missing or damaged", file=path, fix=REBUILD)
    if header["num_labels"] < 1 or header["dim"] < 1:
        raise UserError("an index of no labels", file=path, fix=REBUILD)
    # Exactly the files that were written: ScaNN's loader would unpickle one that somebody put beside them.
    present = {entry.name for entry in directory.iterdir()} - {HEADER}
    for name in sorted(present | set(header["sha256"])):
        if name not in present:
            raise UserError("this file of the index is missing", file=directory / name, fix=REBUILD)
        if name not in header["sha256"] or name.endswith(".pkl"):
            raise UserError("this file is not of the index", file=directory / name, fix="delete this file")
        if not (directory / name).is_file() or files.sha256(directory / name) != header["sha256"][name]:
            raise UserError(
                "this file of the index is truncated, damaged or stale", file=directory / name, fix=REBUILD
            )
    return directory, header


def checked(values: np.typing.ArrayLike, what: str) -> np.ndarray:
    """Returns a contiguous float32 matrix, copied only where it is not one yet.

    Raises:
      UserError: if it is no matrix of finite numbers that fit inner products in float32.
    """
    try:
        array = np.asarray(values)
        if array.dtype.kind in "cOSUmM":
            raise TypeError
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array, np.float32) if array.ndim else array
    except (TypeError, ValueError):
        raise UserError(f"{what} are not numbers", fix="give a matrix of one embedding a row") from None
    if array.ndim != 2:
        raise UserError(f"{what} have shape {array.shape}", fix="give a matrix of one embedding a row")
    for start in range(0, len(array), CHECK_ROWS):
        block = array[start : start + CHECK_ROWS]
        if not block.size:
            break
        # A NaN fails both comparisons, an inf one of them.
        if not (block.max() <= LARGEST and block.min() >= -LARGEST):
            bad = ~(np.abs(block) <= LARGEST).all(axis=1)
            row = start + int(np.flatnonzero(bad)[0])
            raise UserError(
                f"{what}: row {row} holds NaN, inf or a value beyond {LARGEST:.0e}",
                fix="look for a diverged model or a broken file",
            )
    return array


def checked_labels(embeddings: np.typing.ArrayLike) -> np.ndarray:
    """`checked`, of at least one label and one column."""
    labels_LD = checked(embeddings, "label embeddings")
    if not labels_LD.size:
        raise UserError(
            f"label embeddings have shape {labels_LD.shape}", fix="give at least one label and column"
        )
    return labels_LD


def check_blocks(query_block: int, label_block: int) -> None:
    """Raises a UserError unless both are at least 1."""
    if query_block < 1 or label_block < 1:
        raise UserError(
            f"query_block is {query_block}, label_block {label_block}", fix="give at least 1 for each"
        )


def check_k(k: Any) -> None:
    """Raises a UserError unless k is a whole number of at least 1."""
    try:
        fine = operator.index(k) >= 1
    except TypeError:
        fine = False
    if not fine:
        raise UserError(f"k is {k!r}", fix="give a whole number of at least 1")
