"""Losses on a batch's similarities, as pure functions: (similarities [Q, L], targets [Q, L]) -> scalar.

A batch has Q queries and L label slots; `targets` is 1 wherever the label of a slot is relevant to a query,
so not only on the diagonal, and a label that stands in several slots counts as often as it stands. Every
function

  * takes similarities of any float type and computes in float32 (float64 stays float64),
  * is a mean over all Q rows, to which a row without a positive adds 0,
  * has finite values and gradients also where a row or column has no positive or no negative,
  * is the same for the whole batch on one device and split over a mesh: nothing here looks at devices.

Shape suffixes: Q queries, L label slots, K negatives. docs/notation.md has them all.
"""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Scalar, Shaped

Similarities: TypeAlias = Float[Array, "Q L"]
Targets: TypeAlias = Shaped[Array, "Q L"]


def triplet(
    similarities_QL: Similarities,
    targets_QL: Targets,
    *,
    key: PRNGKeyArray | None = None,
    k: int = 10,
    margin_min: float = 0.1,
    margin_max: float = 0.3,
    temperature: float = 0.1,
) -> Scalar:
    """Triplet loss against the hardest negatives of the batch, with PRIME's dynamic margin.

    Each query has one positive p, drawn uniformly from its row's 1s, and as negatives n the k highest
    similarities among its 0s. The margin of a pair is clip(|S_p - S_n|, margin_min, margin_max), a constant
    to the gradient; its violation is l_n = max(0, S_n - S_p + margin). A row's loss is sum_n w_n l_n, where
    w = softmax(S_n / temperature) over the row's violating negatives (l_n > 0) only; the gradient flows
    through w as well. NGAME (WSDM 2023) has the weighted triplet, PRIME (NAACL 2025) the dynamic margin.

    DEXA's loss (KDD 2023) is this one on similarities to (label + free vector).

    Args:
      similarities_QL: cosines of queries and label slots.
      targets_QL: 1 (or True) where relevant, 0 elsewhere.
      key: draws the positives; None takes each row's first positive instead.
      k: negatives a row. A row with fewer 0s uses those that it has; a positive is never a negative.
      margin_min: smallest margin; equal to `margin_max` for a fixed one.
      margin_max: largest margin.
      temperature: of the weights, in units of cosine.

    Returns:
      The mean over all rows; a row without a positive, or without a negative, counts as 0.
    """
    similarities_QL, positive_QL = _prepare(similarities_QL, targets_QL)
    return _triplet(similarities_QL, positive_QL, key, k, margin_min, margin_max, temperature)


def ngame(
    similarities_QL: Similarities,
    targets_QL: Targets,
    *,
    key: PRNGKeyArray | None = None,
    k: int = 10,
    margin: float = 0.3,
    temperature: float = 0.1,
) -> Scalar:
    """NGAME's loss (WSDM 2023): `triplet` with a fixed margin."""
    return triplet(
        similarities_QL,
        targets_QL,
        key=key,
        k=k,
        margin_min=margin,
        margin_max=margin,
        temperature=temperature,
    )


def prime(
    similarities_QL: Similarities,
    targets_QL: Targets,
    prototype_similarities_QL: Similarities,
    *,
    key: PRNGKeyArray | None = None,
    k: int = 10,
    margin_min: float = 0.1,
    margin_max: float = 0.3,
    temperature: float = 0.1,
    reg_weight: float = 0.1,
    reg_margin: float = 0.1,
) -> Scalar:
    """PRIME's loss (NAACL 2025): trip(S_z, G) + trip(S_u, G) + trip(S_u^T, G^T) + reg_weight * reg.

    S_z are queries x prototypes, S_u queries x label texts, G the targets, trip is `triplet`; the positive is
    drawn afresh for each of the four terms. The regulariser asks the prototype to do better than the text:

      reg = (mean of max(0, S_u,p - S_z,p + reg_margin) over each row's drawn positive p
             + mean of max(0, S_z,n - S_u,n + reg_margin) over each row's k highest negatives n of S_z) / 2

    each mean over its non-zero entries, and 0 where there is none. A row without a positive has no p, but its
    negatives count.

    Args:
      similarities_QL: S_u, cosines of queries and label texts.
      targets_QL: 1 where relevant, 0 elsewhere.
      prototype_similarities_QL: S_z, cosines of queries and label prototypes.
      key: draws the positives; None takes the first positive of each row (of each column in the third term).
      k: negatives a row, in every term.
      margin_min: smallest margin of the triplets.
      margin_max: largest margin of the triplets.
      temperature: of the triplets' weights.
      reg_weight: weight of the regulariser.
      reg_margin: margin of the regulariser.
    """
    keys = [None] * 4 if key is None else list(jax.random.split(key, 4))
    settings = (k, margin_min, margin_max, temperature)
    text_QL, positive_QL = _prepare(similarities_QL, targets_QL)
    prototype_QL, _ = _prepare(prototype_similarities_QL, targets_QL)
    triplets = (
        _triplet(prototype_QL, positive_QL, keys[0], *settings)
        + _triplet(text_QL, positive_QL, keys[1], *settings)
        + _triplet(text_QL.T, positive_QL.T, keys[2], *settings)
    )

    drawn_QL = _draw_positive(positive_QL, keys[3])
    behind_Q = _pick(text_QL, drawn_QL) - _pick(prototype_QL, drawn_QL)
    ids_QK, valid_QK = _hardest_negatives(prototype_QL, positive_QL, k)
    ahead_QK = _take(prototype_QL, ids_QK, valid_QK) - _take(text_QL, ids_QK, valid_QK)
    regulariser = (
        _mean_of_nonzero(jnp.where(positive_QL.any(axis=1), jax.nn.relu(behind_Q + reg_margin), 0))
        + _mean_of_nonzero(jnp.where(valid_QK, jax.nn.relu(ahead_QK + reg_margin), 0))
    ) / 2
    return triplets + reg_weight * regulariser


