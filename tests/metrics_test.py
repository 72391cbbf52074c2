from __future__ import annotations

import math

import fresh
import numpy as np
import pytest
import scipy.sparse

from vixml_jax import metrics, ranking
from vixml_jax.errors import UserError

SEEDS = [*range(4), *fresh.seeds(1)]  # the last one's id names it
NO_SCORE = float("nan")


def from_dense(scores: list[list[float]] | np.ndarray) -> scipy.sparse.csr_matrix:
    """Every entry but NaN is stored, zeros too."""
    dense = np.asarray(scores, np.float64)
    rows, labels = np.nonzero(~np.isnan(dense))
    return scipy.sparse.csr_matrix((dense[rows, labels], (rows, labels)), shape=dense.shape)


def plain_weights(train: np.ndarray, A: float, B: float) -> list[float]:
    C = (math.log(len(train)) - 1) * (B + 1) ** A
    return [1 + C * (n + B) ** -A for n in train.sum(0, dtype=float).tolist()]


def plain_evaluate(scores, truth, train, ks, A, B, pairs) -> dict[str, float]:
    """The metrics by their definitions: one row, one prediction at a time."""
    weights = plain_weights(train, A, B)
    cuts = sorted({*ks, 10, 100})
    num_rows = len(truth)
    sums = {f"{metric}@{k}": 0.0 for metric in ("P", "nDCG", "R", "hits") for k in cuts}
    sums |= {
        f"{kind}{metric}@{k}": 0.0 for kind in ("got", "best") for metric in ("P", "nDCG", "R") for k in ks
    }
    reciprocal = 0.0
    for i in range(num_rows):
        positives = [label for label in range(truth.shape[1]) if truth[i, label]]
        predicted = [
            label
            for label in range(truth.shape[1])
            if not np.isnan(scores[i, label]) and (i, label) not in pairs
        ]
        predicted.sort(key=lambda label: (-scores[i, label], label))
        best = sorted(positives, key=lambda label: -weights[label])
        for rank, label in enumerate(predicted):
            if label in positives:
                reciprocal += 1 / (rank + 1)
                break
        for k in cuts:
            normaliser = sum(1 / math.log2(r + 2) for r in range(min(k, len(positives))))
            gains = [1 if label in positives else 0 for label in predicted[:k]]
            dcg = sum(gain / math.log2(r + 2) for r, gain in enumerate(gains))
            sums[f"P@{k}"] += sum(gains) / k
            sums[f"R@{k}"] += sum(gains) / max(len(positives), 1)
            sums[f"hits@{k}"] += any(gains)
            sums[f"nDCG@{k}"] += dcg / normaliser if normaliser else 0
            if k not in ks:
                continue
            for kind, order in (("got", predicted), ("best", best)):
                weighed = [weights[label] if label in positives else 0 for label in order[:k]]
                dcg = sum(gain / math.log2(r + 2) for r, gain in enumerate(weighed))
                sums[f"{kind}P@{k}"] += sum(weighed) / k
                sums[f"{kind}R@{k}"] += sum(weighed) / max(len(positives), 1)
                sums[f"{kind}nDCG@{k}"] += dcg / normaliser if normaliser else 0
    figures = {"MRR": 100 * reciprocal / num_rows}
    for k in ks:
        for metric in ("P", "nDCG", "hits"):
            figures[f"{metric}@{k}"] = 100 * sums[f"{metric}@{k}"] / num_rows
        for metric in ("P", "nDCG", "R"):
            best_sum = sums[f"best{metric}@{k}"]
            figures[f"PS{metric}@{k}"] = 100 * sums[f"got{metric}@{k}"] / best_sum if best_sum else 0.0
    return figures | {f"R@{k}": 100 * sums[f"R@{k}"] / num_rows for k in cuts}


