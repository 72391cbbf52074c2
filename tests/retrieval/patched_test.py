from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vixml_jax import retrieval
from vixml_jax.retrieval import scann_index
from vixml_jax.retrieval.exact import ExactIndex
from vixml_jax.retrieval.patched import PatchedIndex


def reference(queries, by_number, k):
    """All labels there are, sorted stably by score; numbers increase."""
    numbers = np.array(sorted(by_number), np.int64)
    scores = queries @ np.stack([by_number[number] for number in numbers]).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    missing = ((0, 0), (0, k - order.shape[1]))
    return (
        np.pad(numbers[order], missing, constant_values=-1),
        np.pad(np.take_along_axis(scores, order, axis=1), missing, constant_values=-np.inf),
    )


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_main=st.integers(1, 80),
    num_added=st.integers(0, 9),
    num_hidden=st.integers(0, 80),
    k=st.integers(1, 90),
)
def test_equals_a_search_over_the_labels_that_there_are(seed, num_main, num_added, num_hidden, k):
    """Also where an added label takes the place of a hidden one."""
    rng = np.random.default_rng(seed)
    queries = rng.integers(-3, 4, (4, 3)).astype(np.float32)
    main = rng.integers(-3, 4, (num_main, 3)).astype(np.float32)
    numbers = np.sort(rng.choice(200, num_main, replace=False))
    hidden = rng.choice(numbers, min(num_hidden, num_main), replace=False)
    free = np.setdiff1d(np.arange(210), np.setdiff1d(numbers, hidden))
    numbers_added = np.sort(rng.choice(free, num_added, replace=False))
    added = rng.integers(-3, 4, (num_added, 3)).astype(np.float32)
    by_number = {number: row for number, row in zip(numbers, main, strict=True) if number not in hidden}
    by_number |= dict(zip(numbers_added, added, strict=True))
    if not by_number:
        return
    index = PatchedIndex(
        ExactIndex(main), numbers, hidden, ExactIndex(added) if num_added else None, numbers_added
    )
    ids, scores = index.search(queries, k)
    wanted, wanted_scores = reference(queries, by_number, k)
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_array_equal(scores, wanted_scores)
    assert (ids.dtype, scores.dtype) == (np.int32, np.float32)
    assert index.num_labels == len(by_number)
    assert index.search(queries[:0], k)[0].shape == (0, k)


@pytest.mark.skipif(scann_index.library() is None, reason="ScaNN is for Linux on x86-64")
def test_over_scann():
    rng = np.random.default_rng(0)
    labels = rng.standard_normal((2000, 16)).astype(np.float32)
    queries = labels[:50] + 0.1
    main = retrieval.build(labels, kind="scann", k=10, target_recall=0.95, num_leaves=40)
    nearest = main.search(queries, 30)[0]
    hidden = np.unique(nearest[:, :20])  # each query loses its best ones, far more than the spare places
    index = PatchedIndex(main, np.arange(2000), hidden, ExactIndex(labels[:3]), np.array([2000, 2001, 2002]))
    ids, scores = index.search(queries, 10)
    assert not np.isin(ids, hidden).any()
    np.testing.assert_array_equal(ids[:3, 0], [2000, 2001, 2002])
    assert (ids >= 0).all()
    assert (np.diff(scores, axis=1) <= 0).all()
