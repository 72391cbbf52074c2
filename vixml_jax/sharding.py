"""The mesh, and the one table that says which logical axis of an array lies along which axis of the mesh.

The mesh has the axes ("data", "fsdp", "tensor"). Parameters carry logical axis names; LOGICAL_RULES maps
these to mesh axes. Everything runs inside a mesh, also on one CPU (1x1x1): `use(mesh)` enters one, and
`ensure()` enters a mesh over all devices only where none is set, for callers of the Python face.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vixml_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# The axes of the mesh over which rows are split: batches, tables, banks.
ROWS = ("data", "fsdp")

# Tables are filled up to a multiple of this, whatever the mesh, so that a checkpoint fits any mesh whose
# number of row shards divides it.
TABLE_ROWS_MULTIPLE = 1024

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
    return jax.make_mesh((data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


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


def round_up(n: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple
