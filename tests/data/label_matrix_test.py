from __future__ import annotations

import time

import fresh
import numpy as np
import pytest
import scipy.sparse

from vixml_jax.data import label_matrix

(ENTROPY,) = fresh.seeds(1)


def random_targets(rng, num_rows=60, num_labels=25, density=0.12):
    dense = (rng.random((num_rows, num_labels)) < density).astype(np.float32)
    dense[0] = 0  # a query without labels
    return scipy.sparse.csr_matrix(dense)


@pytest.mark.parametrize("seed", [0, 1, ENTROPY])
def test_relevance_equals_slow_loop(seed):
    rng = np.random.default_rng(seed)
    targets = random_targets(rng)
    rows = rng.integers(0, 60, 40)
    label_ids = rng.integers(-1, 25, 40)
    marks = label_matrix.relevance(targets, rows, label_ids)
    expected = np.zeros((40, 40), np.uint8)
    for i, row in enumerate(rows):
        for j, label in enumerate(label_ids):
            expected[i, j] = label >= 0 and targets[row, label] > 0
    np.testing.assert_array_equal(marks, expected)
    assert marks.dtype == np.uint8
    by_label = label_matrix.relevance(targets, rows[:30], label_ids, by_label=True)
    np.testing.assert_array_equal(by_label, expected[:30].T)
    assert by_label.flags.c_contiguous


@pytest.mark.parametrize("probabilities", ["uniform", "inverse_propensity"])
@pytest.mark.parametrize("seed", [0, ENTROPY])
def test_positives_are_positives(probabilities, seed):
    rng = np.random.default_rng(seed)
    targets = random_targets(rng)
    rows = rng.integers(0, 60, 500)
    ids = label_matrix.sample_positives(targets, rows, probabilities, rng.random(25) + 0.1, rng)
    assert ids.dtype == np.int32
    for row, label in zip(rows, ids, strict=True):
        if label < 0:
            assert targets[row].nnz == 0
        else:
            assert targets[row, label] > 0


@pytest.mark.parametrize("probabilities", ["uniform", "inverse_propensity"])
def test_positives_follow_their_probabilities(probabilities):
    targets = scipy.sparse.csr_matrix(
        np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 1]], np.float32)
    )
    propensities = np.array([1.0, 2.0, 3.0, 6.0, 2.0])
    draws = 30_000
    rows = np.tile([0, 1, 2], draws)
    ids = label_matrix.sample_positives(targets, rows, probabilities, propensities, np.random.default_rng(5))
    ids = ids.reshape(draws, 3)
    assert (ids[:, 1] == -1).all()
    for row in (0, 2):
        labels = targets[row].indices
        weights = propensities[labels] if probabilities == "inverse_propensity" else np.ones(len(labels))
        expected = draws * weights / weights.sum()
        observed = np.bincount(ids[:, row], minlength=5)[labels]
        chi_square = ((observed - expected) ** 2 / expected).sum()
        assert chi_square < 18.4, (observed, expected)  # two degrees of freedom: 1e-4


def test_a_matrix_without_entries_has_no_positives():
    targets = scipy.sparse.csr_matrix((3, 4), dtype=np.float32)
    ids = label_matrix.sample_positives(targets, np.arange(3), "uniform", None, np.random.default_rng(0))
    np.testing.assert_array_equal(ids, [-1, -1, -1])
    assert not label_matrix.relevance(targets, np.arange(3), ids).any()


def test_unknown_probabilities_are_refused():
    targets = scipy.sparse.csr_matrix(np.eye(2, dtype=np.float32))
    with pytest.raises(ValueError, match="propensities"):
        label_matrix.sample_positives(
            targets, np.arange(2), "inverse_propensity", None, np.random.default_rng(0)
        )
    with pytest.raises(ValueError, match="unknown"):
        label_matrix.sample_positives(targets, np.arange(2), "best", None, np.random.default_rng(0))


def test_a_large_batch_is_fast():
    rng = np.random.default_rng(0)
    targets = scipy.sparse.random(
        50_000, 20_000, density=5e-4, format="csr", dtype=np.float32, random_state=rng
    )
    rows = rng.integers(0, 50_000, 2048)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        ids = label_matrix.sample_positives(targets, rows, "uniform", None, rng)
        label_matrix.relevance(targets, rows, ids)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.25  # about 5 ms on an idle core
