"""What a batch needs of the relevance matrix: one positive a query, and who else is relevant to whom."""

from __future__ import annotations

import numpy as np
import scipy.sparse


def sample_positives(
    targets: scipy.sparse.csr_matrix,
    rows: np.ndarray,
    probabilities: str,
    propensities: np.ndarray | None,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draws one relevant label for each query.

    Args:
      targets: csr_matrix [N, L]; its stored entries are the relevant labels.
      rows: int [B]; queries, repeated ones draw independently.
      probabilities: "inverse_propensity" draws a query's labels in proportion to `propensities`, so that
        rare labels are seen more often (ViXML); "uniform" draws them alike.
      propensities: float [L]; inverse propensities, positive; not read for "uniform".
      rng: the source of randomness, one draw a row.

    Returns:
      int32 [B]; label ids, -1 for a query without labels.
    """
    labels, lengths = _labels_of(targets, rows)
    if not len(labels):
        return np.full(len(lengths), -1, np.int32)
    if probabilities == "uniform":
        weights = np.ones(len(labels))
    elif probabilities == "inverse_propensity":
        if propensities is None:
            raise ValueError("inverse_propensity needs propensities")
        weights = np.asarray(propensities, np.float64)[labels]
    else:
        raise ValueError(f"unknown probabilities {probabilities!r}")
    ends = np.cumsum(lengths)
    starts = ends - lengths
    sums = np.concatenate(([0.0], np.cumsum(weights)))
    # The first label whose running sum exceeds the draw; the draw lies in the row's span of the running sums.
    points = sums[starts] + rng.random(len(lengths)) * (sums[ends] - sums[starts])
    chosen = np.searchsorted(sums[1:], points, side="right")
    chosen = np.clip(chosen, starts, ends - 1)  # rounding must not leave the row; empty rows are masked below
    return np.where(lengths > 0, labels[chosen], -1).astype(np.int32)


def relevance(
    targets: scipy.sparse.csr_matrix, rows: np.ndarray, label_ids: np.ndarray, *, by_label: bool = False
) -> np.ndarray:
    """Marks which label slots of a batch are relevant to which queries.

    Args:
      targets: csr_matrix [N, L]; its stored entries are the relevant labels.
      rows: int [Q]; the queries.
      label_ids: int [B]; the labels in the slots, repeated ones included; -1 for an empty slot.
      by_label: a row for each slot instead; to turn a large matrix over takes longer than to mark it.

    Returns:
      uint8 [Q, B], or [B, Q] by label; 1 where the slot's label is relevant to the query, 0 all along an
      empty slot.
    """
    label_ids = np.asarray(label_ids, np.int64)
    labels, lengths = _labels_of(targets, rows)
    queries = np.repeat(np.arange(len(lengths)), lengths)
    order = np.argsort(label_ids, kind="stable")
    sorted_ids = label_ids[order]
    # A label may stand in several slots: each relevant entry marks the whole run of equal ids.
    first = np.searchsorted(sorted_ids, labels, side="left")
    counts = np.searchsorted(sorted_ids, labels, side="right") - first
    shape, pairs = (len(lengths), len(label_ids)), (np.repeat(queries, counts), order[spans(first, counts)])
    if by_label:
        shape, pairs = shape[::-1], pairs[::-1]
    marks = np.zeros(shape, np.uint8)
    marks[pairs] = 1
    return marks


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenates the ranges `starts[i] .. starts[i] + lengths[i]`, int64 [sum of lengths]."""
    shift = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return shift + np.arange(len(shift))


def _labels_of(targets: scipy.sparse.csr_matrix, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The labels of `rows` end to end, and how many each row has."""
    rows = np.asarray(rows, np.int64)
    starts = targets.indptr[rows].astype(np.int64)
    lengths = targets.indptr[rows + 1].astype(np.int64) - starts
    return targets.indices[spans(starts, lengths)], lengths
