"""Everything that a training step changes, and that a checkpoint therefore holds."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from vixml_jax import sharding


@flax.struct.dataclass
class Tables:
    """What is looked up by row number, split by rows over the devices; no gradient flows into it.

    Rows beyond L or N fill the tables up to a multiple of sharding.TABLE_ROWS_MULTIPLE.

    Attributes:
      label_clusters: int32 [L']; the free vector of each label.
      centroids: float32 [L', D]; mean embedding of each label's training queries.
      query_embeddings: float32 [N', D]; as last computed by the steps, normalised.
      query_clusters: int32 [N']; NGAME's cluster of each query, -1 before the first clustering.
    """

    label_clusters: jax.Array
    centroids: jax.Array
    query_embeddings: jax.Array
    query_clusters: jax.Array

    def clusters_of(self, num_queries: int) -> np.ndarray | None:
        """The cluster of each of the N queries, int32 [N]; None before the first clustering.

        Every process must call it.
        """
        clusters_N = sharding.everywhere(self.query_clusters)[:num_queries]
        return None if clusters_N[0] < 0 else clusters_N


@flax.struct.dataclass
class TrainState:
    """Attributes: step (int32 scalar, finished steps), trained parameters, optimizer state, tables."""

    step: jax.Array
    params: Any
    opt_state: Any
    tables: Tables


def create(
    params: nnx.State, optimizer: optax.GradientTransformation, tables: Tables, mesh: Mesh
) -> TrainState:
    """Starts at step 0; moments are born with the sharding of their parameters."""
    # Copies, since the step donates the state and the caller keeps its model.
    params = jax.tree.map(jnp.copy, params)
    where = optimizer_shardings(optimizer, params, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=where)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), sharding.replicated(mesh))
    return TrainState(step, params, opt_state, tables)


def optimizer_shardings(optimizer: optax.GradientTransformation, params: Any, mesh: Mesh) -> Any:
    """Where the optimizer's state lies: moments as their parameters do, all else whole on every device."""

    def find() -> None:
        places.append(
            optax.tree.map_params(
                optimizer,
                lambda _, param: param.sharding,
                jax.eval_shape(optimizer.init, params),
                params,
                transform_non_params=lambda _: sharding.replicated(mesh),
            )
        )

    places: list[Any] = []
    jax.eval_shape(find)  # optax makes small arrays on the way, and the mesh's devices need not exist
    return places[0]


def abstract(params: Any, optimizer: optax.GradientTransformation, tables: Tables, mesh: Mesh) -> TrainState:
    """Returns the shapes, dtypes and shardings of a state, to be restored into; nothing is allocated.

    Args:
      params: of jax.ShapeDtypeStruct with their shardings, or of arrays.
      optimizer: its state is described, too.
      tables: as `params`.
      mesh: where it lies.
    """
    opt_state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        jax.eval_shape(optimizer.init, params),
        optimizer_shardings(optimizer, params, mesh),
    )
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    return TrainState(step, shapes_of(params), opt_state, shapes_of(tables))


def abstract_tables(num_labels: int, num_queries: int, dim: int, mesh: Mesh) -> Tables:
    """Returns the shapes, dtypes and shardings of a run's tables."""

    def table(shape: tuple[int, ...], dtype: Any) -> Any:
        padded = (sharding.table_rows(shape[0]), *shape[1:])
        return jax.ShapeDtypeStruct(padded, dtype, sharding=sharding.rows(mesh, len(shape)))

    return Tables(
        label_clusters=table((num_labels,), jnp.int32),
        centroids=table((num_labels, dim), jnp.float32),
        query_embeddings=table((num_queries, dim), jnp.float32),
        query_clusters=table((num_queries,), jnp.int32),
    )


def shapes_of(state: Any) -> Any:
    """Returns shape, dtype and sharding of every leaf."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def shardings_of(state: Any) -> Any:
    """Returns the sharding of every leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def row_table(values: np.ndarray, mesh: Mesh, fill: float = 0) -> jax.Array:
    """Places `values` [N, ...] split by rows, filled up to a multiple of sharding.TABLE_ROWS_MULTIPLE."""
    missing = sharding.table_rows(len(values)) - len(values)
    padded = np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1), constant_values=fill)
    return sharding.put(padded, sharding.rows(mesh, values.ndim))


def zero_table(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.Array:
    """Makes a table of `shape` [N, ...], filled up as `row_table` does, of zeros."""
    padded = (sharding.table_rows(shape[0]), *shape[1:])
    return jnp.zeros(padded, dtype, device=sharding.rows(mesh, len(shape)))
