"""Losses as sums over blocks of rows, so that nobody has to hold all similarities of a large batch at once.

A loss of a batch has a sum over its queries (rows), for some losses one over its label slots (columns), and
a formula that joins the sums. `losses` computes them on whole matrices, `global_batch` a block at a time on
every device of a mesh: both from the definitions here, so that they are the same.

Shape suffixes: Q rows of a block, L its columns, K negatives, D draws. docs/notation.md has them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Sums = dict[str, Array]


class Block(NamedTuple):
    """Some rows of a batch's similarities. In a block of columns, rows are label slots and columns queries.

    Attributes:
      labels_QL: float; cosines of queries and what labels are searched by.
      positive_QL: bool; which pairs are relevant.
      texts_QL: float; cosines of queries and label texts, None for a loss without `uses_texts`.
      draws_DQ: uint32; a random number for each draw and each row, None for first positives.
      pair_logits: scale and bias of the sigmoid loss.
    """

    labels_QL: Array
    positive_QL: Array
    texts_QL: Array | None = None
    draws_DQ: Array | None = None
    pair_logits: tuple[Any, Any] | None = None

    @property
    def label_texts_QL(self) -> Array:
        """`texts_QL` of a loss that uses them."""
        assert self.texts_QL is not None, "a loss without uses_texts reads them"
        return self.texts_QL

    def draw(self, number: int) -> Array | None:
        """The random numbers of one draw, uint32 [Q]."""
        return None if self.draws_DQ is None else self.draws_DQ[number]


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss of a batch of Q queries and L label slots.

    Attributes:
      rows: the sums over a block of queries; every name's values add up over blocks.
      total: the loss, from all blocks' sums, Q and L.
      columns: the sums over a block of label slots, None where the loss has no such term.
      row_draws, column_draws: how many random positives they draw of a row.
      uses_texts: whether the similarities with label texts are read.
    """

    rows: Callable[[Block], Sums]
    total: Callable[[Sums, int, int], Array]
    columns: Callable[[Block], Sums] | None = None
    row_draws: int = 0
    column_draws: int = 0
    uses_texts: bool = False


@dataclasses.dataclass(frozen=True)
class Triplets:
    """What a triplet term is made of; see `losses.triplet` for the formula.

    Attributes:
      k: hardest negatives of a row.
      margin_min, margin_max: bounds of the dynamic margin.
      temperature: of the weights over violating negatives.
    """

    k: int
    margin_min: float
    margin_max: float
    temperature: float

    def sum(self, similarities_QL: Array, positive_QL: Array, draw_Q: Array | None) -> Array:
        """Sums the rows' losses; a row without a positive, or without a negative, adds 0."""
        drawn_QL = draw_positive(positive_QL, draw_Q)
        ids_QK, valid_QK = hardest_negatives(similarities_QL, positive_QL, self.k)
        valid_QK &= positive_QL.any(axis=1, keepdims=True)

        negative_QK = take(similarities_QL, ids_QK, valid_QK)
        gap_QK = negative_QK - pick(similarities_QL, drawn_QL)[:, None]
        margin_QK = jax.lax.stop_gradient(jnp.clip(jnp.abs(gap_QK), self.margin_min, self.margin_max))
        violation_QK = jnp.where(valid_QK, jax.nn.relu(gap_QK + margin_QK), 0)
        weights_QK = masked_softmax(negative_QK / self.temperature, violation_QK > 0)
        return jnp.sum(weights_QK * violation_QK)


def triplet(triplets: Triplets) -> Loss:
    """The triplet loss on what labels are searched by."""

    def rows(block: Block) -> Sums:
        return {"triplet": triplets.sum(block.labels_QL, block.positive_QL, block.draw(0))}

    return Loss(rows, lambda sums, num_queries, _: sums["triplet"] / num_queries, row_draws=1)