def info_nce(
    similarities_QL: Similarities, targets_QL: Targets, temperature: float = 0.05, symmetric: bool = True
) -> Scalar:
    """In-batch softmax: the mean over a row's positives of -log softmax(S / temperature).

    Args:
      similarities_QL: cosines of queries and label slots.
      targets_QL: 1 where relevant, 0 elsewhere.
      temperature: of the softmax, in units of cosine.
      symmetric: average it with the same loss over the columns (labels against queries).

    Returns:
      The mean over rows, a row without a positive counting as 0.
    """
    similarities_QL, positive_QL = _prepare(similarities_QL, targets_QL)
    logits_QL = similarities_QL / temperature

    def one_way(logits: Array, positive: Array) -> Array:
        losses = jax.nn.logsumexp(logits, axis=1, keepdims=True) - logits
        return _mean_of_positives(losses, positive).mean()

    loss = one_way(logits_QL, positive_QL)
    return (loss + one_way(logits_QL.T, positive_QL.T)) / 2 if symmetric else loss


def decoupled_softmax(
    similarities_QL: Similarities, targets_QL: Targets, temperature: float = 0.05
) -> Scalar:
    """DEXML's decoupled softmax (ICLR 2024): the other positives leave a positive's denominator.

    For each positive p: -log(e^{S_p/t} / (e^{S_p/t} + sum over negatives e^{S_n/t})); the mean over a row's
    positives, then over rows, a row without a positive counting as 0.

    Args:
      similarities_QL: cosines of queries and label slots.
      targets_QL: 1 where relevant, 0 elsewhere.
      temperature: t, in units of cosine.
    """
    similarities_QL, positive_QL = _prepare(similarities_QL, targets_QL)
    logits_QL = similarities_QL / temperature
    has_negative_Q1 = jnp.any(~positive_QL, axis=1, keepdims=True)
    # The sum is empty in a row of positives only: such a row is summed whole, so that no -inf enters a
    # gradient, and its loss is then set to 0.
    counted_QL = ~positive_QL | ~has_negative_Q1
    negatives_Q1 = jax.nn.logsumexp(logits_QL, axis=1, keepdims=True, where=counted_QL)
    losses_QL = jnp.where(has_negative_Q1, jax.nn.softplus(negatives_Q1 - logits_QL), 0)
    return _mean_of_positives(losses_QL, positive_QL).mean()


def sigmoid(
    similarities_QL: Similarities,
    targets_QL: Targets,
    scale: float | Array = 10.0,
    bias: float | Array = -10.0,
) -> Scalar:
    """SigLIP's pairwise loss: -log sigmoid(z (scale * S + bias)), z = 1 for relevant pairs and -1 for others.

    Args:
      similarities_QL: cosines of queries and label slots.
      targets_QL: 1 where relevant, 0 elsewhere.
      scale: the inverse temperature, positive; learned (as a logarithm) by the model.
      bias: learned by the model. The defaults are where SigLIP (ICCV 2023) starts.

    Returns:
      The sum over all pairs divided by the number of queries.
    """
    similarities_QL, positive_QL = _prepare(similarities_QL, targets_QL)
    logits_QL = similarities_QL * scale + bias
    return jax.nn.softplus(jnp.where(positive_QL, -logits_QL, logits_QL)).sum(axis=1).mean()


def violation_rate(
    similarities_QL: Similarities, targets_QL: Targets, margin: float = 0.1, k: int = 10
) -> Scalar:
    """The share of hard negatives that come within `margin` of a positive: what a triplet still learns from.

    Of each row that has a positive, the k highest negatives are held against the row's lowest positive. With
    a dynamic margin a negative violates exactly when it is nearer than `margin_min`, whence the default.

    Returns:
      A float32 share from 0 to 1, without gradient; 0 where there is nothing to compare.
    """
    similarities_QL, positive_QL = _prepare(jax.lax.stop_gradient(similarities_QL), targets_QL)
    ids_QK, valid_QK = _hardest_negatives(similarities_QL, positive_QL, k)
    valid_QK &= positive_QL.any(axis=1, keepdims=True)
    lowest_Q = jnp.min(similarities_QL, axis=1, where=positive_QL, initial=jnp.inf)
    violates_QK = valid_QK & (_take(similarities_QL, ids_QK, valid_QK) > lowest_Q[:, None] - margin)
    return violates_QK.sum().astype(jnp.float32) / jnp.maximum(valid_QK.sum(), 1)


