"""Which queries share a batch: balanced clusters of their embeddings, and the order of an epoch's queries.

NGAME (WSDM 2023) clusters the queries' embeddings by balanced hierarchical 2-means, down to a few queries a
cluster, and walks through the clusters in random order, so that a batch holds tight neighbourhoods and its
in-batch negatives are hard.

Shape suffixes: N rows, D embedding, C clusters of a level, M slots of a cluster (docs/notation.md).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vixml_jax import sharding

# Small clusters are gathered together up to so many rows: they stay in a CPU's cache from round to round.
ROWS_AT_ONCE = 8_192

# The two centres of a larger cluster are fitted to a random sample of this size. That bounds memory (at 768
# dimensions in float32: 200 MB) whatever N, also where the embeddings are split over a mesh and the gathered
# rows are not; no centre of so many rows gains from more.
ROWS_OF_A_FIT = 65_536

# 2-means stops when the mean cosine of a row and its centre gains less than this, or after so many rounds.
TOLERANCE = 1e-4
MAX_ROUNDS = 20


def balanced_clusters(
    embeddings: Float[Array | np.ndarray, "N D"], cluster_size: int, key: PRNGKeyArray
) -> Int[np.ndarray, " N"]:
    """Clusters rows by balanced hierarchical 2-means (NGAME), down to at most `cluster_size` rows.

    Every cluster is split into equal halves, so that the number of clusters is the next power of two of
    N / cluster_size and sizes are equal within one: at N = 294,805 and size 16 there are 32,768 of 8 or 9.

    Args:
      embeddings: [N, D], of any float type; rows need not be normalised, the distance is the cosine. May be
        split by rows over a mesh.
      cluster_size: largest size of a cluster, at least 1.
      key: picks the starting centres. The same key, embeddings and devices give the same clusters.

    Returns:
      The cluster of each row, int32 in 0 .. number of clusters - 1; neighbouring numbers are neighbouring
      halves. Equal rows are told apart by their row number.

    Raises:
      ValueError: if `cluster_size` is below 1 or there are no rows.
    """
    if cluster_size < 1:
        raise ValueError(f"cluster_size is {cluster_size}, must be at least 1")
    wanted = -(-embeddings.shape[0] // cluster_size)
    return balanced_clusters_into(embeddings, sharding.power_of_two(wanted), key)


def balanced_clusters_into(
    embeddings: Float[Array | np.ndarray, "N D"], num_clusters: int, key: PRNGKeyArray
) -> Int[np.ndarray, " N"]:
    """Clusters rows into `num_clusters` of equal sizes within one; any number, not only powers of two.

    As `balanced_clusters`; a cluster that is to become an odd number of clusters is split in proportion.
    PRIME (NAACL 2025) shares its free vectors among labels by such clusters.

    Returns:
      The cluster of each row, int32. With `num_clusters` at least N every row has its own, and the remaining
      numbers stay unused.

    Raises:
      ValueError: if `num_clusters` is below 1, or the embeddings are not [N, D] with rows.
    """
    if embeddings.ndim != 2 or not embeddings.shape[0]:
        raise ValueError(f"embeddings of shape {embeddings.shape}, must be [N, D] with at least one row")
    if num_clusters < 1:
        raise ValueError(f"num_clusters is {num_clusters}, must be at least 1")
    num_rows = embeddings.shape[0]
    if num_clusters >= num_rows:
        return np.arange(num_rows, dtype=np.int32)

    embeddings_ND = jnp.asarray(embeddings)
    inverse_norms_N = _inverse_norms(embeddings_ND)
    # Of each cluster of the level: its number of rows, and of clusters that it shall become.
    sizes_C, leaves_C = np.array([num_rows]), np.array([num_clusters])
    members_CM = jnp.arange(num_rows, dtype=jnp.int32)[None]
    # Random numbers come from the host: inside the levels' programs they would double the time to compile.
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    while leaves_C.max() > 1:
        left_leaves_C = -(-leaves_C // 2)
        left_sizes_C = -(-sizes_C * left_leaves_C // leaves_C)
        next_leaves_C = np.stack([left_leaves_C, leaves_C - left_leaves_C], axis=1).ravel()
        next_sizes_C = np.stack([left_sizes_C, sizes_C - left_sizes_C], axis=1).ravel()
        members_CM = _split_level(
            embeddings_ND,
            inverse_norms_N,
            members_CM,
            sizes_C.astype(np.int32),
            left_sizes_C.astype(np.int32),
            _draw_rows(rng, sizes_C, members_CM.shape[1]),
            slots=int(next_sizes_C.max()),
        )
        # A finished cluster hands all its rows to its left child; the right one is empty and dropped here.
        alive = np.flatnonzero(next_leaves_C)
        sizes_C, leaves_C = next_sizes_C[alive], next_leaves_C[alive]
        if len(alive) < len(next_leaves_C):
            members_CM = members_CM[alive]

    members = np.asarray(members_CM)
    real = np.arange(members.shape[1]) < sizes_C[:, None]
    clusters = np.empty(num_rows, np.int32)
    clusters[members[real]] = np.repeat(np.arange(num_clusters, dtype=np.int32), sizes_C)
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


@jax.jit
def _inverse_norms(embeddings_ND: Array) -> Array:
    """1 / length of each row; 0 for a zero row, which thereby is at right angles to every centre."""
    squares_N = jnp.sum(jnp.square(embeddings_ND.astype(jnp.float32)), axis=1)
    return jnp.where(squares_N > 0, jax.lax.rsqrt(jnp.where(squares_N > 0, squares_N, 1)), 0)


def _draw_rows(rng: np.random.Generator, sizes_C: np.ndarray, num_slots: int) -> np.ndarray:
    """Draws places in each cluster, int32 [C, S]: two different ones to start from, or a whole sample."""
    if num_slots > ROWS_OF_A_FIT:
        return rng.integers(0, sizes_C[:, None], (len(sizes_C), ROWS_OF_A_FIT), np.int32)
    first_C = rng.integers(0, sizes_C)
    second_C = (first_C + 1 + rng.integers(0, np.maximum(sizes_C - 1, 1))) % sizes_C
    return np.stack([first_C, second_C], axis=1).astype(np.int32)


@functools.partial(jax.jit, static_argnames="slots")
def _split_level(
    embeddings_ND: Array,
    inverse_norms_N: Array,
    members_CM: Array,
    sizes_C: Array,
    left_sizes_C: Array,
    drawn_CS: Array,
    slots: int,
) -> Array:
    """Splits every cluster of a level in two.

    Args:
      embeddings_ND: the rows.
      inverse_norms_N: 1 / their lengths.
      members_CM: row numbers of each cluster, of which the first sizes_C count.
      sizes_C: rows of each cluster.
      left_sizes_C: rows of each left half.
      drawn_CS: places in each cluster, from `_draw_rows`.
      slots: M of the result.

    Returns:
      The members of the 2C halves, [2C, slots], left and right in turn; within each, rows keep their order.
    """
    num_clusters, num_slots = members_CM.shape

    def gather(members_M: Array) -> Array:
        return embeddings_ND[members_M].astype(jnp.float32) * inverse_norms_N[members_M][:, None]

    def fit_all(args: tuple[Array, ...]) -> Array:
        members_M, size, left_size, starts_2 = args
        return _fit(gather(members_M), size, left_size, starts_2)[1]

    def fit_sample(args: tuple[Array, ...]) -> Array:
        members_M, size, left_size, sample_S = args
        share = jnp.round(left_size * (sample_S.shape[0] / size)).astype(jnp.int32)
        starts_2 = jnp.array([0, 1])
        return _fit(gather(members_M[sample_S]), jnp.int32(sample_S.shape[0]), share, starts_2)[0]

    args = (members_CM, sizes_C, left_sizes_C, drawn_CS)
    if num_slots <= ROWS_OF_A_FIT:
        # A power of two divides most levels' clusters: no remainder, for which all would compile again.
        at_once = 1 << (max(1, ROWS_AT_ONCE // num_slots).bit_length() - 1)
        left_CM = jax.lax.map(fit_all, args, batch_size=min(num_clusters, at_once))
    else:
        directions_CD = jax.lax.map(fit_sample, args)
        # Few clusters are this large, so that one product with all directions is cheap and gathers no rows.
        scores_NC = (embeddings_ND @ directions_CD.T.astype(embeddings_ND.dtype)).astype(jnp.float32)
        scores_NC *= inverse_norms_N[:, None]
        scores_CM = scores_NC[members_CM, jnp.arange(num_clusters)[:, None]]
        left_CM = jax.vmap(_highest)(scores_CM, sizes_C, left_sizes_C)
    return _partition(members_CM, left_CM, sizes_C, left_sizes_C, slots)


def _fit(rows_MD: Array, size: Array, left_size: Array, starts_2: Array) -> tuple[Array, Array]:
    """Balanced 2-means of the first `size` rows, beginning with the two rows `starts_2` as centres.

    Each round puts the `left_size` rows that prefer the left centre most into the left half (the best
    assignment under that constraint), then takes the halves' means as centres.

    Returns:
      The difference of the two centres [D], and which rows are in the left half [M].
    """
    real_M = jnp.arange(rows_MD.shape[0]) < size
    total_D = jnp.where(real_M, 1.0, 0.0) @ rows_MD

    def direction_of(left_sum_D: Array) -> tuple[Array, Array]:
        right_sum_D = total_D - left_sum_D
        left_norm, right_norm = jnp.linalg.norm(left_sum_D), jnp.linalg.norm(right_sum_D)
        difference_D = left_sum_D / jnp.maximum(left_norm, 1e-12) - right_sum_D / jnp.maximum(
            right_norm, 1e-12
        )
        # Over a half, the cosines with its centre add up to the length of its sum.
        return difference_D, (left_norm + right_norm) / jnp.maximum(size, 1)

    def one_round(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        direction_D, _, quality, _, rounds = carry
        left_M = _highest(rows_MD @ direction_D, size, left_size)
        direction_D, better = direction_of(jnp.where(left_M, 1.0, 0.0) @ rows_MD)
        return direction_D, left_M, better, better - quality, rounds + 1

    def goes_on(carry: tuple[Array, ...]) -> Array:
        gain, rounds = carry[3], carry[4]
        return (gain > TOLERANCE) & (rounds < MAX_ROUNDS)

    start = (
        rows_MD[starts_2[0]] - rows_MD[starts_2[1]],
        real_M,
        jnp.float32(-1),
        jnp.float32(jnp.inf),
        jnp.int32(0),
    )
    direction_D, left_M, *_ = jax.lax.while_loop(goes_on, one_round, start)
    return direction_D, left_M


def _highest(scores_M: Array, size: Array, count: Array) -> Array:
    """Marks the `count` highest of the first `size` scores; of equal ones those that come first."""
    places_M = jnp.arange(scores_M.shape[0])
    real_M = places_M < size
    bits_M = jax.lax.bitcast_convert_type(scores_M, jnp.uint32)
    # Unsigned numbers in the order of the floats: negative ones are turned over, others get the highest bit.
    ranks_M = jnp.where(bits_M >> 31 == 1, ~bits_M, bits_M | jnp.uint32(1 << 31))
    threshold = _nth_highest(ranks_M, real_M, count)
    above_M = real_M & (ranks_M > threshold)
    ties_M = real_M & (ranks_M == threshold)
    from_the_end_M = (scores_M.shape[0] - places_M).astype(jnp.uint32)
    last = _nth_highest(from_the_end_M, ties_M, count - above_M.sum())
    return above_M | (ties_M & (from_the_end_M >= last))


def _nth_highest(values_M: Array, counted_M: Array, n: Array) -> Array:
    """Returns the n-th highest of the counted uint32 values; all bits set where n is 0.

    It bisects on bits, which takes 32 counts: exact, and far cheaper than a sort.
    """

    def set_bit(i: Array, threshold: Array) -> Array:
        candidate = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(jnp.sum(counted_M & (values_M >= candidate)) >= n, candidate, threshold)

    # The largest number that at least n values reach.
    return jax.lax.fori_loop(0, 32, set_bit, jnp.uint32(0))


def _partition(members_CM: Array, left_CM: Array, sizes_C: Array, left_sizes_C: Array, slots: int) -> Array:
    """Lays the members of each cluster out as its two halves, [2C, slots], rows keeping their order."""
    num_clusters, num_slots = members_CM.shape
    rank_CM = jnp.where(left_CM, 0, 1) + jnp.where(jnp.arange(num_slots) < sizes_C[:, None], 0, 2)
    _, sorted_CM = jax.lax.sort((rank_CM, members_CM), dimension=1, is_stable=True, num_keys=1)
    starts_C2 = jnp.stack([jnp.zeros_like(left_sizes_C), left_sizes_C], axis=1)
    places_C2M = jnp.minimum(starts_C2[:, :, None] + jnp.arange(slots), num_slots - 1)
    halves_CM = jnp.take_along_axis(sorted_CM, places_C2M.reshape(num_clusters, 2 * slots), axis=1)
    halves_CM = halves_CM.reshape(2 * num_clusters, slots)
    if not jax.sharding.get_abstract_mesh().empty:  # every process reads the result
        halves_CM = jax.lax.with_sharding_constraint(halves_CM, P())
    return halves_CM