def random_case(seed: int, *, num_rows: int = 60, num_labels: int = 130):
    """Rows without predictions, without positives, with few of either; ties; zero and negative scores."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((num_rows, num_labels)) < rng.choice([0, 0.02, 0.1], (num_rows, 1))).astype(
        np.float32
    )
    train = (rng.random((90, num_labels)) < rng.choice([0, 0.01, 0.2], num_labels)).astype(np.float32)
    scores = rng.integers(-3, 4, (num_rows, num_labels)) / 2 + truth  # many ties, positives a little higher
    scores[rng.random(scores.shape) > rng.choice([0, 0.02, 0.3, 1], (num_rows, 1))] = NO_SCORE
    pairs = np.argwhere(rng.random(truth.shape) < 0.05)
    return scores, truth, train, pairs


def as_ids(scores: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same predictions as ids and scores in random order, -1 in random places."""
    rng = np.random.default_rng(seed)
    shape = (scores.shape[0], scores.shape[1] + 5)
    ids, values = np.full(shape, -1, np.int32), np.full(shape, -np.inf)
    for i, row in enumerate(scores):
        labels = np.flatnonzero(~np.isnan(row))
        places = rng.permutation(shape[1])[: len(labels)]
        ids[i, places], values[i, places] = labels, row[labels]
    return ids, values


def assert_same(got: dict[str, float], wanted: dict[str, float]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value, abs=1e-9), name


