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
    shards = sharding.row_shards()
    if shards == 1 or Q % shards or L % shards:
        shards = 1
    row_draws, column_draws = loss_terms.draws(loss, key, Q, L)

    def all_of(own: jax.Array) -> jax.Array:
        return own if shards == 1 else jax.lax.all_gather(own, sharding.ROWS, tiled=True)

    def local(
        embeddings: dict[str, jax.Array], targets: dict[str, jax.Array], draws: Any, pair_logits: Any
    ) -> Sums:
        """A device's share of all sums, joined with the others'."""
        queries_qE, labels_lE, texts_lE = (embeddings.get(name) for name in ("queries", "labels", "texts"))
        assert queries_qE is not None
        assert labels_lE is not None
        labels_LE = all_of(labels_lE)
        texts_LE = None if texts_lE is None else all_of(texts_lE)

        def rows(queries_bE: jax.Array, targets_bL: jax.Array, draws_bD: jax.Array) -> Sums:
            labels_bL = _cosines(queries_bE, labels_LE)
            texts_bL = None if texts_LE is None else _cosines(queries_bE, texts_LE)
            positive_bL = loss_terms.is_positive(targets_bL)
            sums = loss.rows(Block(labels_bL, texts_bL, positive_bL, draws_bD.T, pair_logits))
            return sums | loss_terms.violations(labels_bL, positive_bL, VIOLATION_MARGIN, VIOLATION_NEGATIVES)

        sums = _over_blocks(rows, L, queries_qE, targets["rows"], draws["rows"])
        if (of_columns := loss.columns) is not None:
            queries_QE = all_of(queries_qE)

            def columns(
                labels_bE: jax.Array, texts_bE: jax.Array, targets_bQ: jax.Array, draws_bD: jax.Array
            ) -> Sums:
                labels_bQ = _cosines(labels_bE, queries_QE)
                texts_bQ = None if texts_lE is None else _cosines(texts_bE, queries_QE)
                positive_bQ = loss_terms.is_positive(targets_bQ)
                return of_columns(Block(labels_bQ, texts_bQ, positive_bQ, draws_bD.T, pair_logits))

            own_texts_lE = labels_lE if texts_lE is None else texts_lE
            sums |= _over_blocks(columns, Q, labels_lE, own_texts_lE, targets["columns"], draws["columns"])
        return sums if shards == 1 else jax.lax.psum(sums, sharding.ROWS)

    embeddings = {"queries": queries_QE, "labels": labels_LE}
    if loss.uses_texts:
        embeddings["texts"] = texts_LE
    targets, draws = {"rows": targets_QL}, {"rows": row_draws.T}
    if loss.columns is not None:
        targets["columns"], draws["columns"] = targets_LQ, column_draws.T
    if shards > 1:
        split = P(sharding.ROWS)
        local = jax.shard_map(local, in_specs=(split, split, split, P()), out_specs=P())
    sums = local(embeddings, targets, draws, pair_logits)
    return loss.total(sums, Q, L), sums["violating"] / jnp.maximum(sums["compared"], 1)


def _cosines(rows_bE: jax.Array, columns_CE: jax.Array) -> jax.Array:
    """Similarities of L2-normalised embeddings, at least float32 [b, C]."""
    return loss_terms.in_float32(rows_bE @ columns_CE.T)


def _over_blocks(sums_of: Callable[..., Sums], num_columns: int, *rows: jax.Array) -> Sums:
    """Adds up the sums of blocks of rows, of at most PAIRS_AT_ONCE pairs with the columns each."""
    num_rows = rows[0].shape[0]
    blocks = block_count(num_rows, num_columns)
    if blocks == 1:
        return sums_of(*rows)
    cut = [array.reshape(blocks, num_rows // blocks, *array.shape[1:]) for array in rows]
    again = jax.checkpoint(lambda block: sums_of(*block), prevent_cse=False)
    return jax.tree.map(lambda parts: parts.sum(axis=0), jax.lax.map(again, tuple(cut)))


def block_count(num_rows: int, num_columns: int) -> int:
    """The fewest equal blocks of rows that hold at most PAIRS_AT_ONCE pairs each, or a row each."""
    fewest = -(-num_rows * num_columns // PAIRS_AT_ONCE)
    return next(n for n in range(min(fewest, num_rows), num_rows + 1) if num_rows % n == 0)
