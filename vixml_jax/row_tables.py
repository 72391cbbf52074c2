"""Lookups in tables that are split by rows over the mesh, and writes into them, placed by hand.

Left to the compiler a lookup becomes a sum of the whole result over all devices. Here each device finds what
it holds, and a reduce-scatter hands every device its own part of the result: what travels is [B, D], once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vixml_jax import sharding


def lookup(table_ND: jax.Array, ids_B: jax.Array) -> jax.Array:
    """Returns the rows `ids_B` of a table, [B, ...], split by rows where the table is.

    Args:
      table_ND: [N, ...].
      ids_B: int32 [B], in [0, N). The gradient of a row that is looked up twice is the sum of both.
    """
    if sharding.row_shards(len(table_ND), len(ids_B)) == 1:
        return table_ND[ids_B]

    def local(table_nD: jax.Array, ids_b: jax.Array) -> jax.Array:
        own_B, there_B = _own(table_nD, ids_b)
        found_BD = jnp.take(table_nD, own_B, axis=0, mode="clip")
        there = there_B.reshape(-1, *(1,) * (table_nD.ndim - 1))
        return jax.lax.psum_scatter(jnp.where(there, found_BD, 0), sharding.ROWS, tiled=True)

    rows = P(sharding.ROWS)
    return jax.shard_map(local, in_specs=(rows, rows), out_specs=rows)(table_ND, ids_B)


def write(table_ND: jax.Array, ids_B: jax.Array, values_BD: jax.Array) -> jax.Array:
    """Returns the table with its rows `ids_B` replaced, split as before.

    Args:
      table_ND: [N, ...].
      ids_B: int32 [B], in [0, N). Of a row that is written twice one of the values stays.
      values_BD: [B, ...], of the table's dtype.
    """
    if sharding.row_shards(len(table_ND), len(ids_B)) == 1:
        return table_ND.at[ids_B].set(values_BD)

    def local(table_nD: jax.Array, ids_b: jax.Array, values_bD: jax.Array) -> jax.Array:
        own_B, there_B = _own(table_nD, ids_b)
        values_BD = jax.lax.all_gather(values_bD, sharding.ROWS, tiled=True)
        nowhere = table_nD.shape[0]
        return table_nD.at[jnp.where(there_B, own_B, nowhere)].set(values_BD, mode="drop")

    rows = P(sharding.ROWS)
    return jax.shard_map(local, in_specs=(rows, rows, rows), out_specs=rows)(table_ND, ids_B, values_BD)


def _own(table_nD: jax.Array, ids_b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All devices' ids counted from this one's first row, and which of them it holds."""
    own_B = jax.lax.all_gather(ids_b, sharding.ROWS, tiled=True)
    own_B -= jax.lax.axis_index(sharding.ROWS) * table_nD.shape[0]
    return own_B, (own_B >= 0) & (own_B < table_nD.shape[0])
