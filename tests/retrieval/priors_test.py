"""Label priors: the formula, label by label; new labels count as the mean; nothing is lost or doubled."""

from __future__ import annotations

import math

import fresh
import numpy as np
import scipy.sparse

from vixml_jax.retrieval.priors import add_priors, log_priors

RNG = np.random.default_rng(fresh.seeds(1))


def test_it_is_the_formula():
    targets = scipy.sparse.csr_matrix(RNG.random((30, 12)) < 0.3)
    ids = np.stack([RNG.permutation(15)[:7] for _ in range(9)]).astype(np.int32)  # 12 and up came later
    scores = -np.sort(-RNG.normal(size=ids.shape)).astype(np.float32)
    ids[2, 4:], scores[2, 4:] = -1, -np.inf
    found, found_scores = add_priors((ids, scores), log_priors(targets), 0.4)

    logs = [math.log(1 + sum(targets[row, label] for row in range(30))) for label in range(12)]
    for row in range(9):
        expected = []
        for label, score in zip(ids[row].tolist(), scores[row].tolist(), strict=True):
            if label >= 0:
                own = logs[label] - sum(logs) / 12 if label < 12 else 0.0
                expected.append((-(score + 0.4 * own), label))
        expected.sort()
        count = len(expected)
        assert found[row, :count].tolist() == [label for _, label in expected]
        np.testing.assert_allclose(found_scores[row, :count], [-minus for minus, _ in expected], rtol=1e-5)
        assert (found[row, count:] == -1).all()
        assert np.isneginf(found_scores[row, count:]).all()


def test_without_weight_nothing_is_touched():
    found = (np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32))
    assert add_priors(found, np.ones(1, np.float32), 0.0) is found


def test_equal_scores_go_by_label_number():
    ids, _ = add_priors(
        (np.array([[2, 1, 0]], np.int32), np.ones((1, 3), np.float32)), np.zeros(3, np.float32), 1.0
    )
    assert ids.tolist() == [[0, 1, 2]]
