"""Whole banks into embeddings, a fixed number of items at a time."""

from __future__ import annotations

import functools

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vixml_jax import sharding
from vixml_jax.data.items import ItemBank
from vixml_jax.data.pipeline import call_size, encoding_batches
from vixml_jax.models.dual_encoder import DualEncoder
from vixml_jax.progress import Progress
from vixml_jax.train_state import Tables
from vixml_jax.types import PackedTokens


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

        self._pooled = jax.jit(pooled, static_argnames="num_items", out_shardings=sharding.replicated(mesh))
        self._labels = jax.jit(labels, out_shardings=sharding.replicated(mesh))

    def pooled(self, params: nnx.State, frozen: nnx.State, bank: ItemBank, title: str | None) -> np.ndarray:
        """Returns the pooled embeddings of all items, float32 [N, D], not normalised.

        Progress is shown under `title`, None for none.
        """
        rows = np.arange(len(bank))
        items = call_size(len(bank), self._items, sharding.num_row_shards(self._mesh))
        run = functools.partial(self._pooled, num_items=items)
        parts: list[np.ndarray] = []
        waiting: tuple[np.ndarray, jax.Array] | None = None
        with Progress(len(bank), title, "items") as progress:
            for chosen, tokens in encoding_batches(bank, rows, items, self._row_length, self._mesh):
                result = run(params, frozen, tokens)
                if waiting is not None:  # fetched one call late, so that the device always has work
                    parts.append(np.asarray(waiting[1])[: len(waiting[0])])
                    progress.update(len(waiting[0]))
                waiting = (chosen, result)
            if waiting is not None:
                parts.append(np.asarray(waiting[1])[: len(waiting[0])])
                progress.update(len(waiting[0]))
        return np.concatenate(parts)

    def queries(
        self, params: nnx.State, frozen: nnx.State, bank: ItemBank, title: str = "embed queries"
    ) -> np.ndarray:
        """Returns the L2-normalised embeddings of queries, float32 [N, D]."""
        return normalized(self.pooled(params, frozen, bank, title))

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

    def labels(
        self,
        params: nnx.State,
        frozen: nnx.State,
        bank: ItemBank,
        tables: Tables,
        title: str = "embed labels",
    ) -> np.ndarray:
        """Returns what the dataset's labels are searched by, L2-normalised float32 [L, D]."""
        texts_LD = self.pooled(params, frozen, bank, title)
        num_labels = len(bank)
        return self.prototypes(
            params,
            frozen,
            texts_LD,
            np.asarray(tables.label_clusters)[:num_labels],
            np.asarray(tables.centroids)[:num_labels],
        )


def normalized(values: np.ndarray) -> np.ndarray:
    """L2-normalises rows; a zero row stays zero."""
    norms = np.linalg.norm(values, axis=-1, keepdims=True)
    return values / np.maximum(norms, 1e-12)
