"""Label centroids: the mean embedding of the training queries that have a label.

PRIME (NAACL 2025) feeds them to the prototype network; ViXML refreshes them once an epoch, from the
embeddings that the epoch's own steps produced.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Float

from vixml_jax import sharding

# (query, label) pairs gathered at once: at 768 dimensions in float32, 50 MB.
PAIRS_AT_ONCE = 16_384


def label_centroids(
    embeddings_ND: Float[Array | np.ndarray, "N D"], train_targets: scipy.sparse.csr_matrix
) -> Float[Array, "L D"]:
    """Returns c_r, the mean of the embeddings of the training queries that have label r, in float32.

    It is not normalised again, and zero for a label without training queries.

    The pairs are taken in blocks, so that beside the embeddings and the centroids no more than a block of
    rows is ever in memory; the sums are float32 and, in a mesh, split by rows. The embeddings may be split by
    rows as well.

    Args:
      embeddings_ND: a row for each training query, of any float type.
      train_targets: sparse [N, L]; every stored value but 0 means relevant.

    Raises:
      ValueError: if the embeddings are not one a row of `train_targets`.
    """
    num_rows, num_labels = train_targets.get_shape()
    if embeddings_ND.ndim != 2 or embeddings_ND.shape[0] != num_rows:
        raise ValueError(f"embeddings of shape {embeddings_ND.shape} for {num_rows} rows of targets")
    relevant = scipy.sparse.csc_matrix(train_targets != 0)  # by label; also adds up duplicates
    counts_L = np.diff(relevant.indptr)
    blocks = max(1, -(-relevant.nnz // PAIRS_AT_ONCE))
    missing = blocks * PAIRS_AT_ONCE - relevant.nnz
    # Padding points at a label that does not exist: its updates are dropped.
    rows_P = np.pad(relevant.indices.astype(np.int32), (0, missing))
    labels_P = np.pad(
        np.repeat(np.arange(num_labels, dtype=np.int32), counts_L), (0, missing), constant_values=num_labels
    )
    shape = (blocks, PAIRS_AT_ONCE)
    mesh = jax.sharding.get_mesh()
    return _means(
        jnp.asarray(embeddings_ND),
        rows_P.reshape(shape),
        labels_P.reshape(shape),
        counts_L,
        shards=None if mesh.empty else sharding.num_row_shards(mesh),
    )


def moving_average(old_LD: Any, new_LD: Any, decay: float = 0.95) -> Any:
    """Returns decay * old + (1 - decay) * new: PRIME's own way to refresh centroids."""
    return decay * old_LD + (1 - decay) * new_LD


@functools.partial(jax.jit, static_argnames="shards")
def _means(
    embeddings_ND: Array, rows_BP: Array, labels_BP: Array, counts_L: Array, shards: int | None
) -> Array:
    num_labels = counts_L.shape[0]

    def add_block(sums_LD: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        rows_P, labels_P = block
        gathered_PD = embeddings_ND[rows_P].astype(jnp.float32)
        sums_LD = sums_LD.at[labels_P].add(gathered_PD, mode="drop", indices_are_sorted=True)
        if shards is not None:
            sums_LD = jax.lax.with_sharding_constraint(sums_LD, sharding.spec("label", None))
        return sums_LD, None

    padded = sharding.round_up(num_labels, shards or 1)
    sums_LD = jnp.zeros((padded, embeddings_ND.shape[1]), jnp.float32)
    sums_LD, _ = jax.lax.scan(add_block, sums_LD, (rows_BP, labels_BP))
    return sums_LD[:num_labels] / jnp.maximum(counts_L, 1)[:, None]
