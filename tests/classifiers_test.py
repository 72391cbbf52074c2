"""Extreme classifiers against a slow reading in PyTorch, a label at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import torch

from vixml_jax import classifiers, sharding

SETTINGS = {"margin": 0.2, "hardest": 3, "seed": 0}
NUM_QUERIES, NUM_LABELS, DIM = 48, 40, 8


@pytest.fixture(scope="module")
def problem():
    """Queries around hidden label vectors, each with one or two labels, and starting vectors near them."""
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    rng = np.random.default_rng(seed)
    centres = normal(rng.standard_normal((NUM_LABELS, DIM)))
    first = rng.integers(0, NUM_LABELS, NUM_QUERIES)
    queries = normal(centres[first] + 0.3 * rng.standard_normal((NUM_QUERIES, DIM)))
    targets = np.zeros((NUM_QUERIES, NUM_LABELS), np.float32)
    targets[np.arange(NUM_QUERIES), first] = 1
    targets[np.arange(0, NUM_QUERIES, 3), rng.integers(0, NUM_LABELS, NUM_QUERIES // 3)] = 1
    targets[5] = 0  # a query without labels
    labels = normal(centres + rng.standard_normal((NUM_LABELS, DIM)))
    shortlist = np.argsort(-(queries @ labels.T), axis=1)[:, :12].astype(np.int32)
    return queries, labels, scipy.sparse.csr_matrix(targets), shortlist


def normal(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def batches_of(problem, epoch=0, batch_size=16):
    queries, _, targets, shortlist = problem
    return list(
        classifiers.batches(
            *(queries, targets, shortlist, np.random.default_rng(epoch).permutation(NUM_QUERIES)),
            batch_size=batch_size,
            negatives=4,
            positives="uniform",
            propensities=None,
            seed=0,
            epoch=epoch,
        )
    )


def one_positive(batch):
    """The batch with at most one positive a query, so that nothing is left to chance in the loss."""
    first = batch.targets.cumsum(axis=1) == 1
    return classifiers.ClassifierBatch(
        batch.queries, batch.label_ids, (batch.targets * first).astype(np.uint8)
    )


def schedule(step):
    return 0.05 / (1 + step)


def slow_loss(vectors, queries, targets):
    """The triplet of one batch, query by query and negative by negative."""
    total = torch.zeros(())
    for query, row in zip(queries, targets, strict=True):
        scores = [torch.dot(query, v) / v.norm() for v in vectors]
        positives = [i for i, relevant in enumerate(row) if relevant]
        if not positives:
            continue
        negatives = sorted((s for i, s in enumerate(scores) if not row[i]), key=lambda s: -s.item())[:3]
        violations = [s - scores[positives[0]] + 0.2 for s in negatives]
        bad = [(s, v) for s, v in zip(negatives, violations, strict=True) if v > 0]
        if bad:
            weights = torch.softmax(torch.stack([s for s, _ in bad]) / 0.1, 0)
            total = total + sum(w * v for w, (_, v) in zip(weights, bad, strict=True))
    return total / len(queries)


def slow_fit(labels, batches):
    """Adam on each label's vector by itself, only when it stands in a batch."""
    vectors, means, squares, counts = labels.copy(), np.zeros_like(labels), np.zeros_like(labels), {}
    for step, batch in enumerate(batches):
        ids = batch.label_ids[batch.label_ids >= 0]
        leaves = torch.tensor(vectors[ids], requires_grad=True)
        slow_loss(leaves, torch.tensor(batch.queries), batch.targets[:, : len(ids)]).backward()
        for row, gradient in zip(ids, leaves.grad.numpy(), strict=True):
            counts[row] = n = counts.get(row, 0) + 1
            means[row] = 0.9 * means[row] + 0.1 * gradient
            squares[row] = 0.999 * squares[row] + 0.001 * gradient**2
            corrected = (means[row] / (1 - 0.9**n)) / (np.sqrt(squares[row] / (1 - 0.999**n)) + 1e-8)
            vectors[row] -= schedule(step) * corrected
    return vectors


@functools.cache
def compiled(mesh):
    """One step for all tests: tables are filled up to one size."""
    return classifiers.compile_step(
        classifiers.create(np.zeros((NUM_LABELS, DIM)), mesh), schedule=schedule, **SETTINGS
    )


