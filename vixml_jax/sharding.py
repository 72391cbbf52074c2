"""The mesh, and the one table that says which logical axis of an array lies along which axis of the mesh.

The mesh has the axes ("data", "fsdp", "tensor"). Parameters carry logical axis names; LOGICAL_RULES maps
these to mesh axes. Everything runs inside a mesh, also on one CPU (1x1x1): `use(mesh)` enters one, and
`ensure()` enters a mesh over all devices only where none is set, for callers of the Python face.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vixml_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# The axes of the mesh over which rows are split: batches, tables, banks.
ROWS = ("data", "fsdp")

# Tables are filled up to a multiple of this, whatever the mesh, so that a checkpoint fits any mesh whose
# number of row shards divides it.
TABLE_ROWS_MULTIPLE = 1024

# Of a table that comes to a host from other processes' devices, so much at a time.
FETCHED_BYTES = 64 << 20

# Logical axis -> mesh axes. Everything about placement that is not an algorithm stands here.
LOGICAL_RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ROWS),
    ("label", ROWS),
    ("query", ROWS),
    ("cluster", ROWS),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
    ("length", None),
    ("head_dim", None),
    ("position", None),
    ("lora", None),
    ("lora_split", "fsdp"),
    ("embedding", None),
    ("norm", None),
    ("image", None),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """Builds the mesh; -1 for `data` takes all devices that are left.

    Raises:
      UserError: if the sizes do not multiply to the number of devices, or rows cannot be split over them.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1 and fsdp > 0 and tensor > 0:
        data = len(devices) // (fsdp * tensor)
    if min(data, fsdp, tensor) < 1 or data * fsdp * tensor != len(devices):
        raise UserError(
            f"a mesh of {data} x {fsdp} x {tensor} (data, fsdp, tensor) does not fit {len(devices)} devices",
            fix="give config.mesh sizes whose product is that number; -1 for data takes what is left",
        )
    if TABLE_ROWS_MULTIPLE % (data * fsdp):
        raise UserError(
            f"config.mesh splits rows in {data} x {fsdp} (data, fsdp)",
            fix=f"their product must divide {TABLE_ROWS_MULTIPLE}",
        )
    # An axis may take a part of a slice's own, as 8 places of a v5p:4x4x4 do; jax.make_mesh refuses.
    places = mesh_utils.create_device_mesh((data, fsdp, tensor), devices, allow_split_physical_axes=True)
    return Mesh(places, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[Mesh]:
    """Enters `mesh` and the logical axis rules."""
    with jax.set_mesh(mesh), nnx.logical_axis_rules(LOGICAL_RULES):
        yield mesh


@contextlib.contextmanager
def ensure() -> Iterator[Mesh]:
    """Stays in the mesh that is set, or enters one over all devices."""
    current = jax.sharding.get_mesh()
    if current.empty:
        with use(make_mesh()) as mesh:
            yield mesh
    else:
        with nnx.logical_axis_rules(LOGICAL_RULES):
            yield current


def spec(*logical_axes: str | None) -> P:
    """Translates logical axis names into a PartitionSpec over the mesh."""
    table = dict(LOGICAL_RULES)
    return P(*(None if axis is None else table[axis] for axis in logical_axes))


def rows(mesh: Mesh, ndim: int = 1) -> NamedSharding:
    """Sharding of an array whose first axis is split over all of ("data", "fsdp")."""
    return NamedSharding(mesh, P(ROWS, *(None,) * (ndim - 1)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def num_row_shards(mesh: Mesh) -> int:
    """Number of parts into which rows are split."""
    return int(np.prod([mesh.shape[axis] for axis in ROWS]))


def power_of_two(n: int) -> int:
    """Returns the smallest power of two that is at least `n`, and 1."""
    return 1 << max(n - 1, 0).bit_length()


def row_shards(*counts: int) -> int:
    """Number of parts into which rows are split in the mesh that is set; 1 where none is.

    Given numbers of rows, it is 1 as well where one of them does not divide: such arrays are not split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else math.prod(mesh.shape.get(axis, 1) for axis in ROWS)
    return 1 if any(count % shards for count in counts) else shards


def local_row_shards(mesh: Mesh) -> tuple[int, ...]:
    """Numbers of the row shards that this process's devices hold, ascending."""
    shards = num_row_shards(mesh)
    held = rows(mesh).addressable_devices_indices_map((shards,)).values()
    return tuple(sorted({index[0].indices(shards)[0] for index in held if index is not None}))


def from_local_rows(local: np.ndarray, mesh: Mesh) -> jax.Array:
    """Joins the processes' rows to one array that is split by rows.

    Args:
      local: [n, ...]; the rows of this process's shards, in the order of `local_row_shards`.
      mesh: where it goes.
    """
    held, where = local_row_shards(mesh), rows(mesh, local.ndim)
    size = len(local) // len(held)
    if len(held) == num_row_shards(mesh):
        return jax.device_put(local, where)

    def shard(index: Any) -> np.ndarray:
        place = held.index((index[0].start or 0) // size)
        return local[place * size : (place + 1) * size]

    shape = (size * num_row_shards(mesh), *local.shape[1:])
    return jax.make_array_from_callback(shape, where, shard)


def put(values: np.ndarray, where: NamedSharding) -> jax.Array:
    """Places an array that every process holds whole; each hands over what its devices own."""
    if where.is_fully_addressable:
        return jax.device_put(values, where)
    return jax.make_array_from_callback(values.shape, where, lambda index: values[index])


def fetch(table: jax.Array, num_rows: int, *, here: bool = True) -> np.ndarray:
    """Returns the first rows of a table on the host; every process must call it.

    Args:
      table: [N', ...], split by rows.
      num_rows: N.
      here: whether this process wants them. Others get an array of no rows and keep nothing.
    """
    if table.is_fully_addressable:
        return np.asarray(table)[: num_rows if here else 0]
    mesh = mesh_of(table)
    shards = num_row_shards(mesh)
    size = len(table) // shards
    at_once = max(1, FETCHED_BYTES * size // max(table.nbytes, 1))
    result = np.empty((size * shards if here else 0, *table.shape[1:]), table.dtype)

    @functools.partial(jax.jit, static_argnums=2, out_shardings=replicated(mesh))
    def some(table: jax.Array, start: jax.Array, count: int) -> jax.Array:
        parts = table.reshape(shards, size, *table.shape[1:])
        return jax.lax.dynamic_slice_in_dim(parts, start, count, axis=1)

    for start in range(0, size, at_once):
        count = min(at_once, size - start)
        parts = np.asarray(some(table, start, count))
        if here:
            result.reshape(shards, size, *table.shape[1:])[:, start : start + count] = parts
    return result[:num_rows]


def mesh_of_rows(array: Any) -> Mesh | None:
    """Returns the mesh over which the rows of an array are split; None for any other array."""
    where = getattr(array, "sharding", None)
    if not isinstance(where, NamedSharding) or not where.spec or where.spec[0] != ROWS:
        return None
    return mesh_of(array)


def mesh_of(array: jax.Array) -> Mesh:
    """Returns the mesh on which an array lies."""
    where = array.sharding
    assert isinstance(where, NamedSharding), where
    assert isinstance(where.mesh, Mesh), where
    return where.mesh


def everywhere(array: np.ndarray | jax.Array) -> np.ndarray:
    """Returns an array on the host, in every process; all of them must call it."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = jax.jit(lambda x: x, out_shardings=replicated(mesh_of(array)))(array)
    return np.asarray(array)


def table_rows(n: int) -> int:
    """Rows of a table of `n`: filled up, so that any mesh splits them equally."""
    return round_up(n, TABLE_ROWS_MULTIPLE)


def round_up(n: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple
