"""Which predictions are right, and at what rank: what every ranking metric is a sum over.

Only NumPy and SciPy. Work goes on in blocks of rows, so that memory does not grow with the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse

from vixml_jax.errors import UserError

# Predictions ranked at a time: bounds the working memory to some tens of MB.
BLOCK_ENTRIES = 1 << 20
# Rows are laid side by side as long as that takes at most this many times their entries.
MOST_PADDING = 4


class Hits(NamedTuple):
    """The predictions that are right, in the order of the rows.

    Attributes:
      rows: int64 [H]; row of the truth.
      labels: int64 [H]; label number.
      ranks: int64 [H]; zero-based rank among the row's predictions.
    """

    rows: np.ndarray
    labels: np.ndarray
    ranks: np.ndarray


def find_hits(predictions: Any, truth: Any, filter_pairs: np.ndarray | None = None) -> Hits:
    """Ranks each row's predictions and returns those that are relevant.

    Args:
      predictions: sparse matrix of scores [N, L], or (ids [N, k], scores [N, k]) with ids of -1 for none.
      truth: sparse 0/1 matrix [N, L].
      filter_pairs: whole numbers [n, 2] of (row, label), taken out of the predictions before they are ranked.

    Returns:
      The relevant predictions, by rising row and rank.

    Raises:
      UserError: if shapes do not fit, a label is out of range, or a score is not a number.
    """
    truth = binary(truth, "truth")
    num_rows, num_labels = truth.shape
    predictions = _checked_predictions(predictions, truth.shape)
    filtered_keys = _pair_keys(filter_pairs, truth.shape)
    found = []
    for start, stop in _row_blocks(predictions, num_rows):
        rows, labels, scores = _entries(predictions, start, stop)
        keys = rows * num_labels + labels  # rising, and no key twice
        truth_entries = slice(*truth.indptr[[start, stop]])
        truth_rows = np.repeat(np.arange(start, stop), np.diff(truth.indptr[start : stop + 1]))
        relevant = np.zeros(len(keys), bool)
        relevant[_positions(keys, truth_rows * num_labels + truth.indices[truth_entries])] = True
        pairs = slice(*np.searchsorted(filtered_keys, [start * num_labels, stop * num_labels]))
        filtered = _positions(keys, filtered_keys[pairs])
        if len(filtered):
            kept = np.ones(len(keys), bool)
            kept[filtered] = False
            rows, labels, scores, relevant = rows[kept], labels[kept], scores[kept], relevant[kept]
        counts = np.bincount(rows - start, minlength=stop - start)
        order = _by_score(scores, counts)
        ranked = np.flatnonzero(relevant[order])
        hit_rows = rows[order[ranked]]
        before = (np.cumsum(counts) - counts)[hit_rows - start]
        found.append(Hits(hit_rows, labels[order[ranked]], ranked - before))
    return Hits(*(np.concatenate([part[i] for part in found]) for i in range(3)))


def best_ranking(truth: Any, weights_L: np.ndarray, depth: int) -> Hits:
    """Ranks each row's positives by weight (float64 [L]), heaviest first, and returns the first `depth`."""
    found = []
    for start, stop in _row_blocks(truth, truth.shape[0]):
        labels = truth.indices[truth.indptr[start] : truth.indptr[stop]].astype(np.int64)
        counts = np.diff(truth.indptr[start : stop + 1])
        rows = np.repeat(np.arange(start, stop), counts)
        order = _by_score(weights_L[labels], counts)
        ranks = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        kept = ranks < depth
        found.append(Hits(rows[kept], labels[order][kept], ranks[kept]))
    return Hits(*(np.concatenate([part[i] for part in found]) for i in range(3)))


def binary(matrix: Any, name: str) -> Any:
    """Returns a 0/1 matrix as csr_matrix, rows sorted, no stored zeros; copied only if that changes it.

    Raises:
      UserError: calling it `name`, if it is no matrix or has no rows.
    """
    if not scipy.sparse.issparse(matrix) and not (isinstance(matrix, np.ndarray) and matrix.ndim == 2):
        raise UserError(f"the {name} is no sparse matrix", fix="give a scipy.sparse.csr_matrix")
    csr: Any = scipy.sparse.csr_matrix(matrix)
    if not csr.shape[0]:
        raise UserError(f"the {name} has no rows")
    if not csr.has_canonical_format or (csr.data == 0).any():
        csr = csr.copy()
        csr.sum_duplicates()
        csr.eliminate_zeros()
    return csr