def prime(triplets: Triplets, reg_weight: float, reg_margin: float) -> Loss:
    """PRIME's sum of terms; see `losses.prime` for the formula."""

    def rows(block: Block) -> Sums:
        prototype_QL, text_QL, positive_QL = block.labels_QL, block.label_texts_QL, block.positive_QL
        drawn_QL = draw_positive(positive_QL, block.draw(2))
        ids_QK, valid_QK = hardest_negatives(prototype_QL, positive_QL, triplets.k)
        better_Q = jax.nn.relu(pick(text_QL, drawn_QL) - pick(prototype_QL, drawn_QL) + reg_margin)
        better_Q = jnp.where(drawn_QL.any(axis=1), better_Q, 0)
        worse_QK = jax.nn.relu(
            take(prototype_QL, ids_QK, valid_QK) - take(text_QL, ids_QK, valid_QK) + reg_margin
        )
        worse_QK = jnp.where(valid_QK, worse_QK, 0)
        return {
            "prototypes": triplets.sum(prototype_QL, positive_QL, block.draw(0)),
            "texts": triplets.sum(text_QL, positive_QL, block.draw(1)),
            "better": better_Q.sum(),
            "better_count": count(better_Q != 0),
            "worse": worse_QK.sum(),
            "worse_count": count(worse_QK != 0),
        }

    def columns(block: Block) -> Sums:
        return {"label_texts": triplets.sum(block.label_texts_QL, block.positive_QL, block.draw(0))}

    def total(sums: Sums, num_queries: int, num_labels: int) -> Array:
        # A mean over non-zero entries is 0 where there is none (PRIME's public code divides 0 by 0).
        mean = lambda name: sums[name] / jnp.maximum(sums[f"{name}_count"], 1)  # noqa: E731
        of_queries = (sums["prototypes"] + sums["texts"]) / num_queries
        of_labels = sums["label_texts"] / num_labels
        return of_queries + of_labels + reg_weight * (mean("better") + mean("worse")) / 2

    return Loss(rows, total, columns, row_draws=3, column_draws=1, uses_texts=True)


def info_nce(temperature: float, symmetric: bool) -> Loss:
    """The in-batch softmax; see `losses.info_nce`."""

    def one_way(block: Block) -> Array:
        logits_QL = block.labels_QL / temperature
        losses_QL = jax.nn.logsumexp(logits_QL, axis=1, keepdims=True) - logits_QL
        return means_of_positives(losses_QL, block.positive_QL).sum()

    def total(sums: Sums, num_queries: int, num_labels: int) -> Array:
        of_queries = sums["queries"] / num_queries
        return (of_queries + sums["labels"] / num_labels) / 2 if symmetric else of_queries

    def columns(block: Block) -> Sums:
        return {"labels": one_way(block)}

    return Loss(lambda block: {"queries": one_way(block)}, total, columns if symmetric else None)


def decoupled_softmax(temperature: float) -> Loss:
    """DEXML's decoupled softmax; see `losses.decoupled_softmax`."""

    def rows(block: Block) -> Sums:
        logits_QL, positive_QL = block.labels_QL / temperature, block.positive_QL
        has_negative_Q1 = jnp.any(~positive_QL, axis=1, keepdims=True)
        # The sum is empty in a row of positives only: such a row is summed whole, so that no -inf enters a
        # gradient, and its loss is then set to 0.
        counted_QL = ~positive_QL | ~has_negative_Q1
        negatives_Q1 = jax.nn.logsumexp(logits_QL, axis=1, keepdims=True, where=counted_QL)
        losses_QL = jnp.where(has_negative_Q1, jax.nn.softplus(negatives_Q1 - logits_QL), 0)
        return {"softmax": means_of_positives(losses_QL, positive_QL).sum()}

    return Loss(rows, lambda sums, num_queries, _: sums["softmax"] / num_queries)


def sigmoid() -> Loss:
    """SigLIP's pairwise loss, whose scale and bias come with the block; see `losses.sigmoid`."""

    def rows(block: Block) -> Sums:
        assert block.pair_logits is not None, "the sigmoid loss needs a scale and a bias"
        scale, bias = block.pair_logits
        logits_QL = block.labels_QL * scale + bias
        return {"pairs": jax.nn.softplus(jnp.where(block.positive_QL, -logits_QL, logits_QL)).sum()}

    return Loss(rows, lambda sums, num_queries, _: sums["pairs"] / num_queries)


def violations(similarities_QL: Array, positive_QL: Array, margin: float, k: int) -> Sums:
    """Counts the rows' hard negatives, and those of them that come near a positive: float32, no gradient."""
    similarities_QL = jax.lax.stop_gradient(similarities_QL)
    ids_QK, valid_QK = hardest_negatives(similarities_QL, positive_QL, k)
    valid_QK &= positive_QL.any(axis=1, keepdims=True)
    lowest_Q = jnp.min(similarities_QL, axis=1, where=positive_QL, initial=jnp.inf)
    violates_QK = valid_QK & (take(similarities_QL, ids_QK, valid_QK) > lowest_Q[:, None] - margin)
    return {"violating": count(violates_QK), "compared": count(valid_QK)}


