"""Balanced 2-means on the devices: every cluster of a level of the hierarchy is split in two at once.

Rows that are split over a mesh stay so. While there are fewer clusters than row shards, all devices work on
each (`split_level`, partitioned automatically). From there on every shard has a cluster of its own:
`own_rows` hands each its rows, one exchange for the whole hierarchy, and `split_own` needs no other shard.

Shape suffixes: N rows, D embedding, C clusters of a level, M slots of a cluster, S row shards
(docs/notation.md).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from vixml_jax import sharding

# Small clusters are gathered together up to so many rows: they stay in a CPU's cache from round to round.
ROWS_AT_ONCE = 4_096

# The two centres of a larger cluster are fitted to a random sample of this size. That bounds memory (at 768
# dimensions in float32: 200 MB) whatever N, also where the rows are split over a mesh and the gathered ones
# are not. Not smaller: with samples of 2,048 the clusters of 16 in the end are looser by 8 %.
ROWS_OF_A_FIT = 65_536

# Of a cluster of up to so many rows all inner products are computed first, and the rounds then read these
# instead of the rows: one small product a round instead of two over D dimensions.
PRODUCTS_OF = 96

# Of so few scores each is held against each; of more, a threshold is found bit by bit.
COMPARED = 64

# Rounds of 2-means. With momentum (`_fit`) so few leave tighter clusters than 20 without.
ROUNDS = 7


@jax.jit
def unit_rows(embeddings_ND: Array) -> Array:
    """Rows of length 1 in float32; a zero row stays zero, which is at right angles to every centre."""
    rows_ND = embeddings_ND.astype(jnp.float32)
    squares_N = jnp.sum(jnp.square(rows_ND), axis=1)
    inverse_N = jnp.where(squares_N > 0, jax.lax.rsqrt(jnp.where(squares_N > 0, squares_N, 1)), 0)
    return rows_ND * inverse_N[:, None]


@functools.partial(jax.jit, static_argnames="slots")
def split_level(
    unit_ND: Array, members_1CM: Array, sizes_1C: Array, left_sizes_1C: Array, drawn_1CX: Array, slots: int
) -> Array:
    """Splits every cluster of a level in two.

    Args:
      unit_ND: rows of length 1.
      members_1CM: row numbers of each cluster, of which the first sizes_1C count.
      sizes_1C: rows of each cluster; may be 0.
      left_sizes_1C: rows of each left half.
      drawn_1CX: random places in each cluster: two different ones to start from, or where there are more than
        ROWS_OF_A_FIT slots as many for a sample.
      slots: M of the result.

    Returns:
      The members of the halves, [1, 2C, slots], left and right in turn; within each, rows keep their order.
    """
    halves_CM = _split(unit_ND, members_1CM[0], sizes_1C[0], left_sizes_1C[0], drawn_1CX[0], slots)
    if not jax.sharding.get_abstract_mesh().empty:  # every process reads the result
        halves_CM = jax.lax.with_sharding_constraint(halves_CM, P())
    return halves_CM[None]


@functools.partial(jax.jit, static_argnames="mesh")
def own_rows(unit_ND: Array, members_SM: Array, mesh: Mesh) -> Array:
    """Hands every row shard the rows of its cluster.

    Args:
      unit_ND: rows, split over the mesh.
      members_SM: row numbers of each shard's cluster.
      mesh: of S row shards.

    Returns:
      [S * M', D], split over the mesh: shard s holds rows members_SM[s], and then some that do not count.
    """
    shards, num_slots = members_SM.shape
    at_once = max(1, min(ROWS_AT_ONCE // shards, num_slots))
    members_SM = jnp.pad(members_SM, ((0, 0), (0, -num_slots % at_once)))

    def exchange(unit_nD: Array, members_SM: Array) -> Array:
        first = jax.lax.axis_index(sharding.ROWS) * unit_nD.shape[0]

        def some(members_Sm: Array) -> Array:
            places_Sm = members_Sm - first
            here_Sm = (places_Sm >= 0) & (places_Sm < unit_nD.shape[0])
            rows_SmD = jnp.where(here_Sm[..., None], unit_nD[jnp.where(here_Sm, places_Sm, 0)], 0)
            # Of each row one shard has the values and the others zeros.
            return jax.lax.psum_scatter(rows_SmD, sharding.ROWS, tiled=False)

        parts = members_SM.reshape(shards, -1, at_once).swapaxes(0, 1)
        return jax.lax.map(some, parts).reshape(-1, unit_nD.shape[1])

    rows = P(sharding.ROWS, None)
    return jax.shard_map(exchange, mesh=mesh, in_specs=(rows, P()), out_specs=rows, check_vma=False)(
        unit_ND, members_SM
    )


@functools.partial(jax.jit, static_argnames=("slots", "mesh"))
def split_own(
    unit_ND: Array,
    members_SCM: Array,
    sizes_SC: Array,
    left_sizes_SC: Array,
    drawn_SCX: Array,
    slots: int,
    mesh: Mesh,
) -> Array:
    """As `split_level` in every row shard at once, for clusters and rows of its own; [S, 2C, slots].

    Row numbers count from the shard's first row.
    """

    def own(unit_nD: Array, *level: Array) -> Array:
        members_CM, sizes_C, left_sizes_C, drawn_CX = (array[0] for array in level)
        return _split(unit_nD, members_CM, sizes_C, left_sizes_C, drawn_CX, slots)[None]

    rows = P(sharding.ROWS)
    return jax.shard_map(own, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(
        unit_ND, members_SCM, sizes_SC, left_sizes_SC, drawn_SCX
    )


def _split(
    unit_ND: Array, members_CM: Array, sizes_C: Array, left_sizes_C: Array, drawn_CX: Array, slots: int
) -> Array:
    num_clusters, num_slots = members_CM.shape

    def fit_all(args: tuple[Array, ...]) -> Array:
        members_M, size, left_size, starts_2 = args
        return _fit(unit_ND[members_M], size, left_size, starts_2)

    def direction_of_sample(args: tuple[Array, ...]) -> Array:
        members_M, size, left_size, sample_X = args
        rows_XD = unit_ND[members_M[sample_X]]
        drawn = jnp.int32(sample_X.shape[0])
        share = jnp.round(left_size * (drawn / jnp.maximum(size, 1))).astype(jnp.int32)
        left_X = _fit(rows_XD, drawn, share, jnp.array([0, 1]))
        return _unit(jnp.where(left_X, 1.0, 0.0) @ rows_XD) - _unit(jnp.where(left_X, 0.0, 1.0) @ rows_XD)

    args = (members_CM, sizes_C, left_sizes_C, drawn_CX)
    if num_slots <= ROWS_OF_A_FIT:
        # A power of two divides most levels' clusters: no remainder, for which all would compile again.
        at_once = 1 << (max(1, ROWS_AT_ONCE // num_slots).bit_length() - 1)
        left_CM = jax.lax.map(fit_all, args, batch_size=min(num_clusters, at_once))
    else:
        directions_CD = jax.lax.map(direction_of_sample, args)
        # Few clusters are this large, so that one product with all directions is cheap and gathers no rows.
        scores_NC = unit_ND @ directions_CD.T
        scores_CM = scores_NC[members_CM, jnp.arange(num_clusters)[:, None]]
        left_CM = jax.vmap(highest)(scores_CM, sizes_C, left_sizes_C)
    return _partition(members_CM, left_CM, sizes_C, left_sizes_C, slots)


def _fit(rows_MD: Array, size: Array, left_size: Array, starts_2: Array) -> Array:
    """Balanced 2-means of the first `size` rows, beginning with the two rows `starts_2` as centres.

    Each round puts the `left_size` rows that prefer the left centre most into the left half (the best
    assignment under that constraint), then takes the halves' means as centres. How much rows prefer it then
    changes by twice as much as these centres say (momentum): 2-means creeps as power iteration does.

    A centre is known by its products with the rows only: those of a sum of rows are sums of inner products.

    Returns:
      Which rows are in the left half, bool [M].
    """
    num_slots = rows_MD.shape[0]
    slots_M = jnp.arange(num_slots)
    real_M = slots_M < size
    if num_slots <= PRODUCTS_OF:
        products_MM = rows_MD @ rows_MD.T

        def products(weights_M: Array) -> Array:
            return products_MM @ weights_M
    else:

        def products(weights_M: Array) -> Array:
            return rows_MD @ (weights_M @ rows_MD)

    total_M = products(jnp.where(real_M, 1.0, 0.0))

    def one_round(done: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        scores_M, before_M = carry
        left_M = highest(scores_M, size, left_size)
        with_left_M = products(jnp.where(left_M, 1.0, 0.0))
        with_right_M = total_M - with_left_M
        # The squared length of a sum of rows is the sum of their products with it.
        left_norm = _root(jnp.sum(jnp.where(left_M, with_left_M, 0)))
        right_norm = _root(jnp.sum(jnp.where(left_M | ~real_M, 0, with_right_M)))
        prefers_M = with_left_M / jnp.maximum(left_norm, 1e-12) - with_right_M / jnp.maximum(
            right_norm, 1e-12
        )
        now_M = _unit(jnp.where(real_M, prefers_M, 0))
        return jnp.where(done == 0, now_M, 2 * now_M - before_M), now_M

    start_M = products(
        jnp.where(slots_M == starts_2[0], 1.0, 0.0) - jnp.where(slots_M == starts_2[1], 1.0, 0.0)
    )
    scores_M, _ = jax.lax.fori_loop(0, ROUNDS - 1, one_round, (start_M, start_M))
    return highest(scores_M, size, left_size)


def _unit(vector: Array) -> Array:
    return vector / jnp.maximum(jnp.linalg.norm(vector), 1e-12)


def _root(square: Array) -> Array:
    return jnp.sqrt(jnp.maximum(square, 0))


def highest(scores_M: Array, size: Array | int, count: Array | int) -> Array:
    """Marks the `count` highest of the first `size` scores; of equal ones those that come first."""
    num_slots = scores_M.shape[0]
    places_M = jnp.arange(num_slots)
    real_M = places_M < size
    bits_M = jax.lax.bitcast_convert_type(scores_M, jnp.uint32)
    # Unsigned numbers in the order of the floats: negative ones are turned over, others get the highest bit.
    ranks_M = jnp.where(bits_M >> 31 == 1, ~bits_M, bits_M | jnp.uint32(1 << 31))
    if num_slots <= COMPARED:
        comes_first_MM = (ranks_M > ranks_M[:, None]) | (
            (ranks_M == ranks_M[:, None]) & (places_M < places_M[:, None])
        )
        return real_M & (jnp.sum(comes_first_MM & real_M, axis=1) < count)
    threshold = _nth_highest(ranks_M, real_M, count, 32)
    above_M = real_M & (ranks_M > threshold)
    ties_M = real_M & (ranks_M == threshold)
    from_the_end_M = (num_slots - places_M).astype(jnp.uint32)
    last = _nth_highest(from_the_end_M, ties_M, count - above_M.sum(), (num_slots + 1).bit_length())
    return above_M | (ties_M & (from_the_end_M >= last))


def _nth_highest(values_M: Array, counted_M: Array, n: Array | int, bits: int) -> Array:
    """Returns the n-th highest of the counted uint32 values, of so many bits; all bits set where n is 0.

    It bisects on bits, which takes a count for each: exact, and far cheaper than a sort.
    """

    def set_bit(i: Array, threshold: Array) -> Array:
        candidate = threshold | (jnp.uint32(1 << (bits - 1)) >> i.astype(jnp.uint32))
        return jnp.where(jnp.sum(counted_M & (values_M >= candidate)) >= n, candidate, threshold)

    # The largest number that at least n values reach.
    return jax.lax.fori_loop(0, bits, set_bit, jnp.uint32(0))


def _partition(members_CM: Array, left_CM: Array, sizes_C: Array, left_sizes_C: Array, slots: int) -> Array:
    """Lays the members of each cluster out as its two halves, [2C, slots], rows keeping their order."""
    num_clusters, num_slots = members_CM.shape
    rank_CM = jnp.where(left_CM, 0, 1) + jnp.where(jnp.arange(num_slots) < sizes_C[:, None], 0, 2)
    _, sorted_CM = jax.lax.sort((rank_CM, members_CM), dimension=1, is_stable=True, num_keys=1)
    starts_C2 = jnp.stack([jnp.zeros_like(left_sizes_C), left_sizes_C], axis=1)
    places_C2M = jnp.minimum(starts_C2[:, :, None] + jnp.arange(slots), num_slots - 1)
    halves_CM = jnp.take_along_axis(sorted_CM, places_C2M.reshape(num_clusters, 2 * slots), axis=1)
    halves_CM = halves_CM.reshape(2 * num_clusters, slots)
    return halves_CM
