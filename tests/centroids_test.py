"""Label centroids against a loop over pairs."""

from __future__ import annotations

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from vixml_jax import centroids, sharding
from vixml_jax.train_state import row_table

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
    assert result.shape == (sharding.TABLE_ROWS_MULTIPLE, x.shape[1])
    np.testing.assert_allclose(result[: targets.shape[1]], slow_centroids(x, targets), atol=1e-6)
    assert not np.asarray(result[targets.shape[1] :]).any()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("at_once", [8_192, 24])
def test_tables_split_over_a_mesh(monkeypatch, mesh, seed, at_once):
    """As without a mesh, and split as a checkpoint's tables are; also where labels take several turns."""
    monkeypatch.setattr(centroids, "LABELS_AT_ONCE", at_once)
    monkeypatch.setattr(centroids, "PAIRS_AT_ONCE", 16)
    x, targets = draw(seed, num_labels=1500)
    result = centroids.label_centroids(row_table(x, mesh), targets)
    assert result.sharding.is_equivalent_to(sharding.rows(mesh, 2), 2)
    assert result.shape == (2 * sharding.TABLE_ROWS_MULTIPLE, x.shape[1])
    np.testing.assert_allclose(result[: targets.shape[1]], slow_centroids(x, targets), atol=1e-6)


def test_field_size_fits_eight_devices():
    """2.2M queries and 1.3M labels of 768 dimensions on eight devices, by the compiler's own account."""
    mesh = sharding.make_mesh(8)
    queries, labels, blocks = 2_249_728, 1_305_600, 1_000

    def rows(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(mesh, len(shape)))

    pairs = rows((8 * blocks, centroids.PAIRS_AT_ONCE), jnp.int32)
    memory = (
        centroids.means.lower(
            rows((queries, 768), jnp.float32),
            pairs,
            pairs,
            jax.ShapeDtypeStruct((160, 2), jnp.int32),
            rows((labels,), jnp.float32),
            sizes=(8, labels // 8, 1024),
            mesh=mesh,
        )
        .compile()
        .memory_analysis()
    )
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert queries // 8 * 768 * 4 < whole < 4 * 2**30


def test_bfloat16_embeddings_are_summed_in_float32():
    x = jnp.full((5000, 2), 1.0, jnp.bfloat16)  # a bfloat16 sum would stop at 256
    targets = scipy.sparse.csr_matrix(np.ones((5000, 1)))
    np.testing.assert_array_equal(centroids.label_centroids(x, targets)[:1], [[1, 1]])


def test_no_pairs_at_all():
    result = centroids.label_centroids(np.ones((3, 2), np.float32), scipy.sparse.csr_matrix((3, 4)))
    assert not np.asarray(result).any()


def test_rows_must_agree():
    with pytest.raises(ValueError, match="for 3 rows"):
        centroids.label_centroids(np.ones((2, 2), np.float32), scipy.sparse.csr_matrix((3, 4)))
    with pytest.raises(ValueError, match="for 8 rows"):
        centroids.LabelCentroids(scipy.sparse.csr_matrix((3, 4)), 8)(np.ones((3, 2), np.float32))


def test_moving_average():
    old, new = np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]])
    np.testing.assert_allclose(centroids.moving_average(old, new), [[0.95, 0.1]])
    np.testing.assert_allclose(centroids.moving_average(old, new, decay=0.5), [[0.5, 1.0]])


@pytest.mark.parametrize("seed", SEEDS)
def test_borrowed_centroids(seed):
    rng = np.random.default_rng(seed)
    known = rng.normal(size=(8, 5)).astype(np.float32)
    known[[2, 6]] = 0  # labels without training queries lend nothing
    near = np.array([[0, 2, 3], [7, 5, -1], [2, 6, -1], [4, 1, 0]])
    cosines = -np.sort(-rng.uniform(-1, 1, near.shape).astype(np.float32), axis=1)
    cosines[near < 0] = -np.inf
    shares = centroids.lending_shares(known, near, cosines)
    lends = [any(known[i].any() for i in labels if i >= 0) for labels in near]
    np.testing.assert_allclose(shares.sum(axis=1), lends, rtol=1e-6)
    borrowed = centroids.borrowed_centroids(known, near, shares)
    for row, (labels, similar) in enumerate(zip(near, cosines, strict=True)):
        lenders = [(np.exp(s / 0.05), known[i]) for i, s in zip(labels, similar, strict=True) if i >= 0]
        lenders = [(weight, centroid) for weight, centroid in lenders if centroid.any()]
        whole = sum(weight for weight, _ in lenders)
        wanted = sum(weight * centroid for weight, centroid in lenders) / whole if lenders else np.zeros(5)
        np.testing.assert_allclose(borrowed[row], wanted, rtol=1e-4, atol=1e-6)
