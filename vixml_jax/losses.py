"""Losses on a batch's similarities, as pure functions: (similarities [Q, L], targets [Q, L]) -> scalar.

A batch has Q queries and L label slots; `targets` is 1 wherever the label of a slot is relevant to a query,
so not only on the diagonal, and a label that stands in several slots counts as often as it stands. Every
function

  * takes similarities of any float type and computes in float32 (float64 stays float64),
  * is a mean over all Q rows, to which a row without a positive adds 0,
  * has finite values and gradients also where a row or column has no positive or no negative,
  * is the same for the whole batch on one device and split over a mesh: nothing here looks at devices.

What a step computes is the same sums, a block at a time: see `loss_terms` and `global_batch`.

Shape suffixes: Q queries, L label slots, K negatives. docs/notation.md has them all.
"""

from __future__ import annotations

from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Scalar, Shaped

from vixml_jax import loss_terms

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
    loss = loss_terms.triplet(loss_terms.Triplets(k, margin_min, margin_max, temperature))
    return _of_whole(loss, similarities_QL, targets_QL, key=key)


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
    triplets = loss_terms.Triplets(k, margin_min, margin_max, temperature)
    loss = loss_terms.prime(triplets, reg_weight, reg_margin)
    return _of_whole(loss, prototype_similarities_QL, targets_QL, similarities_QL, key=key)


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
    return _of_whole(loss_terms.info_nce(temperature, symmetric), similarities_QL, targets_QL)


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
    return _of_whole(loss_terms.decoupled_softmax(temperature), similarities_QL, targets_QL)


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
    return _of_whole(loss_terms.sigmoid(), similarities_QL, targets_QL, pair_logits=(scale, bias))


def violation_rate(
    similarities_QL: Similarities, targets_QL: Targets, margin: float = 0.1, k: int = 10
) -> Scalar:
    """The share of hard negatives that come within `margin` of a positive: what a triplet still learns from.

    Of each row that has a positive, the k highest negatives are held against the row's lowest positive. With
    a dynamic margin a negative violates exactly when it is nearer than `margin_min`, whence the default.

    Returns:
      A float32 share from 0 to 1, without gradient; 0 where there is nothing to compare.
    """
    similarities_QL, positive_QL = _prepare(similarities_QL, targets_QL)
    sums = loss_terms.violations(similarities_QL, positive_QL, margin, k)
    return sums["violating"] / jnp.maximum(sums["compared"], 1)


def _of_whole(
    loss: loss_terms.Loss,
    labels_QL: Similarities,
    targets_QL: Targets,
    texts_QL: Similarities | None = None,
    *,
    key: PRNGKeyArray | None = None,
    pair_logits: tuple[float | Array, float | Array] | None = None,
) -> Scalar:
    """A loss on one block of rows, which is all of them, and one of columns."""
    labels_QL, positive_QL = _prepare(labels_QL, targets_QL)
    if texts_QL is not None:
        texts_QL, _ = _prepare(texts_QL, targets_QL)
    Q, L = labels_QL.shape
    row_draws, column_draws = (None, None) if key is None else loss_terms.draws(loss, key, Q, L)
    sums = loss.rows(loss_terms.Block(labels_QL, positive_QL, texts_QL, row_draws, pair_logits))
    if loss.columns is not None:
        texts_LQ = None if texts_QL is None else texts_QL.T
        block = loss_terms.Block(labels_QL.T, positive_QL.T, texts_LQ, column_draws, pair_logits)
        sums |= loss.columns(block)
    return loss.total(sums, Q, L)


def _prepare(similarities_QL: Array, targets_QL: Array) -> tuple[Array, Array]:
    """Returns the similarities in at least float32, and the targets as bool."""
    similarities_QL, targets_QL = jnp.asarray(similarities_QL), jnp.asarray(targets_QL)
    if similarities_QL.ndim != 2 or similarities_QL.shape != targets_QL.shape:
        raise ValueError(
            f"similarities {similarities_QL.shape} and targets {targets_QL.shape} must have one shape [Q, L]"
        )
    return loss_terms.in_float32(similarities_QL), loss_terms.is_positive(targets_QL)
