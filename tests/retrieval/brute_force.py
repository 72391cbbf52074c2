"""Exact search as the whole matrix of scores, sorted stably, and what holds an index against it."""

from __future__ import annotations

import numpy as np


def reference(queries, labels, k):
    """The whole matrix, sorted stably."""
    scores = queries @ labels.T
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(scores, ids, axis=1)
    missing = ((0, 0), (0, k - ids.shape[1]))
    return np.pad(ids, missing, constant_values=-1), np.pad(scores, missing, constant_values=-np.inf)


def whole(rng, *shape):
    """Small whole numbers: exact products in bfloat16 as well, the same in any order, and many ties."""
    return rng.integers(-3, 4, shape).astype(np.float32)


def assert_same(index, queries, labels, k):
    ids, scores = index.search(queries, k)
    wanted_ids, wanted_scores = reference(queries, labels, k)
    np.testing.assert_array_equal(ids, wanted_ids)
    np.testing.assert_array_equal(scores, wanted_scores)
    assert ids.dtype == np.int32
    assert scores.dtype == np.float32