def fit(labels, batches, mesh):
    state = classifiers.create(labels, mesh)
    step = compiled(mesh)
    losses = []
    for batch in batches:
        state, figures = step(state, classifiers.place(batch, mesh))
        losses.append(float(figures["classifier/loss"]))
    return state, losses


def test_steps_are_those_of_the_slow_reading(problem, single_mesh):
    batches = [one_positive(batch) for batch in batches_of(problem)]
    state, _ = fit(problem[1], batches, single_mesh)
    np.testing.assert_allclose(
        np.asarray(state.vectors)[:NUM_LABELS], slow_fit(problem[1], batches), atol=2e-5
    )
    assert int(state.step) == len(batches)


def test_labels_outside_the_batch_stay_as_they_are(problem, single_mesh):
    batch = batches_of(problem)[0]
    state, _ = fit(problem[1], [batch], single_mesh)
    outside = np.setdiff1d(np.arange(NUM_LABELS), batch.label_ids)
    np.testing.assert_array_equal(np.asarray(state.vectors)[outside], problem[1][outside])
    np.testing.assert_array_equal(
        np.asarray(state.updates)[:NUM_LABELS] > 0, np.isin(range(NUM_LABELS), batch.label_ids)
    )


def test_a_mesh_gives_the_same(problem):
    batches = batches_of(problem)
    with sharding.use(sharding.make_mesh(devices=jax.devices()[:1])) as mesh:
        expected, losses = fit(problem[1], batches, mesh)
    with sharding.use(sharding.make_mesh(2, 2, 2)) as mesh:
        state, sharded_losses = fit(problem[1], batches, mesh)
    np.testing.assert_allclose(losses, sharded_losses, rtol=1e-5)
    np.testing.assert_allclose(state.vectors, expected.vectors, atol=1e-5)
    assert state.vectors.sharding == sharding.rows(mesh, 2)


def test_they_learn(problem, single_mesh):
    queries, labels, targets, _ = problem
    state, losses = fit(
        labels, [batch for epoch in range(20) for batch in batches_of(problem, epoch)], single_mesh
    )
    assert np.mean(losses[-3:]) < np.mean(losses[:3])

    def precision(vectors):
        best = np.argmax(queries @ normal(vectors).T, axis=1)
        return np.mean(np.asarray(targets.todense())[np.arange(NUM_QUERIES), best])

    assert precision(np.asarray(state.vectors)[:NUM_LABELS]) > precision(labels)


def test_a_batch_holds_positives_and_shortlisted_labels_once(problem):
    queries, _, targets, shortlist = problem
    dense = np.asarray(targets.todense())
    seen = []
    for batch in batches_of(problem, batch_size=20):  # 48 queries: the last batch is filled up
        ids = batch.label_ids[batch.label_ids >= 0]
        assert len(np.unique(ids)) == len(ids)
        assert batch.targets.shape == (20, len(batch.label_ids))
        assert not batch.targets[:, len(ids) :].any()
        rows = [int(np.flatnonzero((queries == query).all(1))[0]) for query in batch.queries]
        np.testing.assert_array_equal(batch.targets[:, : len(ids)], dense[np.ix_(rows, ids)])
        for row, marked in zip(rows, batch.targets, strict=True):
            assert marked.any() == dense[row].any()
        assert np.isin(
            ids, np.concatenate([shortlist[rows].ravel(), np.flatnonzero(dense[rows].any(0))])
        ).all()
        seen += rows
    assert set(seen) == set(range(NUM_QUERIES))
    assert len(seen) == 60


def test_the_mixture_scores_as_both_scores_do(problem):
    queries, labels, _, _ = problem
    vectors = np.random.default_rng(1).standard_normal(labels.shape).astype(np.float32)
    for weight in (0.0, 0.3, 1.0):
        expected = (1 - weight) * (queries @ labels.T) + weight * (queries @ normal(vectors).T)
        np.testing.assert_allclose(
            queries @ classifiers.mixed(labels, vectors, weight).T, expected, atol=1e-6
        )


def test_a_batch_without_any_label_changes_nothing(problem, single_mesh):
    labels = normal(np.ones((4, DIM)) + np.eye(4, DIM))
    real = batches_of(problem)[0]
    batch = classifiers.ClassifierBatch(
        real.queries, np.full_like(real.label_ids, -1), np.zeros_like(real.targets)
    )
    state, losses = fit(labels, [batch], single_mesh)
    assert losses == [0.0]
    np.testing.assert_array_equal(np.asarray(state.vectors)[:4], labels)
    assert not jnp.isnan(state.means).any()