def draws(loss: Loss, key: Array, num_queries: int, num_labels: int) -> tuple[Array, Array]:
    """Random numbers for drawn positives, one a row whoever holds it.

    Returns:
      uint32 [D, Q] for the rows and uint32 [D, L] for the columns.
    """
    row_key, column_key = jax.random.split(key)
    of_rows = jax.random.bits(row_key, (loss.row_draws, num_queries), jnp.uint32)
    return of_rows, jax.random.bits(column_key, (loss.column_draws, num_labels), jnp.uint32)


def in_float32(similarities_QL: Array) -> Array:
    """In at least float32: float64 stays float64."""
    return similarities_QL.astype(jnp.promote_types(similarities_QL.dtype, jnp.float32))


def is_positive(targets_QL: Array) -> Array:
    """Relevance as bool."""
    # The barrier keeps XLA from folding running counts of targets that are known when it compiles, which
    # takes it minutes at 2048 x 2048.
    return jax.lax.optimization_barrier(targets_QL > 0)


def draw_positive(positive_QL: Array, draw_Q: Array | None) -> Array:
    """Marks one True of each row, drawn uniformly (the first without a draw); none in a row that has none."""
    # One random number a row and a running count: a random number for every pair costs twice as much.
    count_QL = jnp.cumsum(positive_QL, axis=1, dtype=jnp.int32)
    total_Q = count_QL[:, -1]
    if draw_Q is None:
        rank_Q = jnp.zeros_like(total_Q)
    else:
        rank_Q = (draw_Q % jnp.maximum(total_Q, 1).astype(jnp.uint32)).astype(jnp.int32)
    return positive_QL & (count_QL == rank_Q[:, None] + 1)


def pick(values_QL: Array, drawn_QL: Array) -> Array:
    """Returns each row's marked value [Q], 0 in a row without a mark."""
    return jnp.where(drawn_QL, values_QL, 0).sum(axis=1)


def hardest_negatives(similarities_QL: Array, positive_QL: Array, k: int) -> tuple[Array, Array]:
    """Returns the columns of each row's k highest negatives, and which are real: a row may have fewer."""
    masked_QL = jnp.where(positive_QL, -jnp.inf, jax.lax.stop_gradient(similarities_QL))
    values_QK, ids_QK = jax.lax.top_k(masked_QL, min(k, masked_QL.shape[1]))
    return ids_QK, values_QK != -jnp.inf


def take(values_QL: Array, ids_QK: Array, valid_QK: Array) -> Array:
    """Returns the values at `ids_QK`, 0 where not valid."""
    return jnp.where(valid_QK, jnp.take_along_axis(values_QL, ids_QK, axis=1), 0)


def masked_softmax(logits_QK: Array, mask_QK: Array) -> Array:
    """Softmax over the masked entries of each row; 0 elsewhere, and everywhere in a row without any."""
    highest_Q1 = jax.lax.stop_gradient(
        jnp.max(logits_QK, axis=1, keepdims=True, where=mask_QK, initial=-jnp.inf)
    )
    # The inner `where` keeps exp finite where its gradient is thrown away: 0 * inf would be NaN.
    shifted_QK = jnp.where(mask_QK, logits_QK - highest_Q1, 0)
    exp_QK = jnp.where(mask_QK, jnp.exp(shifted_QK), 0)
    total_Q1 = exp_QK.sum(axis=1, keepdims=True)
    return exp_QK / jnp.where(total_Q1 > 0, total_Q1, 1)


def means_of_positives(losses_QL: Array, positive_QL: Array) -> Array:
    """Returns each row's mean over its positives [Q], 0 in a row without any."""
    return jnp.where(positive_QL, losses_QL, 0).sum(axis=1) / jnp.maximum(positive_QL.sum(axis=1), 1)


def count(mask: Array) -> Array:
    """How many are True, float32: exact up to 2^24, and sums over blocks stay one kind of number."""
    return mask.sum().astype(jnp.float32)
