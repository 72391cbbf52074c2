"""Lookups and writes of split tables against plain indexing, on every mesh."""

from __future__ import annotations

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vixml_jax import row_tables, sharding

SEEDS = fresh.seeds(2)


@pytest.mark.parametrize("seed", SEEDS)
def test_lookup_and_write_on_every_mesh(mesh, seed):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(64, 5)).astype(np.float32)
    numbers = rng.integers(-99, 99, 64).astype(np.int32)
    ids = rng.integers(0, 64, 24).astype(np.int32)  # some twice
    weights = rng.normal(size=(24, 5)).astype(np.float32)
    rows = sharding.rows(mesh)
    split_table, split_numbers, split_ids = (jax.device_put(x, rows) for x in (table, numbers, ids))

    @jax.jit
    def looked_up(table, ids):
        found = row_tables.lookup(table, ids)
        return found, jax.grad(lambda table: jnp.sum(row_tables.lookup(table, ids) * weights))(table)

    found, gradient = looked_up(split_table, split_ids)
    np.testing.assert_array_equal(found, table[ids])
    expected = np.zeros_like(table)
    np.add.at(expected, ids, weights)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    np.testing.assert_array_equal(jax.jit(row_tables.lookup)(split_numbers, split_ids), numbers[ids])

    once = rng.permutation(64)[:24].astype(np.int32)
    split_once, split_weights = jax.device_put(once, rows), jax.device_put(weights, rows)
    written = jax.jit(row_tables.write)(split_table, split_once, split_weights)
    expected = table.copy()
    expected[once] = weights
    np.testing.assert_array_equal(written, expected)
    # What does not split over the devices is indexed as it is.
    np.testing.assert_array_equal(jax.jit(row_tables.lookup)(table[:63], ids[:3] % 63), table[ids[:3] % 63])


def test_nothing_as_large_as_the_table_travels():
    with sharding.use(sharding.make_mesh(fsdp=8, data=1)) as mesh:
        rows = sharding.rows(mesh)
        table = jax.ShapeDtypeStruct((4096, 16), jnp.float32, sharding=rows)
        ids = jax.ShapeDtypeStruct((32,), jnp.int32, sharding=rows)
        text = jax.jit(row_tables.lookup).lower(table, ids).compile().as_text()
    travelling = [line for line in text.splitlines() if "all-" in line or "reduce-scatter" in line]
    assert travelling
    assert not any("4096" in line for line in travelling), travelling