def _row_blocks(entries: Any, num_rows: int) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of runs of rows with about BLOCK_ENTRIES entries."""
    if isinstance(entries, tuple):
        ends = np.arange(1, num_rows + 1) * max(entries[0].shape[1], 1)
    else:
        ends = entries.indptr[1:].astype(np.int64)
    start, done = 0, 0
    while start < num_rows:
        stop = max(int(np.searchsorted(ends, done + BLOCK_ENTRIES, side="right")), start + 1)
        yield start, stop
        start, done = stop, int(ends[stop - 1])


def _entries(predictions: Any, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows and labels (int64) and scores (floating) of a block's predictions, by rising row and label."""
    if isinstance(predictions, tuple):
        ids, scores = predictions[0][start:stop], predictions[1][start:stop]
        present = ids >= 0
        rows = np.repeat(np.arange(start, stop), present.sum(1))
        labels, scores = ids[present].astype(np.int64), scores[present]
    else:
        entries = slice(*predictions.indptr[[start, stop]])
        rows = np.repeat(np.arange(start, stop), np.diff(predictions.indptr[start : stop + 1]))
        labels, scores = predictions.indices[entries].astype(np.int64), predictions.data[entries]
    if scores.dtype.kind != "f":
        scores = scores.astype(np.float64)
    if np.isnan(scores).any():
        row = int(rows[np.flatnonzero(np.isnan(scores))[0]])
        raise UserError(f"a score of row {row} (zero-based) is not a number", fix="drop that prediction")
    same_row = rows[1:] == rows[:-1]
    if (same_row & (labels[1:] <= labels[:-1])).any():
        order = _by_score(-labels.astype(np.float64), np.bincount(rows - start, minlength=stop - start))
        labels, scores = labels[order], scores[order]
        if (same_row & (labels[1:] == labels[:-1])).any():
            # Of a label that stands twice in a row the higher score comes first, and stays.
            order = np.lexsort((-scores, labels, rows))
            labels, scores = labels[order], scores[order]
            kept = np.ones(len(rows), bool)
            kept[1:] = ~same_row | (labels[1:] != labels[:-1])
            rows, labels, scores = rows[kept], labels[kept], scores[kept]
    return rows, labels, scores


def _by_score(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sorts each run of `counts` [R] entries by falling score; equal scores stay as they stand.

    Returns:
      int64 [E], the entry that comes at each place.
    """
    if not len(scores):
        return np.zeros(0, np.int64)
    width = int(counts.max())
    if len(counts) * width > MOST_PADDING * len(scores):
        return np.lexsort((-scores, np.repeat(np.arange(len(counts)), counts)))
    # Rows of about one length: sorting them side by side is ten times faster than all in one.
    filled_RK = np.arange(width) < counts[:, None]
    scores_RK = np.full(filled_RK.shape, np.inf, scores.dtype)
    scores_RK[filled_RK] = -scores
    order_RK = np.argsort(scores_RK, axis=1, kind="stable")  # padding stands last, and so stays last
    order_RK += (np.cumsum(counts) - counts)[:, None]
    return order_RK[filled_RK]


def _positions(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where the `wanted` that occur in the rising `keys` stand there."""
    if not len(keys):
        return np.zeros(0, np.int64)
    at = np.searchsorted(keys, wanted)
    at[at == len(keys)] = 0  # larger than every key, so that it cannot equal the first one
    return at[keys[at] == wanted]


def _pair_keys(filter_pairs: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    """Filter pairs as rising int64 keys row * L + label."""
    if filter_pairs is None or not len(filter_pairs):
        return np.zeros(0, np.int64)
    pairs = np.asarray(filter_pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
        raise UserError(
            f"filter pairs of shape {pairs.shape} and type {pairs.dtype}", fix="give whole numbers [n, 2]"
        )
    wrong = ((pairs < 0) | (pairs >= np.asarray(shape))).any(1)
    if wrong.any():
        row, label = pairs[np.flatnonzero(wrong)[0]].tolist()
        raise UserError(
            f"filter pair {row} {label} is outside the truth's {shape[0]} rows and {shape[1]} labels",
            fix="give the pairs of this truth, zero-based",
        )
    return np.sort(pairs[:, 0].astype(np.int64) * shape[1] + pairs[:, 1].astype(np.int64))


def _checked_predictions(predictions: Any, shape: tuple[int, int]) -> Any:
    """Returns a csr_matrix, or a tuple of arrays (ids, scores)."""
    if scipy.sparse.issparse(predictions):
        if predictions.shape != shape:
            raise UserError(
                f"the predictions are {predictions.shape[0]} x {predictions.shape[1]}, "
                f"the truth is {shape[0]} x {shape[1]}",
                fix="give two matrices of one shape, rows by labels",
            )
        return scipy.sparse.csr_matrix(predictions)
    if not isinstance(predictions, (tuple, list)) or len(predictions) != 2:
        raise UserError(
            f"predictions of type {type(predictions).__name__}",
            fix="give a csr_matrix of scores, or (ids, scores)",
        )
    ids, scores = np.asarray(predictions[0]), np.asarray(predictions[1])
    if ids.ndim != 2 or ids.shape != scores.shape or ids.dtype.kind not in "iu":
        raise UserError(
            f"ids {ids.shape} of {ids.dtype}, scores {scores.shape}",
            fix="give whole numbers and scores, [N, k]",
        )
    if len(ids) != shape[0]:
        raise UserError(f"{len(ids)} rows of predictions for the truth's {shape[0]}", fix="give one a row")
    if ids.size and (ids.min() < -1 or ids.max() >= shape[1]):
        wrong = ids.min() if ids.min() < -1 else ids.max()
        raise UserError(
            f"predicted label {wrong} of {shape[1]} labels", fix=f"give 0 to {shape[1] - 1}, or -1 for none"
        )
    return ids, scores
