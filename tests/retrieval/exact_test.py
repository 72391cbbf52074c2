from __future__ import annotations

import numpy as np
import pytest
from brute_force import assert_same, reference, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from vixml_jax.errors import UserError
from vixml_jax.retrieval import exact
from vixml_jax.retrieval.exact import ExactIndex


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_queries=st.integers(0, 9),
    num_labels=st.integers(1, 60),
    dim=st.integers(1, 5),
    k=st.integers(1, 70),
    query_block=st.integers(1, 10),
    label_block=st.integers(1, 70),
)
def test_equals_a_stable_sort_in_blocks_of_any_size(
    seed, num_queries, num_labels, dim, k, query_block, label_block
):
    rng = np.random.default_rng(seed)
    labels, queries = whole(rng, num_labels, dim), whole(rng, num_queries, dim)
    assert_same(ExactIndex(labels, query_block, label_block), queries, labels, k)


def test_equals_a_stable_sort_over_many_growing_blocks():
    rng = np.random.default_rng(0)
    labels, queries = whole(rng, 9000, 4), whole(rng, 30, 4)
    for k in (1, 100, 3000):
        assert_same(ExactIndex(labels), queries, labels, k)


def test_rows_of_one_block_may_find_different_numbers():
    """Labels in the order of rising scores for one query, of falling ones for the other."""
    labels = np.arange(5000, dtype=np.float32)[:, None]
    assert_same(ExactIndex(labels), np.float32([[1], [-1], [0]]), labels, 7)


def test_real_numbers():
    rng = np.random.default_rng(1)
    labels = rng.standard_normal((4000, 32), np.float32)
    queries = rng.standard_normal((50, 32), np.float32)
    ids, scores = ExactIndex(labels).search(queries, 20)
    wanted_ids, wanted_scores = reference(queries.astype(np.float64), labels.astype(np.float64), 20)
    np.testing.assert_allclose(scores, wanted_scores, rtol=1e-5)
    assert (ids == wanted_ids).mean() > 0.999


@pytest.mark.parametrize(
    "labels",
    [np.zeros((50, 3)), np.ones((50, 3)), np.ones((1, 3)), np.tile(np.eye(3), (20, 1)), -np.ones((7, 3))],
    ids=["zeros", "duplicates", "one-label", "repeated", "negative"],
)
def test_ties_go_to_the_lower_label(labels):
    labels = labels.astype(np.float32)
    queries = np.float32([[1, 2, 3], [0, 0, 0], [-1, 0, 1]])
    for k in (1, 5, 64):
        assert_same(ExactIndex(labels), queries, labels, k)
        assert_same(ExactIndex(labels, 2, 3), queries, labels, k)


def test_keys_keep_the_order_of_scores_and_turn_that_of_labels():
    tiny, huge = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    scores = np.float32([-huge, -1, -tiny, 0, tiny, 0.5, huge])
    for ids in (np.zeros(7, np.int64), np.full(7, 2**31 - 1)):
        keys = exact._encode(scores, ids)
        assert (np.diff(keys) > 0).all()
        assert (keys > exact.NOTHING).all()
        np.testing.assert_array_equal(exact._decode(keys)[0], scores)
        np.testing.assert_array_equal(exact._decode(keys)[1], ids)
    zeros = exact._encode(np.float32([0.0, -0.0]), np.array([4, 3]))
    assert zeros[1] > zeros[0]


@pytest.mark.parametrize("blocks", [(0, 5), (5, 0)])
def test_blocks_hold_something(blocks):
    with pytest.raises(UserError, match="at least 1"):
        ExactIndex(np.ones((3, 2)), *blocks)
