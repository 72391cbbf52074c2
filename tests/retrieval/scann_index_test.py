from __future__ import annotations

import logging
import resource
import sys

import numpy as np
import pytest

from vixml_jax import retrieval
from vixml_jax.errors import UserError
from vixml_jax.retrieval import exact, scann_index, scann_tuning

needs_scann = pytest.mark.skipif(scann_index.library() is None, reason="ScaNN is for Linux on x86-64")


@pytest.fixture
def rng():
    seed = int(np.random.SeedSequence().entropy) % 2**32
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def without_scann(monkeypatch):
    def forget():
        monkeypatch.setitem(sys.modules, "scann", None)
        scann_index.library.cache_clear()

    yield forget
    monkeypatch.undo()
    scann_index.library.cache_clear()


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def drawn(rng, kind, num_labels=12_000, num_queries=1000, dim=24):
    """Labels and queries of one distribution."""
    if kind == "random":
        both = rng.standard_normal((num_labels + num_queries, dim))
    elif kind == "clustered":
        centres = rng.standard_normal((num_labels // 100, dim))
        both = centres[rng.integers(0, len(centres), num_labels + num_queries)]
        both = both + 0.6 * rng.standard_normal(both.shape)
    else:  # of few directions and very different lengths
        both = rng.standard_normal((num_labels + num_queries, 6)) @ rng.standard_normal((6, dim))
        both = unit(both) * np.exp(0.5 * rng.standard_normal((len(both), 1)))
    both = both.astype(np.float32) if kind == "lengths" else unit(both)
    return both[:num_labels], both[num_labels:]


def recall(ids, wanted):
    return np.mean(
        [len(set(a) & set(b)) / len(b) for a, b in zip(ids.tolist(), wanted.tolist(), strict=True)]
    )


@needs_scann
@pytest.mark.parametrize("kind", ["random", "clustered", "lengths"])
@pytest.mark.parametrize(("target", "k"), [(0.98, 50), (0.8, 10)])
def test_reaches_its_recall_on_fresh_queries(rng, kind, target, k):
    labels, queries = drawn(rng, kind)
    index = retrieval.build(labels, target_recall=target, k=k, sample_queries=queries[:500])
    oracle = retrieval.build(labels, kind="exact")
    for wanted_k in (k, 3 * k):
        found = recall(index.search(queries[500:], wanted_k)[0], oracle.search(queries[500:], wanted_k)[0])
        # The sample's bound holds for 95% of samples; 0.01 is about four standard errors of these 500.
        assert found > target - (0.01 if wanted_k == k else 0.05)
    assert index.measured["recall"] >= target
    assert index.measured["leaves"] == round(np.sqrt(len(labels)))
    assert index.measured["leaves_searched"] > 0


@needs_scann
@pytest.mark.parametrize("kind", ["random", "clustered", "lengths"])
def test_reaches_its_recall_without_a_sample(rng, kind):
    labels, queries = drawn(rng, kind)
    index = retrieval.build(labels, target_recall=0.95, k=20)
    oracle = retrieval.build(labels, kind="exact")
    assert recall(index.search(queries, 20)[0], oracle.search(queries, 20)[0]) > 0.94


@needs_scann
def test_long_embeddings_have_coarse_codes_and_reach_their_recall(rng):
    labels, queries = drawn(rng, "clustered", num_labels=4000, num_queries=600, dim=400)
    index = retrieval.build(labels, target_recall=0.95, k=20, sample_queries=queries[:300], num_leaves=60)
    assert index.measured["block"] == 8
    oracle = retrieval.build(labels, kind="exact")
    assert recall(index.search(queries[300:], 20)[0], oracle.search(queries[300:], 20)[0]) > 0.93


@needs_scann
def test_where_coarse_codes_fail_fine_ones_are_tried(rng, monkeypatch):
    labels, queries = drawn(rng, "clustered", num_labels=4000, num_queries=300, dim=400)
    asked, cheapest = [], scann_tuning.cheapest

    def refuses_coarse(*arguments):
        asked.append(arguments[-1])
        return cheapest(*arguments) if arguments[-1] == 2 else None

    monkeypatch.setattr(scann_tuning, "cheapest", refuses_coarse)
    index = retrieval.build(labels, target_recall=0.9, k=20, sample_queries=queries, num_leaves=60)
    assert asked == [8, 2]
    assert index.measured["block"] == 2
    assert index.measured["recall"] >= 0.9


@needs_scann
def test_same_input_same_index(rng):
    labels, queries = drawn(rng, "clustered")
    first, *others = (retrieval.build(labels, target_recall=0.9, k=10) for _ in range(4))
    for other in others:
        for got, wanted in zip(other.search(queries, 20), first.search(queries, 20), strict=True):
            np.testing.assert_array_equal(got, wanted)
        timing = {"milliseconds_per_query": 0}
        assert other.measured | timing == first.measured | timing


@needs_scann
def test_a_lower_target_does_less(rng):
    labels, queries = drawn(rng, "random")
    low, high = (
        retrieval.build(labels, target_recall=target, k=10, sample_queries=queries).measured
        for target in (0.5, 0.95)
    )
    assert low["leaves_searched"] < high["leaves_searched"]


@needs_scann
def test_few_labels_and_full_recall_are_brute_force(rng):
    labels, queries = drawn(rng, "random", num_labels=2000, num_queries=50)
    oracle = retrieval.build(labels, kind="exact")
    for index in (
        retrieval.build(labels, k=10),
        retrieval.build(labels, k=10, target_recall=1.0, num_leaves=40),
    ):
        assert index.measured["scoring"] == "brute force"
        assert index.measured["recall"] == 1
        assert recall(index.search(queries, 20)[0], oracle.search(queries, 20)[0]) > 0.999


@needs_scann
@pytest.mark.parametrize("num_labels", [1, 2, 15, 16, 17, 100])
def test_few_labels_with_a_tree_asked_for(num_labels, rng):
    labels = rng.standard_normal((num_labels, 5))
    index = retrieval.build(labels, k=10, num_leaves=3)
    ids, scores = index.search(rng.standard_normal((4, 5)), num_labels + 2)
    np.testing.assert_array_equal(np.sort(ids, axis=1), np.tile([-1, -1, *range(num_labels)], (4, 1)))
    assert (np.isfinite(scores) == (ids >= 0)).all()


@needs_scann
@pytest.mark.parametrize("kind", ["zeros", "duplicates", "half-zeros", "one-column"])
def test_degenerate_labels(kind, rng):
    labels = {
        "zeros": np.zeros((900, 6)),
        "duplicates": np.repeat(rng.standard_normal((9, 6)), 100, axis=0),
        "half-zeros": rng.standard_normal((900, 6)) * (np.arange(900)[:, None] % 2),
        "one-column": rng.standard_normal((900, 1)),
    }[kind]
    queries = np.concatenate([rng.standard_normal((20, labels.shape[1])), np.zeros((1, labels.shape[1]))])
    oracle = retrieval.build(labels, kind="exact")
    for options in ({}, {"num_leaves": 30}):
        index = retrieval.build(labels, k=20, target_recall=0.9, **options)
        assert index.measured["recall"] >= 0.9
        ids, scores = index.search(queries, 20)
        assert all(len(set(row)) == 20 for row in ids.tolist())
        np.testing.assert_allclose(scores, np.take_along_axis(queries @ labels.T, ids, axis=1), atol=1e-4)
        # Labels of equal score are interchangeable: count those that score like the 20 best.
        assert (scores >= oracle.search(queries, 20)[1][:, -1:] - 1e-4).mean() > 0.8


@needs_scann
def test_leaves_too_small_for_k_are_not_the_end(rng):
    """Each label lies alone, and the search that was measured looks into one leaf."""
    labels, queries = drawn(rng, "clustered", num_labels=3000, num_queries=40)
    index = retrieval.build(labels, k=1, target_recall=0.05, num_leaves=300)
    assert index.measured["leaves_searched"] < 10
    ids, scores = index.search(queries, 250)
    assert (ids >= 0).all()
    assert np.isfinite(scores).all()
    assert all(len(set(row)) == 250 for row in ids.tolist())


def test_a_sample_holds_the_exact_neighbours(rng):
    labels, queries = drawn(rng, "random", num_labels=300, num_queries=700)
    sample = scann_tuning.draw(labels, 7, queries)
    assert sample.queries_SD.shape == (scann_tuning.SAMPLE, 24)
    assert {tuple(row) for row in sample.queries_SD.tolist()} <= {tuple(row) for row in queries.tolist()}
    assert ((sample.queries_SD @ labels.T >= sample.floor_S1).sum(axis=1) == 7).mean() > 0.99
    perturbed = scann_tuning.draw(labels, 7)
    best = (unit(perturbed.queries_SD) @ labels.T).max(axis=1)
    assert 0.6 < np.median(best) < 0.9


@needs_scann
def test_wrong_options():
    for options, message in (
        ({"sample_queries": np.ones((3, 4))}, "one row of 3 columns"),
        ({"sample_queries": np.ones((0, 3))}, "one row of 3 columns"),
        ({"sample_queries": np.full((2, 3), np.nan)}, "sample queries: row 0 holds NaN"),
        ({"num_leaves": 0}, "num_leaves is 0"),
    ):
        with pytest.raises(UserError, match=message):
            retrieval.build(np.eye(3), **options)


def test_exact_takes_over_where_scann_is_missing(without_scann, caplog, rng):
    labels, queries = drawn(rng, "random", num_labels=500, num_queries=5)
    without_scann()
    with caplog.at_level(logging.WARNING):
        index = retrieval.build(labels, k=10, num_leaves=5, sample_queries=queries)
    assert isinstance(index, exact.ExactIndex)
    assert "ScaNN cannot be imported" in caplog.text
    np.testing.assert_array_equal(
        index.search(queries, 10)[0], retrieval.build(labels, "exact").search(queries, 10)[0]
    )


@needs_scann
@pytest.mark.parametrize("options", [{}, {"num_leaves": 20}], ids=["brute-force", "hashing"])
def test_a_saved_index_opens_where_scann_is_missing(options, without_scann, caplog, rng, tmp_path):
    labels, queries = drawn(rng, "random", num_labels=500, num_queries=5)
    retrieval.build(labels, k=10, **options).save(tmp_path / "index")
    without_scann()
    with caplog.at_level(logging.WARNING):
        index = retrieval.load(tmp_path / "index")
    assert isinstance(index, exact.ExactIndex)
    assert "slower" in caplog.text
    np.testing.assert_array_equal(
        index.search(queries, 10)[0], retrieval.build(labels, "exact").search(queries, 10)[0]
    )


@needs_scann
def test_an_index_that_finds_no_room_is_one_line(rng, tmp_path):
    labels, _ = drawn(rng, "random", num_labels=500, num_queries=1)
    built = scann_index.build(labels)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(UserError, match=r"ScaNN could not write the index.*make room"):
            built.save(tmp_path / "index")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
