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
) -> Found:
    """Joins a search over labels with one over training queries.

    Both score lists of a query are joined and a softmax is taken over them; a training query hands its weight
    to each of its relevant labels. The final score of a label is

      (1 - query_weight) * its own softmax weight + query_weight * the sum of the weights of the training
      queries found that have it.

    Args:
      labels: ids int32 [Q, K] and scores float32 [Q, K] of a search over labels; -1 where there are fewer.
      neighbours: the same of a search over training queries, [Q, K'].
      train_targets: csr_matrix [N, L]; its stored entries are the relevant labels.
      k: labels returned a query.
      query_weight: from 0 (labels alone, in their order) up to below 1; ViXML has 0.1.
      temperature: of the softmax, in units of cosine.

    Returns:
      ids int32 [Q, k] and final scores float32 [Q, k], best first, equal ones by label number; -1 and -inf
      where a query has fewer than k.
    """
    num_train, num_labels = train_targets.get_shape()
    ones = np.ones(train_targets.nnz, np.float32)
    targets = scipy.sparse.csr_matrix(
        (ones, train_targets.indices, train_targets.indptr), shape=(num_train, num_labels)
    )
    num_queries = len(labels[0])
    ids_QK = np.full((num_queries, k), -1, np.int32)
    scores_QK = np.full((num_queries, k), -np.inf, np.float32)
    for start in range(0, num_queries, QUERIES_AT_ONCE):
        part = slice(start, start + QUERIES_AT_ONCE)
        own_QK, handed_QK = _softmax(labels[1][part], neighbours[1][part], temperature)
        own = _sparse(labels[0][part], own_QK, num_labels)
        handed = _sparse(neighbours[0][part], handed_QK, num_train) @ targets
        final = scipy.sparse.csr_matrix((1 - query_weight) * own + query_weight * handed)
        _best(final, ids_QK[part], scores_QK[part])
    return ids_QK, scores_QK


def _softmax(first_QK: np.ndarray, second_QK: np.ndarray, temperature: float) -> Found:
    """Weights of both lists under one softmax a row; what is not there, at -inf, weighs 0."""
    joined = np.concatenate([first_QK, second_QK], axis=1).astype(np.float64) / temperature
    highest = joined.max(axis=1, keepdims=True, initial=-np.inf)
    weights = np.exp(joined - np.where(np.isfinite(highest), highest, 0))
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return weights[:, : first_QK.shape[1]], weights[:, first_QK.shape[1] :]


def _sparse(ids_QK: np.ndarray, weights_QK: np.ndarray, columns: int) -> scipy.sparse.csr_matrix:
    found_QK = ids_QK >= 0
    indptr = np.concatenate([[0], np.cumsum(found_QK.sum(axis=1))])
    return scipy.sparse.csr_matrix(
        (weights_QK[found_QK], ids_QK[found_QK], indptr), shape=(len(ids_QK), columns)
    )


def _best(scores: scipy.sparse.csr_matrix, ids_QK: np.ndarray, scores_QK: np.ndarray) -> None:
    """Writes the highest stored scores of each row into `ids_QK` and `scores_QK`."""
    starts = np.asarray(scores.indptr)
    rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    order = np.lexsort((scores.indices, np.negative(scores.data), rows))
    ranks = np.arange(len(rows)) - starts[rows]  # rows keep their places, so ranks count within them
    kept = ranks < ids_QK.shape[1]
    ids_QK[rows[kept], ranks[kept]] = scores.indices[order][kept]
    scores_QK[rows[kept], ranks[kept]] = scores.data[order][kept]
