"""Rows of a batch in chunks, every device's own rows in order, so that nothing travels when they are cut.

Shape suffixes: R rows, S row shards of the mesh, C chunks.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

from vixml_jax import sharding
from vixml_jax.models.layers import constrain

Tree = TypeVar("Tree")


def cut(rows: Tree, chunk_rows: int) -> Tree | None:
    """Cuts the first axis of every array into chunks, to be scanned over.

    Args:
      rows: arrays [R, ...] that are split by rows over the mesh, or that every device holds.
      chunk_rows: rows of each device in a chunk; 0 for all of them.

    Returns:
      Arrays [C, R / C, ...]; None where one chunk holds everything.

    Raises:
      ValueError: if the devices' rows are no multiple of `chunk_rows`.
    """
    num_rows = jax.tree.leaves(rows)[0].shape[0]
    shards = sharding.row_shards(num_rows)
    if not chunk_rows or num_rows <= shards * chunk_rows:
        return None
    if num_rows % (shards * chunk_rows):
        raise ValueError(f"{num_rows} rows on {shards} devices are no multiple of {chunk_rows} each")

    def cut_one(array: jax.Array) -> jax.Array:
        array = jnp.asarray(array)
        parts = array.reshape(shards, -1, chunk_rows, *array.shape[1:]).swapaxes(0, 1)
        parts = parts.reshape(-1, shards * chunk_rows, *array.shape[1:])
        return constrain(parts, None, "batch", *(None,) * (array.ndim - 1))

    return jax.tree.map(cut_one, rows)


def join(parts_CRD: jax.Array) -> jax.Array:
    """Puts the chunks of `cut` together again, [C, R / C, ...] to [R, ...]."""
    num_chunks, num_rows, *rest = parts_CRD.shape
    shards = sharding.row_shards(num_rows)
    rows = parts_CRD.reshape(num_chunks, shards, num_rows // shards, *rest).swapaxes(0, 1)
    return rows.reshape(num_chunks * num_rows, *rest)
