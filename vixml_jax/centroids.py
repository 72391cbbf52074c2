"""Label centroids: the mean embedding of the training queries that have a label.

PRIME (NAACL 2025) feeds them to the prototype network; ViXML refreshes them once an epoch, from the
embeddings that the epoch's own steps produced.

Queries and labels are tables that may be split by rows over a mesh. Every row shard adds up its own queries
for some labels of every shard at a time, then the shards exchange these sums. So what travels is one table of
labels, however many queries have each.

Shape suffixes: N queries, L labels, D embedding, S row shards, B blocks of P pairs (docs/notation.md).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Float

from vixml_jax import sharding

# (query, label) pairs gathered at once: at 768 dimensions in float32, 50 MB.
PAIRS_AT_ONCE = 16_384

# Labels summed at once where tables are split, those of all shards together: 25 MB.
LABELS_AT_ONCE = 8_192


# A label unseen in training borrows its centroid, and what training queries hand on, from so many known
# labels; shares are a softmax of cosines at this temperature.
BORROWED_FROM, BORROWED_TEMPERATURE = 10, 0.05


def lending_shares(centroids_LD: np.ndarray, near_NK: np.ndarray, cosines_NK: np.ndarray) -> np.ndarray:
    """How much known labels lend to new ones with texts near theirs: a softmax over those that lend at all.

    Args:
      centroids_LD: float32 [L, D] of known labels; zeros where one has no training queries itself, which then
        lends nothing.
      near_NK: int [N, K], known labels near each of N new ones, nearest first; -1 where there are fewer.
      cosines_NK: float32 [N, K] of the texts' embeddings.

    Returns:
      float32 [N, K]; each row sums to 1, or to 0 where no label lends anything.
    """
    weights_NK = np.exp((cosines_NK - cosines_NK[:, :1]) / BORROWED_TEMPERATURE)
    for near_N, weight_N in zip(near_NK.T, weights_NK.T, strict=True):
        weight_N[(near_N < 0) | ~centroids_LD[np.maximum(near_N, 0)].any(axis=1)] = 0
    whole_N1 = weights_NK.sum(axis=1, keepdims=True)
    return (weights_NK / np.where(whole_N1 > 0, whole_N1, 1)).astype(np.float32)


def borrowed_centroids(centroids_LD: np.ndarray, near_NK: np.ndarray, shares_NK: np.ndarray) -> np.ndarray:
    """Centroids of labels without training queries: means of those of known labels with the nearest texts.

    A zero instead, which training hardly ever sees, makes a prototype that no query finds among those of
    known labels (docs/serving.md has figures).

    Args:
      centroids_LD: float32 [L, D] of known labels.
      near_NK: int [N, K], known labels near each of N new ones; -1 where there are fewer.
      shares_NK: float32 [N, K], as `lending_shares` gives them.

    Returns:
      float32 [N, D]; zeros where no label lends anything.
    """
    total_ND = np.zeros((len(near_NK), centroids_LD.shape[1]), np.float32)
    for near_N, share_N in zip(near_NK.T, shares_NK.T, strict=True):
        total_ND += share_N[:, None] * centroids_LD[np.maximum(near_N, 0)]
    return total_ND


class LabelCentroids:
    """Computes the centroids of one relevance matrix, whose pairs are laid out once.

    Args:
      train_targets: sparse [N, L]; every stored value but 0 means relevant.
      table_rows: N', rows of the embeddings; at least N.
      mesh: over which the embeddings are split by rows; None for an array that is not split.
    """

    def __init__(self, train_targets: scipy.sparse.csr_matrix, table_rows: int, mesh: Mesh | None = None):
        targets = _canonical(train_targets)
        num_rows, num_labels = targets.get_shape()
        self._mesh, self._table_rows = mesh, table_rows
        shards = 1 if mesh is None else sharding.num_row_shards(mesh)
        held = (0,) if mesh is None else sharding.local_row_shards(mesh)
        own_labels = sharding.table_rows(num_labels) // shards
        at_once = own_labels if mesh is None else min(own_labels, max(1, LABELS_AT_ONCE // shards))
        chunks = -(-own_labels // at_once)
        self._sizes = (shards, own_labels, at_once)

        # The labels of chunk c are the c-th `at_once` of every shard.
        owner_L, within_L = np.divmod(np.arange(num_labels, dtype=np.int32), own_labels)
        chunk_L = within_L // at_once
        place_L = owner_L * at_once + within_L % at_once
        ends = np.minimum(np.arange(shards + 1) * (table_rows // shards), num_rows)
        pairs_of = [slice(*targets.indptr[ends[[shard, shard + 1]]]) for shard in range(shards)]
        counts_SC = np.stack(
            [np.bincount(chunk_L[targets.indices[pairs]], minlength=chunks) for pairs in pairs_of]
        )
        most_C = counts_SC.max(axis=0)
        size = int(min(PAIRS_AT_ONCE, max(most_C.max(), 1)))
        blocks_C = -(-most_C // size)
        bounds = np.concatenate([[0], np.cumsum(blocks_C)]).astype(np.int32)
        self._bounds_C2 = np.stack([bounds[:-1], bounds[1:]], axis=1)

        rows = np.zeros((len(held), max(bounds[-1], 1) * size), np.int32)
        places = np.full(rows.shape, shards * at_once, np.int32)  # padding: beyond the sums, so dropped
        for number, shard in enumerate(held):
            labels = targets.indices[pairs_of[shard]]
            lengths = np.diff(targets.indptr[ends[shard] : ends[shard + 1] + 1])
            order = np.lexsort((place_L[labels], chunk_L[labels]))
            in_chunk = np.arange(len(order)) - np.repeat(
                np.cumsum(counts_SC[shard]) - counts_SC[shard], counts_SC[shard]
            )
            slots = np.repeat(bounds[:-1] * size, counts_SC[shard]) + in_chunk
            rows[number, slots] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[order]
            places[number, slots] = place_L[labels][order]
        degrees_L = np.zeros(own_labels * shards, np.float32)
        degrees_L[:num_labels] = np.bincount(targets.indices, minlength=num_labels)
        place = (
            (lambda local: local) if mesh is None else (lambda local: sharding.from_local_rows(local, mesh))
        )
        self._rows_BP, self._places_BP = (place(pairs.reshape(-1, size)) for pairs in (rows, places))
        self._degrees_L = degrees_L if mesh is None else sharding.put(degrees_L, sharding.rows(mesh))

    def __call__(self, embeddings_ND: Float[Array | np.ndarray, "N D"]) -> Float[Array, "L D"]:
        """Returns c_r, the mean of the embeddings of the training queries that have label r.

        It is not normalised again, and zero for a label without training queries.

        Args:
          embeddings_ND: [N', D], of any float type; rows beyond N do not count.

        Returns:
          float32 [L', D], split as the embeddings are; L' is L filled up to a multiple of
          sharding.TABLE_ROWS_MULTIPLE.

        Raises:
          ValueError: if the embeddings are not N' rows.
        """
        if embeddings_ND.ndim != 2 or embeddings_ND.shape[0] != self._table_rows:
            raise ValueError(f"embeddings of shape {embeddings_ND.shape} for {self._table_rows} rows")
        return means(
            embeddings_ND,
            self._rows_BP,
            self._places_BP,
            self._bounds_C2,
            self._degrees_L,
            sizes=self._sizes,
            mesh=self._mesh,
        )


def label_centroids(
    embeddings_ND: Float[Array | np.ndarray, "N D"], train_targets: scipy.sparse.csr_matrix
) -> Float[Array, "L D"]:
    """Computes the centroids of labels once; see `LabelCentroids`.

    Args:
      embeddings_ND: a row for each training query, of any float type; may be a table, with more rows.
      train_targets: sparse [N, L].

    Returns:
      float32 [L', D].

    Raises:
      ValueError: if there are fewer embeddings than rows of `train_targets`.
    """
    num_rows = train_targets.get_shape()[0]
    if embeddings_ND.ndim != 2 or embeddings_ND.shape[0] < num_rows:
        raise ValueError(f"embeddings of shape {embeddings_ND.shape} for {num_rows} rows of targets")
    mesh = sharding.mesh_of_rows(embeddings_ND)
    return LabelCentroids(train_targets, embeddings_ND.shape[0], mesh)(embeddings_ND)


def moving_average(old_LD: Any, new_LD: Any, decay: float = 0.95) -> Any:
    """Returns decay * old + (1 - decay) * new: PRIME's own way to refresh centroids."""
    return decay * old_LD + (1 - decay) * new_LD


@functools.partial(jax.jit, static_argnames=("sizes", "mesh"))
def means(
    embeddings_ND: Array | np.ndarray,
    rows_BP: Array | np.ndarray,
    places_BP: Array | np.ndarray,
    bounds_C2: Array | np.ndarray,
    degrees_L: Array | np.ndarray,
    *,
    sizes: tuple[int, int, int],
    mesh: Mesh | None,
) -> Array:
    """The program of `LabelCentroids`.

    Args:
      embeddings_ND: [N', D].
      rows_BP: of each pair the query, counted from its shard's first; all blocks of a shard after each other.
      places_BP: and the label's place among those that are summed at once.
      bounds_C2: the first block of each chunk of labels and the one after its last.
      degrees_L: queries of each label.
      sizes: number of row shards, labels of each, labels of each summed at once.
      mesh: None where nothing is split.
    """
    shards, own_labels, at_once = sizes

    def sums(embeddings_nD: Any, rows_bP: Any, places_bP: Any) -> Array:
        embeddings_nD, rows_bP, places_bP = map(jnp.asarray, (embeddings_nD, rows_bP, places_bP))

        def add(block: Array, sums_lD: Array) -> Array:
            gathered_PD = embeddings_nD[rows_bP[block]].astype(jnp.float32)
            return sums_lD.at[places_bP[block]].add(gathered_PD, mode="drop", indices_are_sorted=True)

        def some_labels(bounds: Array) -> Array:
            start_lD = jnp.zeros((shards * at_once, embeddings_nD.shape[1]), jnp.float32)
            sums_lD = jax.lax.fori_loop(bounds[0], bounds[1], add, start_lD)
            if mesh is None:
                return sums_lD
            return jax.lax.psum_scatter(sums_lD, sharding.ROWS, tiled=True)

        parts = jax.lax.map(some_labels, jnp.asarray(bounds_C2))
        return parts.reshape(-1, embeddings_nD.shape[1])[:own_labels]

    if mesh is None:
        sums_LD = sums(embeddings_ND, rows_BP, places_BP)
    else:
        rows = Spec(sharding.ROWS, None)
        sums_LD = jax.shard_map(sums, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(
            embeddings_ND, rows_BP, places_BP
        )
    return sums_LD / jnp.maximum(degrees_L, 1)[:, None]


def _canonical(targets: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """Each relevant pair once, without stored zeros."""
    if targets.has_canonical_format and (targets.data != 0).all():
        return targets
    targets = scipy.sparse.csr_matrix(targets, copy=True)
    targets.sum_duplicates()
    targets.eliminate_zeros()
    return targets
