"""Exact search on the devices of a mesh: every device holds some rows of the label bank.

A block of queries visits all devices. Each goes through its labels block by block and keeps the query's k
best; then every device gets its share of the queries with what all devices have found for them, and merges.
So no device holds a score of every label for any query, and what travels is k scores and label numbers a
query and device.

Of a block of scores the k best are searched in the k groups of neighbouring labels whose highest scores are
highest. No other group can hold one of them: each of the k groups has a label that goes before it. Sorting is
what a search on an accelerator would otherwise spend most of its time with.

Equal scores go by the lower label number on every path: `top_k` prefers the earlier of equals, and labels
always stand in the order of their numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vixml_jax import sharding
from vixml_jax.retrieval import bank as bank_lib
from vixml_jax.retrieval import index
from vixml_jax.retrieval.bank import Bank

# Neighbouring labels that are looked at together when the best of a block are sought.
GROUP = 64

Search = Callable[..., tuple[jax.Array, jax.Array]]


class MeshIndex(index.Index):
    """Exact search over labels that are split by rows over all devices of a mesh.

    Inner products are in float32 for a float32 bank, whatever the platform's default; for a compressed one
    queries are rounded to bfloat16 and products summed in float32, as matrix units do. Every process of a run
    must call `search` with the same queries, and gets all results.

    Args:
      embeddings: [L, D], any float type, finite; or a bank, such as a memory-mapped one, of which each
        process reads what its devices hold.
      query_block: most queries that visit the devices together.
      label_block: most labels that a device multiplies them with at a time. A device needs about three times
        query_block x label_block float32 values beside its part of the bank.
      dtype: what embeddings are kept as, "float32", "bfloat16" or "int8".
      mesh: its devices are used, however they are arranged; None takes the mesh that is set, or one over all
        devices.

    Raises:
      UserError: if the embeddings are not a matrix of finite numbers, or a block is not positive.
    """

    kind: ClassVar[str] = "mesh"

    def __init__(
        self,
        embeddings: np.typing.ArrayLike | Bank,
        query_block: int = 1024,
        label_block: int = 16_384,
        dtype: str = "float32",
        mesh: Mesh | None = None,
    ):
        self._bank = bank_lib.of(embeddings, dtype)
        index.check_blocks(query_block, label_block)
        if mesh is None:
            with sharding.ensure() as mesh:
                pass
        super().__init__(*self._bank.shape)
        self._mesh = mesh
        self._query_block = sharding.round_up(query_block, mesh.size)
        self._label_block, self._rows = blocks(self.num_labels, mesh.size, label_block)
        self._codes = _placed(self._bank.codes_LD, self._rows * mesh.size, mesh)
        scales_L = self._bank.scales_L
        self._scales = None
        if scales_L is not None:
            self._scales = _placed(scales_L, self._rows * mesh.size, mesh)

    def _search(self, queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        function = searcher(self._mesh, self.num_labels, self._label_block, k)
        found: list[tuple[np.ndarray, np.ndarray]] = []
        waiting: tuple[int, tuple[jax.Array, jax.Array]] | None = None
        for start in range(0, len(queries_QD), self._query_block):
            block_QD = queries_QD[start : start + self._query_block]
            result = function(self._replicated(block_QD), self._codes, self._scales)
            if waiting is not None:  # fetched one block late, so that the devices always have work
                found.append(_fetched(*waiting))
            waiting = (len(block_QD), result)
        if waiting is not None:
            found.append(_fetched(*waiting))
        return np.concatenate([ids for ids, _ in found]), np.concatenate([scores for _, scores in found])

    def _replicated(self, queries_QD: np.ndarray) -> jax.Array:
        """Queries on every device; their number is a power of two times that of the devices, or the block."""
        devices = self._mesh.size
        size = sharding.power_of_two(-(-len(queries_QD) // devices)) * devices
        size = min(size, self._query_block)
        padded_QD = np.zeros((size, self.dim), np.float32)
        padded_QD[: len(queries_QD)] = queries_QD
        return jax.make_array_from_callback(
            padded_QD.shape, NamedSharding(self._mesh, P()), lambda part: padded_QD[part]
        )

    def _write(self, directory: Path) -> None:
        self._bank.save(directory)


def load(directory: Path, header: dict[str, Any]) -> MeshIndex:
    """Opens a saved index on the devices at hand, as many as there are."""
    return MeshIndex(bank_lib.load(directory, header))


def blocks(num_labels: int, num_devices: int, label_block: int) -> tuple[int, int]:
    """Labels of a block, and labels of a device: a multiple of it."""
    rows = -(-num_labels // num_devices)
    if rows > GROUP:
        rows = sharding.round_up(rows, GROUP)
        label_block = sharding.round_up(label_block, GROUP)
    label_block = min(label_block, rows)
    return label_block, sharding.round_up(rows, label_block)


@functools.lru_cache(maxsize=16)
def searcher(mesh: Mesh, num_labels: int, label_block: int, k: int) -> Search:
    """Makes the jitted search of one block of queries.

    Returns:
      (queries float32 [Q, D] on every device, codes [L', D] and scales float32 [L'] or None, both split by
      rows) -> ids int32 [Q, k] and scores float32 [Q, k], on every device, -1 and -inf where there are fewer
      labels. Q and L' are multiples of the number of devices, L' / devices one of `label_block`.
    """
    axes = tuple(mesh.axis_names)

    def of_device(
        queries_QD: jax.Array, codes_LD: jax.Array, scales_L: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        Q, rows = len(queries_QD), len(codes_LD)
        first = jax.lax.axis_index(axes) * rows

        def visit(best: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[Any, None]:
            codes = jax.lax.dynamic_slice_in_dim(codes_LD, start, label_block)
            scores_QL = _products(queries_QD, codes)
            if scales_L is not None:
                scores_QL *= jax.lax.dynamic_slice_in_dim(scales_L, start, label_block)
            ids_L = first + start + jnp.arange(label_block, dtype=jnp.int32)
            scores_QL = jnp.where(ids_L < num_labels, scores_QL, -jnp.inf)
            places, scores = _best_places(scores_QL, min(k, label_block))
            # Those found before stand first: their numbers are lower.
            ids = jnp.concatenate([best[0], first + start + places], axis=1)
            return _merged(ids, jnp.concatenate([best[1], scores], axis=1), k), None

        nothing = (jnp.full((Q, k), -1, jnp.int32), jnp.full((Q, k), -jnp.inf, jnp.float32))
        starts = jnp.arange(0, rows, label_block, dtype=jnp.int32)
        (ids, scores), _ = jax.lax.scan(visit, nothing, starts)

        def exchange(x: jax.Array) -> jax.Array:  # [Q, k] -> [Q / devices, devices * k]
            return jax.lax.all_to_all(x, axes, split_axis=0, concat_axis=1, tiled=True)

        ids, scores = _merged(exchange(ids), exchange(scores), k)
        return jnp.where(jnp.isneginf(scores), -1, ids), scores

    def search(queries_QD: jax.Array, codes_LD: jax.Array, scales_L: jax.Array | None) -> Any:
        return jax.shard_map(
            of_device,
            mesh=mesh,
            in_specs=(P(), P(axes, None), None if scales_L is None else P(axes)),
            out_specs=P(axes, None),
            check_vma=False,  # `nothing` is the same everywhere, what the loop makes of it is not
        )(queries_QD, codes_LD, scales_L)

    return jax.jit(search, out_shardings=NamedSharding(mesh, P()))


def _products(queries_QD: jax.Array, codes_LD: jax.Array) -> jax.Array:
    if codes_LD.dtype == jnp.float32:
        precision = jax.lax.Precision.HIGHEST
    else:
        queries_QD = queries_QD.astype(jnp.bfloat16)
        if (
            codes_LD.dtype == jnp.uint16
        ):  # bits until here: XLA:CPU would expand a bank of bfloat16 as a whole
            codes_LD = jax.lax.bitcast_convert_type(codes_LD, jnp.bfloat16)
        codes_LD = codes_LD.astype(jnp.bfloat16)  # exact for int8
        precision = None
    return jnp.einsum(
        "qd,ld->ql", queries_QD, codes_LD, precision=precision, preferred_element_type=jnp.float32
    )


def _best_places(scores_QL: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Places int32 [Q, k] of the highest scores [Q, L], of equals the first, and these scores."""
    Q, L = scores_QL.shape
    groups = L // GROUP
    if L % GROUP or groups < 2 * k:
        scores, places = jax.lax.top_k(scores_QL, k)
        return places, scores
    scores_QGM = scores_QL.reshape(Q, groups, GROUP)
    _, chosen_QG = jax.lax.top_k(scores_QGM.max(axis=2), k)
    chosen_QG = jnp.sort(chosen_QG, axis=1)  # so that labels stay in the order of their numbers
    candidates_QGM = jnp.take_along_axis(scores_QGM, chosen_QG[:, :, None], axis=1)
    scores, places = jax.lax.top_k(candidates_QGM.reshape(Q, k * GROUP), k)
    return jnp.take_along_axis(chosen_QG, places // GROUP, axis=1) * GROUP + places % GROUP, scores


def _merged(ids_QM: jax.Array, scores_QM: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    scores, places = jax.lax.top_k(scores_QM, k)
    return jnp.take_along_axis(ids_QM, places, axis=1), scores


def _placed(values: np.ndarray, rows: int, mesh: Mesh) -> jax.Array:
    """Splits rows over all devices, filled up with zeros; a process reads those of its own."""
    where = NamedSharding(mesh, P(tuple(mesh.axis_names), *(None,) * (values.ndim - 1)))

    def part(at: Any) -> np.ndarray:
        start, stop, _ = at[0].indices(rows)
        own = values[start:stop]
        return np.pad(own, [(0, stop - start - len(own))] + [(0, 0)] * (values.ndim - 1))

    return jax.make_array_from_callback((rows, *values.shape[1:]), where, part)


def _fetched(count: int, result: tuple[jax.Array, jax.Array]) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(result[0])[:count], np.asarray(result[1])[:count]
