"""A run's search, whole and a part at a time."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from vixml_jax import config, search


@pytest.mark.parametrize(("query_weight", "prior_weight"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.5), (0.3, 0.5)])
def test_parts_give_what_the_whole_gives(query_weight, prior_weight, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    queries, labels, known = (rng.normal(size=(n, 8)).astype(np.float32) for n in (23, 40, 30))
    targets = scipy.sparse.random(30, 40, 0.1, "csr", random_state=rng)
    settings = config.base().retrieval
    settings.kind, settings.query_weight, settings.prior_weight = "exact", query_weight, prior_weight
    searcher = search.Searcher.build(labels, known, targets, settings)
    whole = searcher.search(queries, 7)
    assert not capsys.readouterr().err
    monkeypatch.setattr(search, "QUERIES_PER_PART", 5)
    parts = searcher.search(queries, 7, "search labels")
    np.testing.assert_array_equal(parts.ids, whole.ids)
    # Products of other shapes are rounded otherwise, and a softmax at a low temperature magnifies that.
    np.testing.assert_allclose(parts.scores, whole.scores, rtol=3e-4)
    assert "search labels: 23/23 queries" in capsys.readouterr().err
    assert searcher.search(queries[:0], 7, "none").ids.shape == (0, 7)


def test_priors_bring_up_what_lies_below_the_labels_wanted():
    """Frequent labels of the `retrieval.k` found move up, also among more than are asked for."""
    rng = np.random.default_rng(1)
    queries, labels, known = (rng.normal(size=(n, 8)).astype(np.float32) for n in (5, 40, 30))
    targets = scipy.sparse.random(30, 40, 0.1, "csr", random_state=rng)
    settings = config.base().retrieval
    settings.kind, settings.prior_weight, settings.k = "exact", 3.0, 40
    found = search.Searcher.build(labels, known, targets, settings).search(queries, 6)
    logs = np.log1p(targets.getnnz(axis=0))
    scores = queries @ labels.T + 3.0 * (logs - logs.mean())
    np.testing.assert_array_equal(found.ids, np.argsort(-scores, axis=1)[:, :6])
    np.testing.assert_allclose(found.scores, -np.sort(-scores, axis=1)[:, :6], rtol=1e-4)
