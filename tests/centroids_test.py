"""Label centroids against a loop over pairs."""

from __future__ import annotations

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from vixml_jax import centroids, sharding

SEEDS = fresh.seeds(2)  # they stand in the ids


def draw(seed: int, num_rows: int = 64, num_labels: int = 37, dim: int = 9):
    rng = np.random.default_rng(seed)
    targets = scipy.sparse.random(num_rows, num_labels, 0.08, "csr", random_state=rng)
    targets.data[:] = 1
    targets.data[3] = 0  # stored, but not relevant
    return rng.normal(size=(num_rows, dim)).astype(np.float32), targets


def slow_centroids(x: np.ndarray, targets: scipy.sparse.csr_matrix) -> np.ndarray:
    result = np.zeros((targets.shape[1], x.shape[1]))
    dense = targets.toarray()
    for label in range(targets.shape[1]):
        rows = [x[i].astype(np.float64) for i in range(len(x)) if dense[i, label]]
        if rows:
            result[label] = sum(rows) / len(rows)
    return result


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("block", [16_384, 7])
def test_label_centroids(monkeypatch, seed, block):
    monkeypatch.setattr(centroids, "PAIRS_AT_ONCE", block)
    x, targets = draw(seed)
    result = centroids.label_centroids(x, targets)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, slow_centroids(x, targets), atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_label_centroids_of_rows_split_over_a_mesh(mesh, seed):
    x, targets = draw(seed)
    split = jax.device_put(x, sharding.rows(mesh, 2))
    np.testing.assert_allclose(
        centroids.label_centroids(split, targets), slow_centroids(x, targets), atol=1e-6
    )


def test_bfloat16_embeddings_are_summed_in_float32():
    x = jnp.full((5000, 2), 1.0, jnp.bfloat16)  # a bfloat16 sum would stop at 256
    targets = scipy.sparse.csr_matrix(np.ones((5000, 1)))
    np.testing.assert_array_equal(centroids.label_centroids(x, targets), [[1, 1]])


def test_no_pairs_at_all():
    result = centroids.label_centroids(np.ones((3, 2), np.float32), scipy.sparse.csr_matrix((3, 4)))
    np.testing.assert_array_equal(result, np.zeros((4, 2)))


def test_rows_must_agree():
    with pytest.raises(ValueError, match="for 3 rows"):
        centroids.label_centroids(np.ones((4, 2), np.float32), scipy.sparse.csr_matrix((3, 4)))


def test_moving_average():
    old, new = np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]])
    np.testing.assert_allclose(centroids.moving_average(old, new), [[0.95, 0.1]])
    np.testing.assert_allclose(centroids.moving_average(old, new, decay=0.5), [[0.5, 1.0]])
