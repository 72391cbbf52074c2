"""Extreme classifiers: a vector for each label, trained on embeddings that stay as they are.

This is the second stage of NGAME (WSDM 2023), which most systems of this field have: the tower is frozen,
each label's vector starts at the label's embedding and learns from the label's own queries, by the triplet
loss against the other labels of the batch and against labels near the query that the index found.

Shape suffixes: N training queries, L labels, B queries of a batch, U labels of a batch, D embedding, K
shortlist (docs/notation.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from vixml_jax import losses, sharding
from vixml_jax.data import label_matrix
from vixml_jax.embedding import normalized
from vixml_jax.models.two_tower import l2_normalize
from vixml_jax.train_state import row_table, shardings_of

# Adam's, as NGAME has them.
BETA_MEAN, BETA_SQUARE, EPS = 0.9, 0.999, 1e-8
# The labels of a batch are filled up to a multiple of this share of the most there can be: few compilations.
BUCKET_SHARE = 1 / 8


@flax.struct.dataclass
class ClassifierState:
    """Everything of the second stage that a step changes, split by rows over the devices.

    Rows beyond L fill the tables up, as in train_state.Tables.

    Attributes:
      step: int32 scalar; finished steps.
      vectors: float32 [L', D]; used normalised.
      means, squares: float32 [L', D]; Adam's moments.
      updates: int32 [L']; how often each row was updated.
    """

    step: jax.Array
    vectors: jax.Array
    means: jax.Array
    squares: jax.Array
    updates: jax.Array


@flax.struct.dataclass
class ClassifierBatch:
    """Some queries, and labels that are held against all of them.

    Attributes:
      queries: float32 [B, D], normalised.
      label_ids: int32 [U], each label once; -1 fills up.
      targets: uint8 [B, U]; 1 where the label is relevant to the query.
    """

    queries: jax.Array | np.ndarray
    label_ids: jax.Array | np.ndarray
    targets: jax.Array | np.ndarray


Step = Callable[[ClassifierState, ClassifierBatch], tuple[ClassifierState, dict[str, jax.Array]]]


def create(labels_LD: Float[np.ndarray, "L D"], mesh: Mesh) -> ClassifierState:
    """Starts at the labels' embeddings."""
    zeros = np.zeros_like(labels_LD, np.float32)
    return ClassifierState(
        step=jax.device_put(jnp.zeros((), jnp.int32), sharding.replicated(mesh)),
        vectors=row_table(labels_LD.astype(np.float32), mesh),
        means=row_table(zeros, mesh),
        squares=row_table(zeros, mesh),
        updates=row_table(np.zeros(len(labels_LD), np.int32), mesh),
    )


def compile_step(
    state: ClassifierState, *, schedule: Callable[[Array], Any], margin: float, hardest: int, seed: int
) -> Step:
    """Jits a step; the state is donated and keeps its shardings.

    Adam is applied to the rows of the batch alone, each bias-corrected by its own number of updates: a step
    costs what its labels cost, however many labels there are.

    Args:
      state: its shapes and shardings count.
      schedule: step -> learning rate.
      margin: of the triplet, fixed.
      hardest: negatives of a query that enter the triplet.
      seed: of the positives that the loss draws.
    """

    def step(state: ClassifierState, batch: ClassifierBatch) -> tuple[ClassifierState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        ids_U = jnp.asarray(batch.label_ids)
        real_U = ids_U >= 0
        rows_U = jnp.where(real_U, ids_U, state.updates.shape[0])  # beyond it: read as 0, not written

        def rows_of(table: jax.Array) -> jax.Array:
            return table.at[rows_U].get(mode="fill", fill_value=0)

        def objective(vectors_UD: jax.Array) -> jax.Array:
            similarities_BU = jnp.asarray(batch.queries) @ l2_normalize(vectors_UD).T
            # What fills up is nobody's negative.
            similarities_BU = jnp.where(real_U, similarities_BU, -jnp.inf)
            return losses.triplet(
                similarities_BU,
                jnp.asarray(batch.targets),
                key=key,
                k=hardest,
                margin_min=margin,
                margin_max=margin,
            )

        vectors_UD = rows_of(state.vectors)
        value, grads_UD = jax.value_and_grad(objective)(vectors_UD)
        updates_U = rows_of(state.updates) + 1
        means_UD = BETA_MEAN * rows_of(state.means) + (1 - BETA_MEAN) * grads_UD
        squares_UD = BETA_SQUARE * rows_of(state.squares) + (1 - BETA_SQUARE) * jnp.square(grads_UD)
        mean_bias_U, square_bias_U = (1 - beta**updates_U for beta in (BETA_MEAN, BETA_SQUARE))
        direction_UD = (means_UD / mean_bias_U[:, None]) / (
            jnp.sqrt(squares_UD / square_bias_U[:, None]) + EPS
        )
        vectors_UD -= schedule(state.step) * direction_UD

        def written(table: jax.Array, rows: jax.Array) -> jax.Array:
            return table.at[rows_U].set(rows, mode="drop")

        state = ClassifierState(
            step=state.step + 1,
            vectors=written(state.vectors, vectors_UD),
            means=written(state.means, means_UD),
            squares=written(state.squares, squares_UD),
            updates=written(state.updates, updates_U),
        )
        return state, {"classifier/loss": value}

    return jax.jit(step, donate_argnames="state", out_shardings=(shardings_of(state), None))


def batches(
    queries_ND: Float[np.ndarray, "N D"],
    targets: scipy.sparse.csr_matrix,
    shortlist_NK: Int[np.ndarray, "N K"],
    order: Int[np.ndarray, " N"],
    *,
    batch_size: int,
    negatives: int,
    positives: str,
    propensities: np.ndarray | None,
    seed: int,
    epoch: int,
) -> Iterator[ClassifierBatch]:
    """Yields an epoch's batches on the host; a pure function of its arguments.

    The labels of a batch are one positive of each query and `negatives` labels of its shortlist, each label
    once; a label is a negative of every query of the batch that it is not relevant to. The last batch is
    filled up with the first queries.

    Args:
      queries_ND: embeddings of the training queries.
      targets: csr_matrix [N, L].
      shortlist_NK: labels near each query, relevant ones among them; -1 where there are fewer.
      order: of the queries.
      batch_size: B.
      negatives: labels drawn from a query's shortlist.
      positives: how a query's positive is drawn; see label_matrix.sample_positives.
      propensities: inverse propensities [L], for it.
      seed: of what is drawn, with `epoch`.
      epoch: 0-based.
    """
    most = batch_size * (1 + negatives)
    multiple = max(1, int(most * BUCKET_SHARE))
    order = np.resize(order, sharding.round_up(len(order), batch_size))
    for number, start in enumerate(range(0, len(order), batch_size)):
        rows = order[start : start + batch_size]
        rng = np.random.default_rng((seed, epoch, number))
        positive_B = label_matrix.sample_positives(targets, rows, positives, propensities, rng)
        places = rng.integers(0, shortlist_NK.shape[1], (len(rows), negatives))
        near = shortlist_NK[rows[:, None], places]
        ids = np.unique(np.concatenate([positive_B, near.ravel()]))
        ids = ids[ids >= 0]
        missing = sharding.round_up(max(len(ids), 1), multiple) - len(ids)
        ids_U = np.pad(ids.astype(np.int32), (0, missing), constant_values=-1)
        yield ClassifierBatch(queries_ND[rows], ids_U, label_matrix.relevance(targets, rows, ids_U))


def place(batch: ClassifierBatch, mesh: Mesh) -> ClassifierBatch:
    """Puts a host batch on the mesh: queries split over the devices, labels whole on each."""
    rows, whole = sharding.rows(mesh, 2), sharding.replicated(mesh)
    values = (batch.queries, rows), (batch.label_ids, whole), (batch.targets, rows)
    # Every process holds the same host batch and hands over the part that its devices own.
    return ClassifierBatch(
        *(jax.make_array_from_callback(x.shape, where, lambda index, x=x: x[index]) for x, where in values)
    )


def mixed(
    labels_LD: Float[np.ndarray, "L D"], vectors_LD: Float[np.ndarray, "L D"] | None, weight: float
) -> Float[np.ndarray, "L D"]:
    """Returns the vectors whose inner products with queries are the ensemble's scores, float32 [L, D].

    Both scores of a label are inner products with the same query embedding x, so that their mixture is one
    too: (1 - weight) x.z + weight x.v = x.((1 - weight) z + weight v). One search gives the exact ensemble.

    Args:
      labels_LD: the dual encoder's label embeddings z, normalised.
      vectors_LD: the classifiers; None leaves the labels as they are.
      weight: of the classifiers' score, 0 to 1.
    """
    if vectors_LD is None:
        return labels_LD
    return ((1 - weight) * labels_LD + weight * normalized(vectors_LD)).astype(np.float32)
