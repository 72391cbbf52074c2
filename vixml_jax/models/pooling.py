"""Pooling: an item's slots into one vector, over rows that come one part after the other.

Every device sums its own rows; at the end the sums are scattered: what travels is [N, D], never slots.

Shape suffixes: R rows, T slots of a row, N items, S row shards of the mesh, D model dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from vixml_jax import sharding
from vixml_jax.models.layers import constrain


class Sums(NamedTuple):
    """What the devices have summed up, float32.

    Attributes:
      totals_SND: hidden states of each item's slots.
      counts_SN: how many.
    """

    totals_SND: jax.Array
    counts_SN: jax.Array


def zeros(num_items: int, dim: int, num_rows: int) -> Sums:
    """Sums of nothing, for rows whose number is a multiple of the row shards or not at all split."""
    shards = sharding.row_shards(num_rows, num_items)
    totals_SND = constrain(jnp.zeros((shards, num_items, dim), jnp.float32), "batch", None, None)
    return Sums(totals_SND, constrain(jnp.zeros((shards, num_items), jnp.float32), "batch", None))


def add(sums: Sums, hidden_RTD: jax.Array, item_index_RT: jax.Array | np.ndarray, pooling: str) -> Sums:
    """Adds rows of slots.

    Args:
      sums: so far.
      hidden_RTD: hidden states.
      item_index_RT: int32, the item of each slot, N for padding; an item's slots are contiguous.
      pooling: "mean" over all of an item's slots, or "last", its last slot.
    """
    item_index_RT = jnp.asarray(item_index_RT)
    num_items = sums.counts_SN.shape[1]
    taken_RT = item_index_RT < num_items
    if pooling == "last":
        following_RT = jnp.pad(item_index_RT[:, 1:], ((0, 0), (0, 1)), constant_values=num_items)
        taken_RT &= item_index_RT != following_RT
    index_RT = jnp.where(taken_RT, item_index_RT, num_items)

    def local(sums: Sums, hidden_RTD: jax.Array, index_RT: jax.Array) -> Sums:
        index_I = index_RT.reshape(-1)
        hidden_ID = hidden_RTD.reshape(len(index_I), -1).astype(jnp.float32)
        return Sums(
            sums.totals_SND.at[0, index_I].add(hidden_ID, mode="drop"),
            sums.counts_SN.at[0, index_I].add(1.0, mode="drop"),
        )

    if sums.counts_SN.shape[0] == 1:
        return local(sums, hidden_RTD, index_RT)
    rows = P(sharding.ROWS)
    return jax.shard_map(local, in_specs=(rows, rows, rows), out_specs=rows)(sums, hidden_RTD, index_RT)


def means(sums: Sums) -> jax.Array:
    """Returns the items' means, float32 [N, D], split by rows as the sums are; zero for one without slots."""
    if sums.counts_SN.shape[0] == 1:
        totals_ND, counts_N = sums.totals_SND[0], sums.counts_SN[0]
    else:

        def scatter(sums: Sums) -> Sums:
            return jax.tree.map(lambda x: jax.lax.psum_scatter(x[0], sharding.ROWS, tiled=True), sums)

        rows = P(sharding.ROWS)
        totals_ND, counts_N = jax.shard_map(scatter, in_specs=(rows,), out_specs=rows)(sums)
    return totals_ND / jnp.maximum(counts_N, 1.0)[:, None]


def pool(hidden_RTD: jax.Array, item_index_RT: jax.Array, num_items: int, pooling: str) -> jax.Array:
    """Pools all rows at once, float32 [N, D]; arguments are those of `add`."""
    sums = zeros(num_items, hidden_RTD.shape[-1], hidden_RTD.shape[0])
    return means(add(sums, hidden_RTD, item_index_RT, pooling))