def test_worked_example():
    train = scipy.sparse.csr_matrix([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1]])
    truth = scipy.sparse.csr_matrix([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    predictions = from_dense(
        [[0.9, 0.5, 0.1, NO_SCORE], [0.3, 0.2, 0.1, NO_SCORE], [0.9, 0.1, 0.3, NO_SCORE]]
    )
    weights = metrics.inverse_propensity(train, A=0.6, B=2.6)
    np.testing.assert_allclose(weights, [1.389245, 1.526085, 1.609438, 1.609438], atol=5e-7)
    figures = metrics.evaluate(predictions, truth, train, ks=(1, 2, 3), A=0.6, B=2.6)
    wanted = {
        "P": (0.333333, 0.333333, 0.333333),
        "nDCG": (0.333333, 0.414692, 0.516884),
        "R": (0.166667, 0.5, 0.666667),
        "PSP": (0.443066, 0.644305, 1),
        "PSnDCG": (0.443066, 0.594905, 0.756661),
    }
    for metric, values in wanted.items():
        for k, value in enumerate(values, 1):
            assert figures[f"{metric}@{k}"] / 100 == pytest.approx(value, abs=5e-7)
    assert figures["MRR"] == pytest.approx(100 * (1 + 1 / 2 + 0) / 3)
    assert figures["hits@1"] == pytest.approx(100 / 3)


def test_propensities_at_the_size_of_a_real_dataset():
    train = scipy.sparse.csr_matrix((np.ones(101), ([*range(100), 0], [0] * 100 + [1])), shape=(294_805, 3))
    weights = metrics.inverse_propensity(train, 0.6, 2.6)
    np.testing.assert_allclose(weights, [2.553563, 12.594069, 15.093971], atol=5e-7)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("block_entries", [1, 150, 1 << 20])
def test_agrees_with_the_definitions(seed, block_entries, monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK_ENTRIES", block_entries)
    scores, truth, train, pairs = random_case(seed)
    ks, A, B = (1, 3, 5, 200), 0.6, 2.6
    wanted = plain_evaluate(scores, truth, train, ks, A, B, set(map(tuple, pairs.tolist())))
    relevant, seen = scipy.sparse.csr_matrix(truth), scipy.sparse.csr_matrix(train)
    got = metrics.evaluate(from_dense(scores), relevant, seen, ks, A, B, pairs)
    assert_same(got, wanted)
    got = metrics.evaluate(as_ids(scores, seed), relevant, seen, ks, A, B, pairs[::-1])
    assert_same(got, wanted)


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_of_very_different_length(seed):
    scores, truth, train, _ = random_case(seed, num_rows=200, num_labels=60)
    scores[1:, 3:] = NO_SCORE  # one long row among short ones: they are not laid side by side
    scores[0] = np.arange(60) % 7
    wanted = plain_evaluate(scores, truth, train, (1, 3, 5), 0.55, 1.5, set())
    got = metrics.evaluate(from_dense(scores), scipy.sparse.csr_matrix(truth), scipy.sparse.csr_matrix(train))
    assert_same(got, wanted)


def test_names_and_their_order():
    matrix = scipy.sparse.csr_matrix(np.eye(3))
    assert list(metrics.evaluate(matrix, matrix, ks=(1, 3))) == [
        *("P@1", "P@3", "nDCG@1", "nDCG@3", "R@1", "R@3", "R@10", "R@100", "hits@1", "hits@3", "MRR")
    ]
    perfect = metrics.evaluate(matrix, matrix, matrix, ks=(1,))
    assert list(perfect) == [
        *("P@1", "nDCG@1", "PSP@1", "PSnDCG@1", "PSR@1", "R@1", "R@10", "R@100", "hits@1", "MRR")
    ]
    assert list(perfect.values()) == pytest.approx([100] * 10, abs=1e-9)


def test_ties_go_to_the_lower_label():
    truth = scipy.sparse.csr_matrix([[0, 1, 0, 0]])
    assert metrics.evaluate(([[3, 2, 1]], [[0.5, 0.5, 0.5]]), truth)["P@1"] == 100
    assert metrics.evaluate(([[3, 0, 1]], [[0.5, 0.5, 0.5]]), truth)["MRR"] == 50


def test_stored_zeros_are_predictions_but_no_positives():
    truth = scipy.sparse.csr_matrix(([1.0, 0.0], ([0, 0], [1, 2])), shape=(1, 4))
    predictions = scipy.sparse.csr_matrix(([0.0, -1.0], ([0, 0], [1, 2])), shape=(1, 4))
    figures = metrics.evaluate(predictions, truth)
    assert (figures["P@1"], figures["R@100"], figures["MRR"]) == (100, 100, 100)
    assert truth.nnz == 2  # the caller's matrix is left alone


def test_infinite_scores_rank():
    truth = scipy.sparse.csr_matrix([[0, 0, 1], [1, 0, 0]])
    ids, scores = (
        np.array([[0, 1, 2], [0, 1, -1]]),
        np.array([[1, -np.inf, -np.inf], [-np.inf, np.inf, np.nan]]),
    )
    assert metrics.evaluate((ids, scores), truth)["MRR"] == pytest.approx(100 * (1 / 3 + 1 / 2) / 2)


def test_a_label_named_twice_counts_once_at_its_higher_score():
    truth = scipy.sparse.csr_matrix([[0, 1, 0], [0, 0, 1]])
    figures = metrics.evaluate(
        (np.array([[1, 0, 1], [2, 2, 1]]), np.array([[0.1, 0.5, 0.9], [0.1, 0.2, 0.9]])), truth, ks=(1, 3)
    )
    assert figures["P@1"] == 50
    assert figures["P@3"] == pytest.approx(100 / 3)
    assert figures["MRR"] == 75


def test_filter_pairs_leave_room_for_what_follows():
    truth = scipy.sparse.csr_matrix([[0, 0, 1]])
    predictions = (np.array([[0, 1, 2]]), np.array([[0.9, 0.8, 0.7]]))
    assert metrics.evaluate(predictions, truth)["P@1"] == 0
    assert metrics.evaluate(predictions, truth, filter_pairs=np.array([[0, 1], [0, 0], [0, 0]]))["P@1"] == 100


def test_no_predictions_and_no_positives_at_all():
    nothing = scipy.sparse.csr_matrix((2, 3))
    for figures in (metrics.evaluate(nothing, nothing, scipy.sparse.csr_matrix(np.eye(3))),
                    metrics.evaluate((np.zeros((2, 0), int), np.zeros((2, 0))), nothing)):  # fmt: skip
        assert set(figures.values()) == {0.0}


@pytest.mark.parametrize("seed", SEEDS)
def test_by_group_is_evaluate_on_the_rows_of_the_group(seed):
    scores, truth, train, pairs = random_case(seed)
    predictions, relevant, seen = (
        from_dense(scores),
        scipy.sparse.csr_matrix(truth),
        scipy.sparse.csr_matrix(train),
    )
    groups = np.arange(len(truth)) % 3
    broken_down = metrics.by_group(predictions, relevant, groups, seen, filter_pairs=pairs)
    assert list(broken_down) == [0, 1, 2]
    for group, figures in broken_down.items():
        rows = np.flatnonzero(groups == group)
        own = pairs[np.isin(pairs[:, 0], rows)]
        own = np.stack([np.searchsorted(rows, own[:, 0]), own[:, 1]], axis=1)
        wanted = metrics.evaluate(predictions[rows], relevant[rows], seen, filter_pairs=own)
        assert_same(figures, {"rows": float(len(rows)), **wanted})


@pytest.mark.parametrize("seed", SEEDS)
def test_by_label_frequency(seed):
    scores, truth, train, pairs = random_case(seed)
    predictions, relevant, seen = (
        from_dense(scores),
        scipy.sparse.csr_matrix(truth),
        scipy.sparse.csr_matrix(train),
    )
    bins = metrics.by_label_frequency(
        predictions, relevant, seen, filter_pairs=pairs, torso_from=2, head_from=8
    )
    assert set(bins) <= {"head", "torso", "tail", "unseen"}
    assert sum(figures["labels"] for figures in bins.values()) == truth.shape[1]
    assert sum(figures["positives"] for figures in bins.values()) == truth.sum()
    overall = metrics.evaluate(predictions, relevant, filter_pairs=pairs)
    for k in (1, 3, 5):
        assert sum(figures[f"P@{k}"] for figures in bins.values()) == pytest.approx(
            overall[f"P@{k}"], abs=1e-9
        )
    # Recall of a bin is that of a truth that knows only the bin's labels, over the rows that have one.
    head = truth * (train.sum(0) >= 8)
    rows = np.flatnonzero(head.sum(1))
    own = pairs[np.isin(pairs[:, 0], rows)]
    own = np.stack([np.searchsorted(rows, own[:, 0]), own[:, 1]], axis=1)
    wanted = metrics.evaluate(predictions[rows], scipy.sparse.csr_matrix(head[rows]), filter_pairs=own)
    for k in (1, 3, 5, 10, 100):
        assert bins["head"][f"R@{k}"] == pytest.approx(wanted[f"R@{k}"], abs=1e-9)


TRUTH = scipy.sparse.csr_matrix(np.eye(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictions": scipy.sparse.csr_matrix((3, 4))}, "predictions are 3 x 4, the truth is 3 x 3"),
        ({"predictions": scipy.sparse.csr_matrix((2, 3))}, "predictions are 2 x 3"),
        ({"predictions": np.eye(3)}, "predictions of type ndarray"),
        ({"predictions": (np.zeros((2, 1), int), np.zeros((2, 1)))}, "2 rows of predictions"),
        ({"predictions": (np.zeros((3, 1), int), np.zeros((3, 2)))}, "ids (3, 1)"),
        ({"predictions": (np.zeros((3, 1)), np.zeros((3, 1)))}, "float64"),
        ({"predictions": (np.full((3, 1), 3), np.zeros((3, 1)))}, "predicted label 3 of 3"),
        ({"predictions": (np.full((3, 1), -2), np.zeros((3, 1)))}, "predicted label -2"),
        ({"predictions": (np.array([[0], [1], [2]]), np.array([[1], [np.nan], [1]]))}, "row 1 (zero-based)"),
        ({"predictions": TRUTH * np.nan}, "row 0 (zero-based) is not a number"),
        ({"truth": [[1]]}, "no sparse matrix"),
        ({"truth": scipy.sparse.csr_matrix((0, 3))}, "no rows"),
        ({"train": scipy.sparse.csr_matrix((3, 5))}, "the truth has 3 labels, the training matrix 5"),
        ({"train": TRUTH, "B": 0}, "B=0"),
        ({"train": TRUTH, "A": np.inf}, "A=inf"),
        ({"ks": ()}, "cuts ()"),
        ({"ks": (0, 1)}, "cuts (0, 1)"),
        ({"ks": (1.5,)}, "cuts (1.5,)"),
        ({"filter_pairs": np.array([[3, 0]])}, "filter pair 3 0 is outside"),
        ({"filter_pairs": np.array([[0, -1]])}, "filter pair 0 -1"),
        ({"filter_pairs": np.array([0, 1])}, "filter pairs of shape (2,)"),
    ],
)  # fmt: skip
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError) as error:
        metrics.evaluate(**{"predictions": TRUTH, "truth": TRUTH, **arguments})
    assert message in str(error.value)
