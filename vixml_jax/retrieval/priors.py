"""Label priors: how often a label was relevant in training has a part in its score.

A softmax over the labels of a batch meets a label as a negative about as often as it occurs, so that scores
come to stand for log p(label | query) - log p(label): frequent labels are held down (Yi et al. 2019,
Sampling-bias-corrected neural modeling; Menon et al. 2021, Long-tail learning via logit adjustment).
Some of what was taken is given back here, after the search, to the labels found.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse

from vixml_jax.retrieval.augment import Found


def log_priors(train_targets: scipy.sparse.csr_matrix) -> np.ndarray:
    """Returns log(1 + training queries) of each label, less the mean over labels: float32 [L].

    Args:
      train_targets: csr_matrix [N, L]; its stored entries are the relevant labels.
    """
    counts_L = np.bincount(train_targets.indices, minlength=train_targets.get_shape()[1])
    logs_L = np.log1p(counts_L)
    return (logs_L - logs_L.mean()).astype(np.float32)


def add_priors(labels: Found, log_priors_L: np.ndarray, weight: float) -> Found:
    """Adds `weight` times its log prior to the score of each label found, and orders them anew.

    Args:
      labels: ids int32 [Q, K] and scores float32 [Q, K] of a search over labels; -1 where there are fewer.
      log_priors_L: float32 [L]. A label beyond them, which came after training, counts as the mean of them.
      weight: in units of cosine; 0 changes nothing.

    Returns:
      The same labels and their scores, best first, equal ones by label number.
    """
    if not weight:
        return labels
    ids_QK, scores_QK = labels
    known_QK = (ids_QK >= 0) & (ids_QK < len(log_priors_L))
    added_QK = np.where(known_QK, log_priors_L[np.where(known_QK, ids_QK, 0)], 0)
    scores_QK = (scores_QK + weight * added_QK).astype(np.float32)
    order_QK = np.lexsort((ids_QK, -scores_QK))
    return np.take_along_axis(ids_QK, order_QK, 1), np.take_along_axis(scores_QK, order_QK, 1)
