"""The field's ranking metrics, plain and weighted by inverse propensity; NumPy and SciPy alone.

Definitions are those behind the published tables of extreme classification (pyxclib, and Jain et al., KDD
2016, for propensities). All means run over all rows: a row without positives counts as 0, and a row with
fewer than k predictions is padded with misses. Labels rank by falling score, equal scores by rising label
number.

  P@k       mean of hits / k
  R@k       mean of hits / max(positives, 1)
  nDCG@k    mean of DCG@k / min(Z, S_k): DCG@k sums 1 / log2(rank + 1) over the hits, S_k is the sum of the
            first k discounts, Z is S of the row's number of positives
  PSP@k, PSnDCG@k, PSR@k
            the same with every hit weighted by its label's inverse propensity, divided by the same mean of
            the best possible ranking: a ratio of means. The normaliser of PSnDCG stays unweighted.
  hits@k    share of rows with at least one hit
  MRR       mean of 1 / rank of the first hit, over all predictions given; 0 for a row without a hit
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vixml_jax.errors import UserError
from vixml_jax.ranking import Hits, best_ranking, binary, find_hits

# Cuts of R@k that are always given.
RECALL_CUTS = (10, 100)
# Training frequencies at which labels count as torso, and as head.
TORSO_FROM = 6
HEAD_FROM = 51


def evaluate(
    predictions: Any,
    truth: Any,
    train: Any = None,
    ks: Sequence[int] = (1, 3, 5),
    A: float = 0.55,
    B: float = 1.5,
    filter_pairs: np.ndarray | None = None,
) -> dict[str, float]:
    """Scores predictions against the truth.

    Args:
      predictions: sparse matrix of scores [N, L], of which every stored entry is a prediction, whatever its
        score; or (ids, scores), both [N, k] in any order, -1 where a row has fewer. A label that a row names
        twice counts once, at its higher score.
      truth: sparse 0/1 matrix [N, L] of relevant labels; stored zeros are not relevant.
      train: sparse 0/1 training matrix [M, L]; without it there are no propensity-scored figures.
      ks: cuts, at least 1.
      A: of the propensity model; 0.6 for the Amazon family, 0.5 for Wikipedia-500K, else 0.55.
      B: of the propensity model; 2.6 for the Amazon family, 0.4 for Wikipedia-500K, else 1.5.
      filter_pairs: whole numbers [n, 2] of (row, label), taken out of the predictions before any cut.

    Returns:
      Metric name ("P@1", "nDCG@3", "PSP@5", "R@100", "MRR", ...) -> percent.

    Raises:
      UserError: if shapes do not fit, a label is out of range, or a score is not a number.
    """
    ks = _checked_ks(ks)
    truth = binary(truth, "truth")
    weights_L = None
    if train is not None:
        if train.shape[1] != truth.shape[1]:
            raise UserError(
                f"the truth has {truth.shape[1]} labels, the training matrix {train.shape[1]}",
                fix="give two matrices over the same labels",
            )
        weights_L = inverse_propensity(train, A, B)
    hits = find_hits(predictions, truth, filter_pairs)
    return _figures(hits, truth, weights_L, ks)


def inverse_propensity(train: Any, A: float = 0.55, B: float = 1.5) -> np.ndarray:
    """Inverse propensities of Jain et al. (KDD 2016): 1 + C (n_l + B)^-A, C = (ln N - 1) (B + 1)^A.

    Args:
      train: sparse 0/1 training matrix [N, L]; n_l is the number of rows that have label l.
      A, B: of the propensity model, B positive.

    Returns:
      float64 [L]; labels that training never saw have the largest.

    Raises:
      UserError: if A or B cannot be, or the matrix has no rows.
    """
    if not (np.isfinite(A) and np.isfinite(B) and B > 0):
        raise UserError(f"A={A}, B={B} are no propensity model", fix="A must be finite and B positive")
    train = binary(train, "training matrix")
    frequencies_L = np.bincount(train.indices, minlength=train.shape[1]).astype(np.float64)
    C = (np.log(train.shape[0]) - 1) * (B + 1) ** A
    return 1 + C * (frequencies_L + B) ** -A


def by_label_frequency(
    predictions: Any,
    truth: Any,
    train: Any,
    ks: Sequence[int] = (1, 3, 5),
    filter_pairs: np.ndarray | None = None,
    *,
    torso_from: int = TORSO_FROM,
    head_from: int = HEAD_FROM,
) -> dict[str, dict[str, float]]:
    """Breaks figures down by how often a label occurs in training.

    Args:
      predictions, truth, train, ks, filter_pairs: as in `evaluate`.
      torso_from: least training frequency of a torso label; those below are the tail.
      head_from: least training frequency of a head label.

    Returns:
      Of "head", "torso", "tail" and "unseen" (never in training) those that have labels, each with `labels`
      and `positives` (how many), "P@k" in percent: the share of the overall P@k that hits among its labels
      make up, so that all bins add up to it; and "R@k" in percent: recall of its labels alone, the mean over
      rows that have one of them as a positive.
    """
    ks = _checked_ks(ks)
    truth = binary(truth, "truth")
    train = binary(train, "training matrix")
    if train.shape[1] != truth.shape[1]:
        raise UserError(f"the truth has {truth.shape[1]} labels, the training matrix {train.shape[1]}")
    hits = find_hits(predictions, truth, filter_pairs)
    frequencies_L = np.bincount(train.indices, minlength=train.shape[1])
    bins_L = np.digitize(frequencies_L, [1, torso_from, head_from])
    rows = np.repeat(np.arange(truth.shape[0]), np.diff(truth.indptr))
    broken_down = {}
    for number, name in ((3, "head"), (2, "torso"), (1, "tail"), (0, "unseen")):
        num_labels = np.count_nonzero(bins_L == number)
        if not num_labels:
            continue
        positives = bins_L[truth.indices] == number
        positives_N = np.bincount(rows[positives], minlength=truth.shape[0])
        inside = bins_L[hits.labels] == number
        figures = {"labels": float(num_labels), "positives": float(positives.sum())}
        for k in ks:
            figures[f"P@{k}"] = 100 * np.count_nonzero(inside & (hits.ranks < k)) / (k * truth.shape[0])
        for k in sorted({*ks, *RECALL_CUTS}):
            counted = hits.rows[inside & (hits.ranks < k)]
            recalls = (1 / positives_N[counted]).sum() / max(np.count_nonzero(positives_N), 1)
            figures[f"R@{k}"] = 100 * float(recalls)
        broken_down[name] = figures
    return broken_down


def by_group(
    predictions: Any,
    truth: Any,
    groups: Any,
    train: Any = None,
    ks: Sequence[int] = (1, 3, 5),
    A: float = 0.55,
    B: float = 1.5,
    filter_pairs: np.ndarray | None = None,
) -> dict[Any, dict[str, float]]:
    """Breaks figures down by groups of rows, such as queries with 0, 1, 2 or 3 pictures.

    Args:
      groups: [N] the group of each row: numbers or strings.
      predictions, truth, train, ks, A, B, filter_pairs: as in `evaluate`.

    Returns:
      Group, in increasing order -> `rows` (how many) and the figures of `evaluate` over its rows alone.
    """
    ks = _checked_ks(ks)
    truth = binary(truth, "truth")
    groups = np.asarray(groups)
    if groups.shape != truth.shape[:1]:
        raise UserError(f"{groups.shape} groups for {truth.shape[0]} rows", fix="give one group a row")
    weights_L = None if train is None else inverse_propensity(train, A, B)
    hits = find_hits(predictions, truth, filter_pairs)
    names, members_N = np.unique(groups, return_inverse=True)
    figures = {}
    for number, name in enumerate(names.tolist()):
        chosen_N = members_N == number
        new_rows_N = np.cumsum(chosen_N) - 1
        inside = chosen_N[hits.rows]
        part = Hits(new_rows_N[hits.rows[inside]], hits.labels[inside], hits.ranks[inside])
        selected = truth[np.flatnonzero(chosen_N)]
        figures[name] = {
            "rows": float(selected.shape[0]),
            **_figures(part, selected, weights_L, ks),
        }
    return figures


def _figures(hits: Hits, truth: Any, weights_L: np.ndarray | None, ks: tuple[int, ...]) -> dict[str, float]:
    """All figures of rows that are given by their hits; the rows of `truth` are all that count."""
    num_rows = truth.shape[0]
    positives_N = np.diff(truth.indptr)
    deepest = max(*ks, *RECALL_CUTS)
    inside = hits.ranks < deepest
    cut = Hits(*(values[inside] for values in hits))
    sums_S = np.concatenate(([0.0], np.cumsum(1 / np.log2(np.arange(deepest) + 2))))

    def mean_of(metric: str, entries: Hits, k: int, weights: np.ndarray | None) -> float:
        """Mean over the rows of one metric at one cut, each hit weighted."""
        counted = entries.ranks < k
        rows = entries.rows[counted]
        if metric == "P":
            gains = np.full(len(rows), 1 / k)
        elif metric == "R":
            gains = 1 / positives_N[rows]
        else:
            gains = 1 / np.log2(entries.ranks[counted] + 2) / sums_S[np.minimum(positives_N[rows], k)]
        return float((gains if weights is None else gains * weights[counted]).sum() / num_rows)

    figures: dict[str, float] = {}
    for metric in ("P", "nDCG"):
        figures |= {f"{metric}@{k}": mean_of(metric, cut, k, None) for k in ks}
    if weights_L is not None:
        best = best_ranking(truth, weights_L, max(ks))
        cut_weights, best_weights = weights_L[cut.labels], weights_L[best.labels]
        for metric in ("P", "nDCG", "R"):
            for k in ks:
                ideal = mean_of(metric, best, k, best_weights)
                reached = mean_of(metric, cut, k, cut_weights)
                figures[f"PS{metric}@{k}"] = reached / ideal if ideal else 0.0
    figures |= {f"R@{k}": mean_of("R", cut, k, None) for k in sorted({*ks, *RECALL_CUTS})}
    first_N = np.full(num_rows, np.iinfo(np.int64).max)
    np.minimum.at(first_N, hits.rows, hits.ranks)
    figures |= {f"hits@{k}": np.count_nonzero(first_N < k) / num_rows for k in ks}
    found = first_N[first_N < np.iinfo(np.int64).max]
    figures["MRR"] = float((1 / (found + 1)).sum() / num_rows)
    return {name: 100 * value for name, value in figures.items()}


def _checked_ks(ks: Sequence[int]) -> tuple[int, ...]:
    checked = tuple(dict.fromkeys(int(k) for k in ks))
    if not checked or min(checked) < 1 or list(map(float, checked)) != list(dict.fromkeys(map(float, ks))):
        raise UserError(f"cuts {tuple(ks)}", fix="give whole numbers of at least 1")
    return checked
