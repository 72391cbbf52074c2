import numpy as np
import pytest
import scipy.sparse

from vixml_jax.retrieval import augment as augment_lib
from vixml_jax.retrieval.augment import augment


def random_case(seed, queries=7, labels=12, train=20, k_labels=5, k_train=6):
    rng = np.random.default_rng(seed)

    def search(num, k):
        ids = rng.permuted(np.tile(np.arange(num, dtype=np.int32), (queries, 1)), axis=1)[:, :k]
        scores = -np.sort(-rng.uniform(-1, 1, (queries, k)).astype(np.float32), axis=1)
        missing = np.arange(k) >= rng.integers(0, k + 1, (queries, 1))  # some rows found fewer
        return np.where(missing, -1, ids), np.where(missing, -np.inf, scores)

    targets = scipy.sparse.random(train, labels, density=0.2, format="csr", rng=rng)
    return search(labels, k_labels), search(train, k_train), scipy.sparse.csr_matrix(targets)


def slow(labels, neighbours, targets, k, query_weight, temperature, lending=None):
    """The formula, one query at a time; by `lending` a training query has a label by shares."""
    dense = (targets.toarray() != 0).astype(np.float64)
    if lending is not None:
        dense = dense @ lending.toarray()
    ids_out, scores_out = [], []
    for q in range(len(labels[0])):
        found_labels = [(i, s) for i, s in zip(labels[0][q], labels[1][q], strict=True) if i >= 0]
        found_train = [(i, s) for i, s in zip(neighbours[0][q], neighbours[1][q], strict=True) if i >= 0]
        total = sum(np.exp(np.float64(s) / temperature) for _, s in found_labels + found_train)
        final = {}
        for label, s in found_labels:
            final[label] = (
                final.get(label, 0) + (1 - query_weight) * np.exp(np.float64(s) / temperature) / total
            )
        for row, s in found_train:
            for label in np.flatnonzero(dense[row]):
                share = dense[row, label] * query_weight * np.exp(np.float64(s) / temperature) / total
                final[label] = final.get(label, 0) + share
        ranked = sorted(final.items(), key=lambda item: (-item[1], item[0]))[:k]
        ids_out.append([i for i, _ in ranked] + [-1] * (k - len(ranked)))
        scores_out.append([s for _, s in ranked] + [-np.inf] * (k - len(ranked)))
    return np.array(ids_out), np.array(scores_out)


@pytest.mark.parametrize("k", [1, 4, 40])
@pytest.mark.parametrize("query_weight", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("at_once", [2, 2048])
def test_it_is_the_formula(k, query_weight, at_once, monkeypatch):
    monkeypatch.setattr(augment_lib, "QUERIES_AT_ONCE", at_once)
    seed = int(np.random.SeedSequence().entropy % 2**31)
    print(f"seed {seed}")
    labels, neighbours, targets = random_case(seed)
    ids, scores = augment(labels, neighbours, targets, k=k, query_weight=query_weight, temperature=0.2)
    wanted_ids, wanted_scores = slow(labels, neighbours, targets, k, query_weight, 0.2)
    assert ids.dtype == np.int32
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, wanted_scores, rtol=1e-5)
    np.testing.assert_array_equal(ids, wanted_ids)


def test_new_labels_get_shares_of_what_their_lenders_are_handed():
    seed = int(np.random.SeedSequence().entropy % 2**31)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    _, neighbours, targets = random_case(seed)
    labels, _, _ = random_case(seed + 1, labels=15)  # three more than training knew
    lending = np.eye(12, 15, dtype=np.float32)
    lending[4] = 0  # gone
    for new in (12, 13, 14):
        lenders = rng.choice(12, 3, replace=False)
        lending[lenders, new] = rng.dirichlet(np.ones(3))
    lending = scipy.sparse.csr_matrix(lending)
    ids, scores = augment(labels, neighbours, targets, k=20, query_weight=0.4, lending=lending)
    wanted_ids, wanted_scores = slow(labels, neighbours, targets, 20, 0.4, 0.05, lending)
    np.testing.assert_allclose(scores, wanted_scores, rtol=1e-5)
    np.testing.assert_array_equal(ids, wanted_ids)


def test_lending_nothing_changes_nothing():
    labels, neighbours, targets = random_case(7)
    nothing = scipy.sparse.csr_matrix(np.eye(12, 14, dtype=np.float32))
    plain = augment(labels, neighbours, targets, k=9, query_weight=0.3)
    for got, wanted in zip(
        augment(labels, neighbours, targets, k=9, query_weight=0.3, lending=nothing), plain, strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


def test_without_weight_the_labels_keep_their_order():
    labels, neighbours, targets = random_case(3)
    ids, _ = augment(labels, neighbours, targets, k=5, query_weight=0.0)
    np.testing.assert_array_equal(ids, labels[0])


def test_a_label_that_only_neighbours_have_is_found():
    targets = scipy.sparse.csr_matrix(np.array([[0, 0, 1], [0, 1, 1]], np.float32))
    labels = (np.array([[0]], np.int32), np.array([[0.1]], np.float32))
    neighbours = (np.array([[0, 1]], np.int32), np.array([[0.9, 0.8]], np.float32))
    ids, scores = augment(labels, neighbours, targets, k=4)
    assert ids.tolist() == [[2, 1, 0, -1]]
    assert np.isneginf(scores[0, 3])


def test_nothing_to_do():
    labels, neighbours, targets = random_case(4, queries=0)
    ids, scores = augment(labels, neighbours, targets, k=3)
    assert ids.shape == scores.shape == (0, 3)
