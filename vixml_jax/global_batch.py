"""The loss of the global batch, whose queries and label slots are split over the devices of a mesh.

Every device computes its own queries' similarities with all label slots, and where a loss has a term over
label slots, its own slots' with all queries. It does so a block of rows at a time, and computes a block again
on the way back: no device ever holds the matrix of all pairs, and what travels is embeddings.

Shape suffixes: q and l are a device's own queries and label slots, Q and L all of them; E is the width of an
embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vixml_jax import loss_terms, sharding
from vixml_jax.loss_terms import Block, Loss, Sums

# Pairs of a block: 64 MB of float32 for each of the handful of matrices that a loss makes of them.
PAIRS_AT_ONCE = 1 << 24

# What `train/violators` counts: a negative so near a positive, among so many of a query's hardest.
VIOLATION_MARGIN, VIOLATION_NEGATIVES = 0.1, 10


def value(
    loss: Loss,
    queries_QE: jax.Array,
    labels_LE: jax.Array,
    texts_LE: jax.Array,
    targets_QL: jax.Array,
    targets_LQ: jax.Array,
    key: jax.Array,
    pair_logits: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes a loss of the whole batch, the same for any mesh and any size of block.

    Args:
      loss: what is computed.
      queries_QE: L2-normalised, split by rows over the mesh, as is all that follows.
      labels_LE: L2-normalised; what labels are searched by.
      texts_LE: L2-normalised embeddings of the labels' texts; read by a loss that uses them.
      targets_QL: 1 where a slot's label is relevant to a query, for each query.
      targets_LQ: the same for each slot; read by a loss that has a term over label slots.
      key: draws the positives.
      pair_logits: scale and bias of the sigmoid loss.

    Returns:
      The loss, and the share of hard negatives that `losses.violation_rate` counts, float32 scalars; no
      gradient flows through the second.
    """
    Q, L = queries_QE.shape[0], labels_LE.shape[0]
    shards = sharding.row_shards(Q, L)
    row_draws, column_draws = loss_terms.draws(loss, key, Q, L)

    def all_of(own: jax.Array) -> jax.Array:
        return own if shards == 1 else jax.lax.all_gather(own, sharding.ROWS, tiled=True)

    def local(
        queries_qE: jax.Array,
        labels: dict[str, jax.Array],
        targets: dict[str, jax.Array],
        draws: dict[str, jax.Array],
        pair_logits: Any,
    ) -> Sums:
        """A device's share of all sums, joined with the others'."""
        all_labels = jax.tree.map(all_of, labels)

        def rows(queries_bE: jax.Array, targets_bL: jax.Array, draws_bD: jax.Array) -> Sums:
            similarities = {name: _cosines(queries_bE, labels_LE) for name, labels_LE in all_labels.items()}
            block = _block(similarities, targets_bL, draws_bD, pair_logits)
            return loss.rows(block) | loss_terms.violations(
                block.labels_QL, block.positive_QL, VIOLATION_MARGIN, VIOLATION_NEGATIVES
            )

        sums = _over_blocks(rows, L, queries_qE, targets["rows"], draws["rows"])
        if (of_columns := loss.columns) is not None:
            queries_QE = all_of(queries_qE)

            def columns(labels: dict[str, jax.Array], targets_bQ: jax.Array, draws_bD: jax.Array) -> Sums:
                similarities = {name: _cosines(labels_bE, queries_QE) for name, labels_bE in labels.items()}
                return of_columns(_block(similarities, targets_bQ, draws_bD, pair_logits))

            sums |= _over_blocks(columns, Q, labels, targets["columns"], draws["columns"])
        return sums if shards == 1 else jax.lax.psum(sums, sharding.ROWS)

    labels = {"labels_QL": labels_LE} | ({"texts_QL": texts_LE} if loss.uses_texts else {})
    targets, draws = {"rows": targets_QL}, {"rows": row_draws.T}
    if loss.columns is not None:
        targets["columns"], draws["columns"] = targets_LQ, column_draws.T
    if shards > 1:
        split = P(sharding.ROWS)
        local = jax.shard_map(local, in_specs=(split, split, split, split, P()), out_specs=P())
    sums = local(queries_QE, labels, targets, draws, pair_logits)
    return loss.total(sums, Q, L), sums["violating"] / jnp.maximum(sums["compared"], 1)


def _block(
    similarities: dict[str, jax.Array], targets_bC: jax.Array, draws_bD: jax.Array, pair_logits: Any
) -> Block:
    """A block of a device's rows; similarities by their names there."""
    positive_bC = loss_terms.is_positive(targets_bC)
    return Block(**similarities, positive_QL=positive_bC, draws_DQ=draws_bD.T, pair_logits=pair_logits)


def _cosines(rows_bE: jax.Array, columns_CE: jax.Array) -> jax.Array:
    """Similarities of L2-normalised embeddings, at least float32 [b, C]."""
    return loss_terms.in_float32(rows_bE @ columns_CE.T)


def _over_blocks(sums_of: Callable[..., Sums], num_columns: int, *rows: Any) -> Sums:
    """Adds up the sums of blocks of rows, of at most PAIRS_AT_ONCE pairs with the columns each."""
    num_rows = jax.tree.leaves(rows)[0].shape[0]
    blocks = block_count(num_rows, num_columns)
    if blocks == 1:
        return sums_of(*rows)
    cut = jax.tree.map(lambda array: array.reshape(blocks, num_rows // blocks, *array.shape[1:]), rows)
    again = jax.checkpoint(lambda block: sums_of(*block), prevent_cse=False)
    return jax.tree.map(lambda parts: parts.sum(axis=0), jax.lax.map(again, cut))


def block_count(num_rows: int, num_columns: int) -> int:
    """The fewest equal blocks of rows that hold at most PAIRS_AT_ONCE pairs each, or a row each."""
    fewest = -(-num_rows * num_columns // PAIRS_AT_ONCE)
    return next(n for n in range(min(fewest, num_rows), num_rows + 1) if num_rows % n == 0)
