"""Balanced 2-means on the devices: every cluster of a level of the hierarchy is split in two at once.

Rows that are split over a mesh stay so. While there are fewer clusters than row shards, all devices work on
each (`split_levels`, partitioned automatically). From there on every shard has a cluster of its own:
`own_rows` hands each its rows, one exchange for the whole hierarchy, and `split_own` needs no other shard.

Shape suffixes: N rows, D embedding, C clusters of a level (c: those of one group), M slots of a cluster, s
its two halves, X rows drawn from it, S row shards (docs/notation.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from vixml_jax import sharding

# Small clusters are gathered together up to so many rows: they stay in a CPU's cache from round to round.
ROWS_AT_ONCE = 4_096

# The two centres of a larger cluster are fitted to a random sample of this size: it stays in a CPU's cache,
# and memory is bounded (at 768 dimensions in float32: 32 MB) whatever N, also where the rows are split over a
# mesh and the gathered ones are not. Of 300,000 rows, clusters of 16 are looser by 2 % in the end than with
# 65,536, in two thirds of the time; with 2,048 by 8 %.
ROWS_OF_A_FIT = 10_240

# Of a cluster of up to so many rows all inner products are computed, and all further levels read these
# instead of the rows: one small product a round instead of two over D dimensions, and no row is gathered
# again.
PRODUCTS_OF = 160

# Rounds of 2-means. With momentum (`_fit`) so few leave tighter clusters than 20 without.
ROUNDS = 8

AnyArray = TypeVar("AnyArray", Array, np.ndarray)


@jax.jit
def unit_rows(embeddings_ND: Array) -> Array:
    """Rows of length 1 in float32; a zero row stays zero, which is at right angles to every centre."""
    rows_ND = embeddings_ND.astype(jnp.float32)
    squares_N = jnp.sum(jnp.square(rows_ND), axis=1)
    inverse_N = jnp.where(squares_N > 0, jax.lax.rsqrt(jnp.where(squares_N > 0, squares_N, 1)), 0)
    return rows_ND * inverse_N[:, None]


class Level(NamedTuple, Generic[AnyArray]):
    """What is asked of a level of the hierarchy, by row shard; where all work together there is one.

    Attributes:
      sizes: rows of each cluster; may be 0. int32 [S, C].
      left_sizes: rows of each left half.
      drawn: random places in each cluster, int32 [S, C, X]: two different ones to start from, or where there
        are more than ROWS_OF_A_FIT slots as many for a sample.
    """

    sizes: AnyArray
    left_sizes: AnyArray
    drawn: AnyArray


@functools.partial(jax.jit, static_argnames="slots")
def split_levels(
    unit_ND: Array, members_1CM: Array, levels: Sequence[Level], slots: tuple[int, ...]
) -> Array:
    """Splits every cluster in two, and the halves again, once for each of the levels.

    Args:
      unit_ND: rows of length 1.
      members_1CM: row numbers of each cluster, of which the first `sizes` count.
      levels: [1, C], then [1, 2C] and so on. One, unless M is at most PRODUCTS_OF.
      slots: M of each level's result.

    Returns:
      The members of the last halves, [1, C', M], C' = 2C for one level, 4C for two; left and right in turn,
      and within each, rows keep their order.
    """
    halves_CM = _split(unit_ND, members_1CM[0], jax.tree.map(lambda array_1C: array_1C[0], levels), slots)
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
    unit_ND: Array, members_SCM: Array, levels: Sequence[Level], slots: tuple[int, ...], mesh: Mesh
) -> Array:
    """As `split_levels` in every row shard at once, for clusters and rows of its own; [S, C', M].

    Row numbers count from the shard's first row.
    """

    def own(unit_nD: Array, members_1CM: Array, levels: Sequence[Level[Array]]) -> Array:
        return _split(unit_nD, members_1CM[0], jax.tree.map(lambda array_1C: array_1C[0], levels), slots)[
            None
        ]

    rows = P(sharding.ROWS)
    return jax.shard_map(own, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(
        unit_ND, members_SCM, levels
    )


def _split(unit_ND: Array, members_CM: Array, levels: Sequence[Level], slots: Sequence[int]) -> Array:
    if members_CM.shape[1] <= PRODUCTS_OF:
        return _split_small(unit_ND, members_CM, levels, slots)
    (level,), (half_slots,) = levels, slots
    return _split_large(unit_ND, members_CM, level, half_slots)


def _split_small(unit_ND: Array, members_CM: Array, levels: Sequence[Level], slots: Sequence[int]) -> Array:
    """Splits clusters at all levels from the inner products of their rows."""
    num_clusters, num_slots = members_CM.shape

    def split_again(args: tuple[Array, list[Level]]) -> Array:
        members_M, levels = args
        rows_MD = unit_ND[members_M]
        members_cM, products_cMM = members_M[None], (rows_MD @ rows_MD.T)[None]
        for (sizes_c, left_sizes_c, starts_c2), half_slots in zip(levels, slots, strict=True):
            left_cM = jax.vmap(_fit_products)(products_cMM, sizes_c, left_sizes_c, starts_c2)
            members_cM, places_csM = _lay_out(members_cM, left_cM, sizes_c, half_slots)
            products_cMM = jax.vmap(_products_within)(products_cMM, places_csM)
            products_cMM = products_cMM.reshape(-1, half_slots, half_slots)
        return members_cM

    # Of each cluster, the clusters that it has become at each level.
    own_levels = jax.tree.map(lambda array_C: array_C.reshape(num_clusters, -1, *array_C.shape[1:]), levels)
    halves = jax.lax.map(split_again, (members_CM, own_levels), batch_size=_at_once(num_clusters, num_slots))
    return halves.reshape(-1, slots[-1])


def _at_once(num_clusters: int, num_slots: int) -> int:
    """How many clusters are gathered together."""
    # A power of two divides most levels' clusters: no remainder, for which all would compile again.
    return min(num_clusters, 1 << (max(1, ROWS_AT_ONCE // num_slots).bit_length() - 1))


def _fit_products(products_MM: Array, size: Array, left_size: Array, starts_2: Array) -> Array:
    """As `_fit`, from the inner products of all rows."""
    return _fit(lambda weights_M: products_MM @ weights_M, products_MM.shape[0], size, left_size, starts_2)


def _products_within(products_MM: Array, places_sM: Array) -> Array:
    """The inner products of the rows of each half, [2, slots, slots]."""

    def within(places_m: Array) -> Array:
        return products_MM[places_m].T[places_m]  # whole rows twice: the products are symmetric

    return jax.vmap(within)(places_sM)


def _split_large(unit_ND: Array, members_CM: Array, level: Level, slots: int) -> Array:
    """Splits clusters in two from their rows, or from a sample of them."""
    num_clusters, num_slots = members_CM.shape
    sizes_C, left_sizes_C, drawn_CX = level

    def fit_all(args: tuple[Array, ...]) -> Array:
        members_M, size, left_size, starts_2 = args
        return _fit_rows(unit_ND[members_M], size, left_size, starts_2)

    def direction_of_sample(args: tuple[Array, ...]) -> Array:
        members_M, size, left_size, sample_X = args
        rows_XD = unit_ND[members_M[sample_X]]
        drawn = jnp.int32(sample_X.shape[0])
        share = jnp.round(left_size * (drawn / jnp.maximum(size, 1))).astype(jnp.int32)
        left_X = _fit_rows(rows_XD, drawn, share, jnp.array([0, 1]))
        return _unit(jnp.where(left_X, 1.0, 0.0) @ rows_XD) - _unit(jnp.where(left_X, 0.0, 1.0) @ rows_XD)

    args = (members_CM, sizes_C, left_sizes_C, drawn_CX)
    if num_slots <= ROWS_OF_A_FIT:
        left_CM = jax.lax.map(fit_all, args, batch_size=_at_once(num_clusters, num_slots))
    else:
        directions_CD = jax.lax.map(direction_of_sample, args)
        # Few clusters are this large, so that one product with all directions is cheap and gathers no rows.
        scores_NC = unit_ND @ directions_CD.T
        scores_CM = scores_NC[members_CM, jnp.arange(num_clusters)[:, None]]
        left_CM = jax.vmap(highest)(scores_CM, sizes_C, left_sizes_C)
    return _lay_out(members_CM, left_CM, sizes_C, slots)[0]


def _fit_rows(rows_MD: Array, size: Array, left_size: Array, starts_2: Array) -> Array:
    """As `_fit`, from rows of length 1."""
    return _fit(
        lambda weights_M: rows_MD @ (weights_M @ rows_MD), rows_MD.shape[0], size, left_size, starts_2
    )


def _fit(
    products: Callable[[Array], Array], num_slots: int, size: Array, left_size: Array, starts_2: Array
) -> Array:
    """Balanced 2-means of the first `size` rows, beginning with the two rows `starts_2` as centres.

    Each round puts the `left_size` rows that prefer the left centre most into the left half (the best
    assignment under that constraint), then takes the halves' means as centres. How much rows prefer it then
    changes by twice as much as these centres say (momentum): 2-means creeps as power iteration does. All
    rounds but the last take nearly equal preferences as equal, which halves the time to find those rows.

    A centre is known by its products with the rows only: those of a sum of rows are sums of inner products.

    Args:
      products: gives the inner products [M] of every row with the sum of all rows by weights [M].
      num_slots: M.
      size, left_size, starts_2: of the cluster.

    Returns:
      Which rows are in the left half, bool [M].
    """
    slots_M = jnp.arange(num_slots)
    real_M = slots_M < size
    total_M = products(jnp.where(real_M, 1.0, 0.0))

    def one_round(done: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        scores_M, before_M = carry
        left_M = _about_highest(scores_M, size, left_size)
        with_left_M = products(jnp.where(left_M, 1.0, 0.0))
        with_right_M = total_M - with_left_M
        # The squared length of a sum of rows is the sum of their products with it.
        left_norm = _root(jnp.sum(jnp.where(left_M, with_left_M, 0)))
        right_norm = _root(jnp.sum(jnp.where(left_M | ~real_M, 0, with_right_M)))
        # Of equal rows all may be on the left: what is left of the right is rounding, and no direction.
        prefers_M = with_left_M / jnp.maximum(left_norm, 1e-12) - jnp.where(
            right_norm > 0, with_right_M / jnp.maximum(right_norm, 1e-12), 0
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
    ranks_M = _ranks(scores_M)
    threshold = _nth_highest(ranks_M, real_M, count, 32)
    above_M = real_M & (ranks_M > threshold)
    ties_M = real_M & (ranks_M == threshold)
    from_the_end_M = (num_slots - places_M).astype(jnp.uint32)
    last = _nth_highest(from_the_end_M, ties_M, count - above_M.sum(), (num_slots + 1).bit_length())
    return above_M | (ties_M & (from_the_end_M >= last))


def _about_highest(scores_M: Array, size: Array, count: Array) -> Array:
    """As `highest`, and whatever equals the lowest of them in sign, exponent and 7 bits of the mantissa."""
    real_M = jnp.arange(scores_M.shape[0]) < size
    ranks_M = _ranks(scores_M) >> 16
    return real_M & (ranks_M >= _nth_highest(ranks_M, real_M, count, 16))


def _ranks(scores_M: Array) -> Array:
    """Unsigned numbers in the order of the floats."""
    # Of negative ones all bits are turned over, of others the highest.
    bits_M = jax.lax.bitcast_convert_type(scores_M, jnp.uint32)
    return jnp.where(bits_M >> 31 == 1, ~bits_M, bits_M | jnp.uint32(1 << 31))


def _nth_highest(values_M: Array, counted_M: Array, n: Array | int, bits: int) -> Array:
    """Returns the n-th highest of the counted uint32 values, of so many bits; all bits set where n is 0.

    It bisects on bits, which takes a count for each: exact, and far cheaper than a sort.
    """

    def set_bit(i: Array, threshold: Array) -> Array:
        candidate = threshold | (jnp.uint32(1 << (bits - 1)) >> i.astype(jnp.uint32))
        return jnp.where(jnp.sum(counted_M & (values_M >= candidate)) >= n, candidate, threshold)

    # The largest number that at least n values reach.
    return jax.lax.fori_loop(0, bits, set_bit, jnp.uint32(0))


def _lay_out(members_CM: Array, left_CM: Array, sizes_C: Array, slots: int) -> tuple[Array, Array]:
    """Lays each cluster out as its two halves, [2C, slots]; also which slots these were, [C, 2, slots]."""
    places_CsM = jax.vmap(functools.partial(_half_places, slots=slots))(left_CM, sizes_C)
    halves_CM = jnp.take_along_axis(members_CM, places_CsM.reshape(len(members_CM), -1), axis=1)
    return halves_CM.reshape(-1, slots), places_CsM


def _half_places(left_M: Array, size: Array, slots: int) -> Array:
    """Which slots of a cluster its halves hold, int32 [2, slots], in order; from a half's size on, slot 0.

    Counting finds each row's new place: the sort that a stable partition is takes several times as long.
    """
    slots_M = jnp.arange(left_M.shape[0])
    right_M = ~left_M & (slots_M < size)
    nowhere = 2 * slots
    to_M = jnp.where(left_M, jnp.cumsum(left_M) - 1, nowhere)
    to_M = jnp.where(right_M, slots + jnp.cumsum(right_M) - 1, to_M)
    return jnp.zeros(2 * slots, slots_M.dtype).at[to_M].set(slots_M, mode="drop").reshape(2, slots)
