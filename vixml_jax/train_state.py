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
        """The cluster of each of the N queries, int32 [N]; None before the first clustering."""
        clusters_N = np.asarray(self.query_clusters)[:num_queries]
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
    opt_state = jax.jit(optimizer.init)(params)
    # A scalar that no rule places lies whole on every device of the mesh.
    opt_state = jax.tree.map(
        lambda leaf: leaf if leaf.ndim else jax.device_put(leaf, sharding.replicated(mesh)), opt_state
    )
    step = jax.device_put(jnp.zeros((), jnp.int32), sharding.replicated(mesh))
    return TrainState(step, params, opt_state, tables)


def shardings_of(state: Any) -> Any:
    """Returns the sharding of every leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def row_table(values: np.ndarray, mesh: Mesh, fill: float = 0) -> jax.Array:
    """Places `values` [N, ...] split by rows, filled up to a multiple of sharding.TABLE_ROWS_MULTIPLE."""
    missing = sharding.round_up(len(values), sharding.TABLE_ROWS_MULTIPLE) - len(values)
    padded = np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1), constant_values=fill)
    where = sharding.rows(mesh, values.ndim)
    return jax.make_array_from_callback(padded.shape, where, lambda index: padded[index])