def _triplet(
    similarities_QL: Array,
    positive_QL: Array,
    key: Array | None,
    k: int,
    margin_min: float,
    margin_max: float,
    temperature: float,
) -> Array:
    """`triplet` of prepared arguments."""
    drawn_QL = _draw_positive(positive_QL, key)
    ids_QK, valid_QK = _hardest_negatives(similarities_QL, positive_QL, k)
    valid_QK &= positive_QL.any(axis=1, keepdims=True)

    negative_QK = _take(similarities_QL, ids_QK, valid_QK)
    gap_QK = negative_QK - _pick(similarities_QL, drawn_QL)[:, None]
    margin_QK = jax.lax.stop_gradient(jnp.clip(jnp.abs(gap_QK), margin_min, margin_max))
    violation_QK = jnp.where(valid_QK, jax.nn.relu(gap_QK + margin_QK), 0)
    weights_QK = _masked_softmax(negative_QK / temperature, violation_QK > 0)
    return jnp.sum(weights_QK * violation_QK, axis=1).mean()


def _prepare(similarities_QL: Array, targets_QL: Array) -> tuple[Array, Array]:
    """Returns the similarities in at least float32, and the targets as bool."""
    similarities_QL, targets_QL = jnp.asarray(similarities_QL), jnp.asarray(targets_QL)
    if similarities_QL.ndim != 2 or similarities_QL.shape != targets_QL.shape:
        raise ValueError(
            f"similarities {similarities_QL.shape} and targets {targets_QL.shape} must have one shape [Q, L]"
        )
    # The barrier keeps XLA from folding running counts of targets that are known when it compiles, which
    # takes it minutes at 2048 x 2048.
    positive_QL = jax.lax.optimization_barrier(targets_QL > 0)
    return similarities_QL.astype(jnp.promote_types(similarities_QL.dtype, jnp.float32)), positive_QL


def _draw_positive(positive_QL: Array, key: Array | None) -> Array:
    """Marks one True of each row, drawn uniformly (the first without a key); none in a row that has none."""
    # One random number a row and a running count: a random number for every pair costs twice as much.
    count_QL = jnp.cumsum(positive_QL, axis=1, dtype=jnp.int32)
    total_Q = count_QL[:, -1]
    if key is None:
        rank_Q = jnp.zeros_like(total_Q)
    else:
        rank_Q = jax.random.randint(key, total_Q.shape, 0, jnp.maximum(total_Q, 1))
    return positive_QL & (count_QL == rank_Q[:, None] + 1)


def _pick(values_QL: Array, drawn_QL: Array) -> Array:
    """Returns each row's marked value [Q], 0 in a row without a mark."""
    return jnp.where(drawn_QL, values_QL, 0).sum(axis=1)


def _hardest_negatives(similarities_QL: Array, positive_QL: Array, k: int) -> tuple[Array, Array]:
    """Returns the columns of each row's k highest negatives, and which are real: a row may have fewer."""
    masked_QL = jnp.where(positive_QL, -jnp.inf, jax.lax.stop_gradient(similarities_QL))
    values_QK, ids_QK = jax.lax.top_k(masked_QL, min(k, masked_QL.shape[1]))
    return ids_QK, values_QK != -jnp.inf


def _take(values_QL: Array, ids_QK: Array, valid_QK: Array) -> Array:
    """Returns the values at `ids_QK`, 0 where not valid."""
    return jnp.where(valid_QK, jnp.take_along_axis(values_QL, ids_QK, axis=1), 0)


def _masked_softmax(logits_QK: Array, mask_QK: Array) -> Array:
    """Softmax over the masked entries of each row; 0 elsewhere, and everywhere in a row without any."""
    highest_Q1 = jax.lax.stop_gradient(
        jnp.max(logits_QK, axis=1, keepdims=True, where=mask_QK, initial=-jnp.inf)
    )
    # The inner `where` keeps exp finite where its gradient is thrown away: 0 * inf would be NaN.
    shifted_QK = jnp.where(mask_QK, logits_QK - highest_Q1, 0)
    exp_QK = jnp.where(mask_QK, jnp.exp(shifted_QK), 0)
    total_Q1 = exp_QK.sum(axis=1, keepdims=True)
    return exp_QK / jnp.where(total_Q1 > 0, total_Q1, 1)


def _mean_of_nonzero(values: Array) -> Array:
    """Mean over the non-zero entries, 0 where there is none (PRIME's public code divides 0 by 0)."""
    return values.sum() / jnp.maximum((values != 0).sum(), 1)


def _mean_of_positives(losses_QL: Array, positive_QL: Array) -> Array:
    """Returns each row's mean over its positives [Q], 0 in a row without any."""
    return jnp.where(positive_QL, losses_QL, 0).sum(axis=1) / jnp.maximum(positive_QL.sum(axis=1), 1)
