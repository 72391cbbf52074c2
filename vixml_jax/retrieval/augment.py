"""Retrieval-augmented inference: training queries near a query hand their labels on to it (ViXML).

Two searches, one over labels and one over training queries, share one softmax: a label's final score is its
own weight and what its training queries near the query weigh.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse

# Queries put together at a time: bounds memory, whatever their number.
QUERIES_AT_ONCE = 2048

Found = tuple[np.ndarray, np.ndarray]


def augment(
    labels: Found,
    neighbours: Found,
    train_targets: scipy.sparse.csr_matrix,
    *,
    k: int,
    query_weight: float = 0.1,
    temperature: float = 0.05,
    lending: scipy.sparse.csr_matrix | None = None,
) -> Found:
    """Joins a search over labels with one over training queries.

    Both score lists of a query are joined and a softmax is taken over them; a training query hands its weight
    to each of its relevant labels. The final score of a label is

      (1 - query_weight) * its own softmax weight + query_weight * the sum of the weights of the training
      queries found that have it.

    A label that came after training is in no training query. With `lending` it gets instead shares of the
    sums of those that lend to it. Nothing here takes time or memory in proportion to all labels or all
    training queries: only what was found counts.

    Args:
      labels: ids int32 [Q, K] and scores float32 [Q, K] of a search over labels; -1 where there are fewer.
      neighbours: the same of a search over training queries, [Q, K'].
      train_targets: csr_matrix [N, L]; its stored entries are the relevant labels.
      k: labels returned a query.
      query_weight: from 0 (labels alone, in their order) up to below 1; ViXML has 0.1.
      temperature: of the softmax, in units of cosine.
      lending: csr_matrix [L, M]; row l has the shares of the sum of label l that labels below M get: 1 for
        itself, unless it is not to be found, and shares for labels that borrow from it. None for l alone.

    Returns:
      ids int32 [Q, k] and final scores float32 [Q, k], best first, equal ones by label number; -1 and -inf
      where a query has fewer than k.
    """
    num_queries = len(labels[0])
    ids_QK = np.full((num_queries, k), -1, np.int32)
    scores_QK = np.full((num_queries, k), -np.inf, np.float32)
    for start in range(0, num_queries, QUERIES_AT_ONCE):
        part = slice(start, start + QUERIES_AT_ONCE)
        own_QK, handed_QK = _softmax(labels[1][part], neighbours[1][part], temperature)
        handed, handed_to = _handed(neighbours[0][part], handed_QK, train_targets, lending)
        columns = np.union1d(handed_to, _there(labels[0][part]))
        own = _sparse(labels[0][part], own_QK, columns)
        handed = _renumbered(handed, np.searchsorted(columns, handed_to), len(columns))
        final = scipy.sparse.csr_matrix((1 - query_weight) * own + query_weight * handed)
        _best(final, columns, ids_QK[part], scores_QK[part])
    return ids_QK, scores_QK


def _handed(
    neighbours_QK: np.ndarray,
    weights_QK: np.ndarray,
    train_targets: scipy.sparse.csr_matrix,
    lending: scipy.sparse.csr_matrix | None,
) -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
    """What training queries hand labels: [Q, C], and the label of each of its C columns, increasing."""
    rows = _there(neighbours_QK)
    targets = scipy.sparse.csr_matrix(train_targets[rows])
    targets.data = np.ones(targets.nnz, np.float32)
    handed, labels = _product(_sparse(neighbours_QK, weights_QK, rows), targets)
    if lending is not None:
        handed, labels = _product(handed, scipy.sparse.csr_matrix(lending[labels]))
    return handed, labels


def _product(
    left: scipy.sparse.csr_matrix, right: scipy.sparse.csr_matrix
) -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
    """Left times right without empty columns, and which columns are left: SciPy takes time for each."""
    columns, places = np.unique(right.indices, return_inverse=True)
    shape = (right.get_shape()[0], len(columns))
    return left @ scipy.sparse.csr_matrix((right.data, places, right.indptr), shape=shape), columns


def _renumbered(
    matrix: scipy.sparse.csr_matrix, numbers: np.ndarray, columns: int
) -> scipy.sparse.csr_matrix:
    """The matrix with so many columns, each of its own at another number."""
    return scipy.sparse.csr_matrix(
        (matrix.data, numbers[matrix.indices], matrix.indptr), shape=(matrix.get_shape()[0], columns)
    )


def _there(ids_QK: np.ndarray) -> np.ndarray:
    """The ids that occur, each once, increasing; -1 is none."""
    return np.unique(ids_QK[ids_QK >= 0])


def _softmax(first_QK: np.ndarray, second_QK: np.ndarray, temperature: float) -> Found:
    """Weights of both lists under one softmax a row; what is not there, at -inf, weighs 0."""
    joined = np.concatenate([first_QK, second_QK], axis=1).astype(np.float64) / temperature
    highest = joined.max(axis=1, keepdims=True, initial=-np.inf)
    weights = np.exp(joined - np.where(np.isfinite(highest), highest, 0))
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return weights[:, : first_QK.shape[1]], weights[:, first_QK.shape[1] :]


def _sparse(ids_QK: np.ndarray, weights_QK: np.ndarray, columns: np.ndarray) -> scipy.sparse.csr_matrix:
    """Weights by query and id, a column for each of the ids in `columns`, which are increasing."""
    found_QK = ids_QK >= 0
    indptr = np.concatenate([[0], np.cumsum(found_QK.sum(axis=1))])
    return scipy.sparse.csr_matrix(
        (weights_QK[found_QK], np.searchsorted(columns, ids_QK[found_QK]), indptr),
        shape=(len(ids_QK), len(columns)),
    )


def _best(
    scores: scipy.sparse.csr_matrix, labels: np.ndarray, ids_QK: np.ndarray, scores_QK: np.ndarray
) -> None:
    """Writes the highest stored scores of each row into `ids_QK` and `scores_QK`; `labels` of the columns."""
    starts = np.asarray(scores.indptr)
    rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    order = np.lexsort((scores.indices, np.negative(scores.data), rows))
    ranks = np.arange(len(rows)) - starts[rows]  # rows keep their places, so ranks count within them
    kept = ranks < ids_QK.shape[1]
    ids_QK[rows[kept], ranks[kept]] = labels[scores.indices[order][kept]]
    scores_QK[rows[kept], ranks[kept]] = scores.data[order][kept]
