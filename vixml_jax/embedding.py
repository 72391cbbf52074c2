"""Whole banks into embeddings, a fixed number of items at a time.

Embeddings of a run's own splits stay on the mesh, as tables that are split by rows (train_state.row_table);
those of new items come to the host.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vixml_jax import sharding
from vixml_jax.data.items import ItemBank
from vixml_jax.data.pipeline import call_size, encoding_batches
from vixml_jax.models.dual_encoder import DualEncoder
from vixml_jax.models.two_tower import l2_normalize
from vixml_jax.progress import Progress
from vixml_jax.train_state import Tables, zero_table
from vixml_jax.types import PackedTokens

# Banks and the rows of each that are embedded.
Views = Sequence[tuple[ItemBank, np.ndarray]]
# The modalities of a query that is embedded once, with all that it has.
AS_IT_IS = ("text+image",)


class Embedder:
    """Embeds item banks with a model whose parameters are given at each call, so that it compiles once.

    Args:
      graphdef: structure of the DualEncoder.
      mesh: where it runs.
      items_per_call: items of one device call.
      row_length: slots of a packed row.
    """

    def __init__(
        self, graphdef: nnx.GraphDef[DualEncoder], mesh: Mesh, *, items_per_call: int, row_length: int
    ):
        self._mesh, self._row_length = mesh, row_length
        self._items = sharding.round_up(items_per_call, sharding.num_row_shards(mesh))

        def pooled(params: nnx.State, frozen: nnx.State, tokens: PackedTokens, num_items: int) -> jax.Array:
            return nnx.merge(graphdef, params, frozen).embed(tokens, num_items)

        def labels(
            params: nnx.State,
            frozen: nnx.State,
            texts_LD: jax.Array,
            clusters_L: jax.Array,
            centroids_LD: jax.Array,
        ) -> jax.Array:
            return nnx.merge(graphdef, params, frozen).label_embeddings(texts_LD, clusters_L, centroids_LD)

        def add(table_ND: jax.Array, rows: jax.Array, values: jax.Array, unit: bool) -> jax.Array:
            return table_ND.at[rows].add(l2_normalize(values) if unit else values, mode="drop")

        def all_labels(params: nnx.State, frozen: nnx.State, *tables: jax.Array) -> jax.Array:
            """`labels` of some at a time, of which every device holds equally many."""
            shards = sharding.num_row_shards(mesh)
            at_once = sharding.TABLE_ROWS_MULTIPLE // shards

            def cut(table: jax.Array) -> jax.Array:
                return table.reshape(shards, -1, at_once, *table.shape[1:]).swapaxes(0, 1)

            def some(parts: tuple[jax.Array, ...]) -> jax.Array:
                rows = [part.reshape(shards * at_once, *part.shape[2:]) for part in parts]
                return labels(params, frozen, *rows).reshape(shards, at_once, -1)

            found = jax.lax.map(some, tuple(map(cut, tables)))
            return found.swapaxes(0, 1).reshape(len(tables[0]), -1)

        whole, split = sharding.replicated(mesh), sharding.rows(mesh, 2)
        self._pooled = jax.jit(pooled, static_argnames="num_items", out_shardings=whole)
        self._labels = jax.jit(labels, out_shardings=whole)
        self._add = jax.jit(add, out_shardings=split, donate_argnums=0, static_argnums=3)
        self._normalize = jax.jit(l2_normalize, out_shardings=split, donate_argnums=0)
        self._all_labels = jax.jit(all_labels, out_shardings=split)

    @property
    def items_per_call(self) -> int:
        """Items of a device call."""
        return self._items

    def trace(self, params: Any, frozen: Any, tokens: PackedTokens) -> jax.stages.Traced:
        """Traces a device call on arrays or their shapes, to be compiled ahead of time."""
        return self._pooled.trace(params, frozen, tokens, num_items=self._items)

    def table(
        self, params: nnx.State, frozen: nnx.State, bank: ItemBank, title: str, *, unit: bool = False
    ) -> jax.Array:
        """Embeds N items into a table on the mesh, float32 [N', D].

        Args:
          params: what trains of the model.
          frozen: the rest of it.
          bank: the items, at least one.
          title: shown while it lasts.
          unit: L2-normalise the rows.
        """
        return self._table(params, frozen, [(bank, np.arange(len(bank)))], title, unit)

    def _table(self, params: nnx.State, frozen: nnx.State, views: Views, title: str, unit: bool) -> jax.Array:
        """Embeds the items of all views into a table, where those of one item are added up."""
        table_ND: jax.Array | None = None
        for chosen, values in self._calls(params, frozen, views, title):
            if table_ND is None:
                table_ND = zero_table((len(views[0][0]), values.shape[1]), np.float32, self._mesh)
            # What filled up the last call goes nowhere.
            rows = np.full(len(values), len(table_ND), np.int32)
            rows[: len(chosen)] = chosen
            table_ND = self._add(table_ND, rows, values, unit)
        assert table_ND is not None, "an empty bank"
        return table_ND

    def label_table(
        self,
        params: nnx.State,
        frozen: nnx.State,
        bank: ItemBank,
        tables: Tables,
        title: str = "embed labels",
    ) -> jax.Array:
        """Returns what the dataset's labels are searched by, L2-normalised float32 [L', D], on the mesh."""
        texts_LD = self.table(params, frozen, bank, title)
        return self._all_labels(params, frozen, texts_LD, tables.label_clusters, tables.centroids)

    def queries(
        self,
        params: nnx.State,
        frozen: nnx.State,
        bank: ItemBank,
        title: str = "embed queries",
        *,
        modalities: Collection[str] = AS_IT_IS,
        here: bool = True,
    ) -> np.ndarray:
        """Returns what queries search by, L2-normalised float32 [N, D], on the host; see sharding.fetch.

        Args:
          params, frozen, bank, title: as of `table`.
          modalities: a query that has text and pictures searches by the mean of its embeddings as each of
            these, "text", "image" and "text+image"; see `ItemBank.views`.
          here: whether this process gets the rows.
        """
        views = bank.views(modalities)
        table_ND = self._table(params, frozen, views, title, unit=True)
        if len(views) > 1:
            table_ND = self._normalize(table_ND)
        return sharding.fetch(table_ND, len(bank), here=here)

    def new_queries(
        self,
        params: nnx.State,
        frozen: nnx.State,
        bank: ItemBank,
        title: str | None,
        *,
        modalities: Collection[str] = AS_IT_IS,
    ) -> np.ndarray:
        """Returns what `queries` does, for items that are of no split and need no table on the mesh."""
        sums_ND = np.zeros((len(bank), 0), np.float32)
        for chosen, values in self._calls(params, frozen, bank.views(modalities), title):
            values = np.asarray(values)[: len(chosen)]
            if not sums_ND.size:
                sums_ND = np.zeros((len(bank), values.shape[1]), np.float32)
            sums_ND[chosen] += normalized(values)
        return normalized(sums_ND)

    def labels(
        self,
        params: nnx.State,
        frozen: nnx.State,
        bank: ItemBank,
        tables: Tables,
        title: str = "embed labels",
        *,
        here: bool = True,
    ) -> np.ndarray:
        """Returns `label_table` on the host, float32 [L, D]; see sharding.fetch."""
        return sharding.fetch(self.label_table(params, frozen, bank, tables, title), len(bank), here=here)

    def pooled(self, params: nnx.State, frozen: nnx.State, bank: ItemBank, title: str | None) -> np.ndarray:
        """Returns the pooled embeddings of all items on the host, float32 [N, D], not normalised.

        Progress is shown under `title`, None for none.
        """
        calls = self._calls(params, frozen, [(bank, np.arange(len(bank)))], title)
        return np.concatenate([np.asarray(values)[: len(chosen)] for chosen, values in calls])

    def _calls(
        self, params: nnx.State, frozen: nnx.State, views: Views, title: str | None
    ) -> Iterator[tuple[np.ndarray, jax.Array]]:
        """Yields rows of each view and their embeddings, a call late, so that the device always has work."""
        shards = sharding.num_row_shards(self._mesh)
        waiting: list[tuple[np.ndarray, jax.Array]] = []
        with Progress(sum(len(rows) for _, rows in views), title, "items") as progress:

            def finished() -> tuple[np.ndarray, jax.Array]:
                chosen, values = waiting.pop(0)
                progress.update(len(chosen))
                return chosen, jax.block_until_ready(values)

            for bank, rows in views:
                items = call_size(len(rows), self._items, shards)
                for chosen, tokens in encoding_batches(bank, rows, items, self._row_length, self._mesh):
                    waiting.append((chosen, self._pooled(params, frozen, tokens, num_items=items)))
                    if len(waiting) > 1:
                        yield finished()
            if waiting:
                yield finished()

    def prototypes(
        self,
        params: nnx.State,
        frozen: nnx.State,
        texts_LD: np.ndarray,
        clusters_L: np.ndarray,
        centroids_LD: np.ndarray,
    ) -> np.ndarray:
        """Returns what labels are searched by, L2-normalised float32 [L, D], from their pooled embeddings."""
        parts = []
        for start in range(0, len(texts_LD), self._items):
            part = slice(start, start + self._items)
            count = len(texts_LD[part])
            full = [np.resize(values[part], (self._items, *values.shape[1:])) for values in
                    (texts_LD, clusters_L, centroids_LD)]  # fmt: skip
            parts.append(np.asarray(self._labels(params, frozen, *full))[:count])
        return np.concatenate(parts)


def normalized(values: np.ndarray) -> np.ndarray:
    """L2-normalises rows; a zero row stays zero."""
    norms = np.linalg.norm(values, axis=-1, keepdims=True)
    return values / np.maximum(norms, 1e-12)
