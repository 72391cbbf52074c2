"""Which queries share a batch: balanced clusters of their embeddings, and the order of an epoch's queries.

NGAME (WSDM 2023) clusters the queries' embeddings by balanced hierarchical 2-means, down to a few queries a
cluster, and walks through the clusters in random order, so that a batch holds tight neighbourhoods and its
in-batch negatives are hard.

Shape suffixes: N rows, D embedding, C clusters of a level, M slots of a cluster, S row shards
(docs/notation.md).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vixml_jax import sharding, two_means
from vixml_jax.progress import Progress


def balanced_clusters(
    embeddings: Float[Array | np.ndarray, "N D"],
    cluster_size: int,
    key: PRNGKeyArray,
    *,
    num_rows: int | None = None,
    title: str | None = None,
) -> Int[np.ndarray, " n"]:
    """Clusters rows by balanced hierarchical 2-means (NGAME), down to at most `cluster_size` rows.

    Every cluster is split into equal halves, so that the number of clusters is the next power of two of
    n / cluster_size and sizes are equal within one: at n = 294,805 and size 16 there are 32,768 of 8 or 9.

    Args:
      embeddings: [N, D], of any float type; rows need not be normalised, the distance is the cosine. Where
        they are split by rows over the mesh that is set, they stay so: no device holds more than a few times
        its share.
      cluster_size: largest size of a cluster, at least 1.
      key: picks the starting centres. The same key, embeddings and devices give the same clusters; other
        devices round differently, and a row that is at home in two clusters may change.
      num_rows: n; the first rows that count, all N by default.
      title: under which progress is shown, by levels of the hierarchy; None for none.

    Returns:
      The cluster of each row, int32 in 0 .. number of clusters - 1, the same in every process; neighbouring
      numbers are neighbouring halves. Equal rows are told apart by their row number.

    Raises:
      ValueError: if `cluster_size` is below 1 or there are no rows.
    """
    if cluster_size < 1:
        raise ValueError(f"cluster_size is {cluster_size}, must be at least 1")
    wanted = -(-(embeddings.shape[0] if num_rows is None else num_rows) // cluster_size)
    num_clusters = sharding.power_of_two(wanted)
    return balanced_clusters_into(embeddings, num_clusters, key, num_rows=num_rows, title=title)


def balanced_clusters_into(
    embeddings: Float[Array | np.ndarray, "N D"],
    num_clusters: int,
    key: PRNGKeyArray,
    *,
    num_rows: int | None = None,
    title: str | None = None,
) -> Int[np.ndarray, " n"]:
    """Clusters rows into `num_clusters` of equal sizes within one; any number, not only powers of two.

    As `balanced_clusters`; a cluster that is to become an odd number of clusters is split in proportion.
    PRIME (NAACL 2025) shares its free vectors among labels by such clusters.

    Returns:
      The cluster of each row, int32. With `num_clusters` at least n every row has its own, and the remaining
      numbers stay unused.

    Raises:
      ValueError: if `num_clusters` is below 1, or the embeddings are not [N, D] with rows.
    """
    if embeddings.ndim != 2 or not embeddings.shape[0]:
        raise ValueError(f"embeddings of shape {embeddings.shape}, must be [N, D] with at least one row")
    if num_clusters < 1:
        raise ValueError(f"num_clusters is {num_clusters}, must be at least 1")
    num_rows = int(embeddings.shape[0] if num_rows is None else num_rows)
    if num_clusters >= num_rows:
        return np.arange(num_rows, dtype=np.int32)

    mesh = sharding.mesh_of_rows(embeddings)
    shards = 1 if mesh is None else sharding.num_row_shards(mesh)
    unit_ND = two_means.unit_rows(embeddings)
    # Random numbers come from the host: inside the levels' programs they would double the time to compile.
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    # Of each cluster of the level: its number of rows, and of clusters that it shall become. They stand by
    # row shard once each shard has its own; where one has fewer, clusters of no rows fill up.
    sizes_SC, leaves_SC = np.array([[num_rows]]), np.array([[num_clusters]])
    members_SCM: np.ndarray | Array = np.arange(num_rows, dtype=np.int32)[None, None]
    owned_SM = None
    with Progress((num_clusters - 1).bit_length(), title, "levels") as progress:
        while leaves_SC.max() > 1:
            if mesh is not None and owned_SM is None and leaves_SC.size == shards > 1:
                owned_SM = np.asarray(members_SCM)[0]
                unit_ND = two_means.own_rows(unit_ND, owned_SM, mesh)
                sizes_SC, leaves_SC = sizes_SC.reshape(shards, 1), leaves_SC.reshape(shards, 1)
                members_SCM = np.broadcast_to(
                    np.arange(owned_SM.shape[1], dtype=np.int32), (shards, 1, owned_SM.shape[1])
                )
            levels, slots, sizes_SC, leaves_SC = _next_levels(
                rng, sizes_SC, leaves_SC, members_SCM.shape[2], shared=shards > 1 and owned_SM is None
            )
            if owned_SM is None:
                members_SCM = two_means.split_levels(unit_ND, members_SCM, levels, slots=slots)
            else:
                members_SCM = two_means.split_own(unit_ND, members_SCM, levels, slots=slots, mesh=mesh)
            # A finished cluster hands all its rows to its left child; the right one is empty and goes.
            kept_SC = np.argsort(leaves_SC == 0, axis=1, kind="stable")
            kept_SC = kept_SC[:, : (leaves_SC > 0).sum(axis=1).max()]
            if kept_SC.shape[1] < members_SCM.shape[1]:
                sizes_SC, leaves_SC = (np.take_along_axis(a, kept_SC, axis=1) for a in (sizes_SC, leaves_SC))
                members_SCM = jnp.take_along_axis(members_SCM, kept_SC[..., None], axis=1)
            jax.block_until_ready(members_SCM)  # what is shown as done is done
            progress.update(len(levels))

    members = sharding.everywhere(members_SCM)
    if owned_SM is not None:
        members = owned_SM[np.arange(shards)[:, None, None], members]
    real = np.arange(members.shape[2]) < sizes_SC[..., None]
    clusters = np.empty(num_rows, np.int32)
    clusters[members[real]] = np.repeat(np.arange(num_clusters, dtype=np.int32), sizes_SC[leaves_SC > 0])
    return clusters


def inertia(embeddings: Float[Array | np.ndarray, "N D"], cluster_ids: Int[np.ndarray, " N"]) -> float:
    """Returns the mean over rows of 1 - cosine(row, centre of its cluster): 0 is best, random is near 1.

    The centre is the mean of the normalised rows; a zero row counts 1.
    """
    x = np.asarray(embeddings, np.float32)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    x = np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)
    ids = np.asarray(cluster_ids)
    membership = scipy.sparse.csr_matrix((np.ones(len(ids), np.float32), (ids, np.arange(len(ids)))))
    # Over a cluster, the cosines with the centre add up to the length of the sum of its rows.
    return 1.0 - float(np.linalg.norm(membership @ x, axis=1).sum(dtype=np.float64)) / len(ids)


def epoch_order(
    cluster_ids: Int[np.ndarray, " N"] | None, num_rows: int, seed: int, epoch: int
) -> Int[np.ndarray, " N"]:
    """Returns the order of an epoch's queries: clusters in random order, each one's rows together.

    A pure function of its arguments, so that a resumed epoch has the order that it began with.

    Args:
      cluster_ids: the cluster of each row; None for a random permutation.
      num_rows: N.
      seed: of the run.
      epoch: 0-based; each has its own order.

    Returns:
      A permutation of the rows, int64. Within a cluster the order is random as well.

    Raises:
      ValueError: if `cluster_ids` is not one a row.
    """
    rng = np.random.default_rng([seed, epoch])
    rows = rng.permutation(num_rows)
    if cluster_ids is None:
        return rows
    if cluster_ids.shape != (num_rows,):
        raise ValueError(f"cluster ids of shape {cluster_ids.shape} for {num_rows} rows")
    place_of_cluster = rng.permutation(int(cluster_ids.max(initial=-1)) + 1)
    return rows[np.argsort(place_of_cluster[cluster_ids[rows]], kind="stable")]


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """When queries are clustered, and how finely (NGAME). Epochs are 0-based.

    A clustering happens at the end of an epoch, from the embeddings that its steps computed, and orders the
    epochs after it until the next clustering. The first is at the end of epoch `start`, then one every
    `every` epochs. So epochs 0 .. start run in random order (there are no clusters yet), and start + 1 is the
    first in clustered order. The published curricula (start 10, every 5, doubling at 20, 40, ...; start 4,
    every 2, doubling at 8, 12, ...) double at epochs that end in a clustering under this reading only.

    Attributes:
      start: first epoch whose embeddings are clustered.
      every: epochs from one clustering to the next.
      size: queries a cluster, at most, before any doubling.
      double_at: epochs at whose end the size doubles, before the clustering of that same epoch.
    """

    start: int = 10
    every: int = 5
    size: int = 16
    double_at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.every < 1 or self.size < 1:
            raise ValueError(f"every={self.every} and size={self.size} must be at least 1")

    def reclusters_after(self, epoch: int) -> bool:
        """Whether the embeddings gathered during `epoch` are clustered at its end."""
        return epoch >= self.start and (epoch - self.start) % self.every == 0

    def size_after(self, epoch: int) -> int:
        """The cluster size that a clustering at the end of `epoch` uses."""
        return self.size * 2 ** sum(at <= epoch for at in self.double_at)


def _halves(sizes_C: np.ndarray, leaves_C: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the rows of each cluster's left half, [..., C]; rows and leaves of all halves, [..., 2C]."""
    left_leaves_C = -(-leaves_C // 2)
    left_sizes_C = -(-sizes_C * left_leaves_C // np.maximum(leaves_C, 1))

    def both(left_C: np.ndarray, all_C: np.ndarray) -> np.ndarray:
        return np.stack([left_C, all_C - left_C], axis=-1).reshape(*all_C.shape[:-1], -1)

    return left_sizes_C, both(left_sizes_C, sizes_C), both(left_leaves_C, leaves_C)


def _next_levels(
    rng: np.random.Generator, sizes_SC: np.ndarray, leaves_SC: np.ndarray, num_slots: int, *, shared: bool
) -> tuple[list[two_means.Level], tuple[int, ...], np.ndarray, np.ndarray]:
    """Plans one level, or all that remain where clusters are small enough to be split from inner products.

    While row shards work on clusters together (`shared`) it is one: each is to get its own as soon as may be.

    Returns:
      The levels, the slots of a half of each, and rows and leaves of the last halves, by row shard.
    """
    levels, slots = [], []
    all_levels = num_slots <= two_means.PRODUCTS_OF and not shared
    while not levels or (all_levels and leaves_SC.max() > 1):
        left_sizes_SC, next_sizes_SC, next_leaves_SC = _halves(sizes_SC, leaves_SC)
        drawn_SCX = _draw_rows(rng, sizes_SC, leaves_SC, num_slots)
        levels.append(two_means.Level(sizes_SC.astype(np.int32), left_sizes_SC.astype(np.int32), drawn_SCX))
        slots.append(int(next_sizes_SC.max()))
        sizes_SC, leaves_SC = next_sizes_SC, next_leaves_SC
    return levels, tuple(slots), sizes_SC, leaves_SC


def _draw_rows(
    rng: np.random.Generator, sizes_C: np.ndarray, leaves_C: np.ndarray, num_slots: int
) -> np.ndarray:
    """Draws places in each cluster, int32 [..., C, X]: two different ones to start from, or a whole sample.

    What a cluster gets does not depend on how clusters are spread over shards.
    """
    real_C = leaves_C > 0
    sizes_c = sizes_C[real_C]
    if num_slots > two_means.ROWS_OF_A_FIT:
        drawn_cX = rng.integers(0, sizes_c[:, None], (len(sizes_c), two_means.ROWS_OF_A_FIT), np.int32)
    else:
        first_c = rng.integers(0, sizes_c)
        second_c = (first_c + 1 + rng.integers(0, np.maximum(sizes_c - 1, 1))) % sizes_c
        drawn_cX = np.stack([first_c, second_c], axis=1).astype(np.int32)
    drawn_CX = np.zeros((*real_C.shape, drawn_cX.shape[1]), np.int32)
    drawn_CX[real_C] = drawn_cX
    return drawn_CX
