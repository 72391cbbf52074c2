"""Exact maximum inner product search on the CPU, in blocks, with bounded memory.

A block of queries meets the labels block by block, the first blocks being small. Of each block of scores only
those above the query's k-th best so far go on to be merged; they soon are few, so the time is mostly that of
the matrix product.
`argpartition` of every block instead took 3 to 6 times as long on 2 cores (131,072 labels x 64, k=100).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vixml_jax.retrieval import bank as bank_lib
from vixml_jax.retrieval import index
from vixml_jax.retrieval.bank import Bank

# Scores and candidates held together. Beside labels, queries and results a search takes less than 200 MB, and
# that only where labels come in the order of rising scores (more if k alone is above this number).
BLOCK_ENTRIES = 1 << 21
# Labels of the first block, for which there is no floor yet; each next one is twice as large.
FIRST_BLOCK = 256
# Values of compressed labels that are expanded together, 32 MB.
EXPANDED_ENTRIES = 1 << 23
# Below the key of every finite score.
NOTHING = np.iinfo(np.int64).min


class ExactIndex(index.Index):
    """Exact search in float32; equal scores go by the lower label number.

    Equal means equal in float32. Where products are rounded, the last bit of a score may depend on its place
    in a block, as in any BLAS.

    Args:
      embeddings: [L, D], any float type, finite; or a bank. A float32 array is used as it is, without a copy.
      query_block: most queries multiplied together; fewer for large k, to bound the memory.
      label_block: most labels multiplied together; more, in proportion, for fewer queries than query_block.
      dtype: what embeddings are kept as, "float32", "bfloat16" or "int8"; the search is exact over that.

    Raises:
      UserError: if the embeddings are not a matrix of finite numbers, or a block is not positive.
    """

    kind: ClassVar[str] = "exact"

    def __init__(
        self,
        embeddings: np.typing.ArrayLike | Bank,
        query_block: int = 1024,
        label_block: int = 2048,
        dtype: str = "float32",
    ):
        self._bank = bank_lib.of(embeddings, dtype)
        index.check_blocks(query_block, label_block)
        self._query_block, self._label_block = query_block, label_block
        super().__init__(*self._bank.shape)

    def _search(self, queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        ids_QK = np.empty((len(queries_QD), k), np.int32)
        scores_QK = np.empty((len(queries_QD), k), np.float32)
        rows = max(1, min(self._query_block, BLOCK_ENTRIES // (k + self._label_block)))
        for start in range(0, len(queries_QD), rows):
            block = slice(start, start + rows)
            scores_QK[block], ids_QK[block] = _decode(self._best_keys(queries_QD[block], k))
        return ids_QK, scores_QK

    def _best_keys(self, queries_QD: np.ndarray, k: int) -> np.ndarray:
        """The keys of the k best labels, int64 [Q, k], best first."""
        best_QK = np.full((len(queries_QD), k), NOTHING, np.int64)
        floor_Q1 = np.full((len(queries_QD), 1), -np.inf, np.float32)
        # A few queries take large blocks: each product has a cost of its own.
        num_queries = len(queries_QD)
        most_labels = self._label_block * max(1, self._query_block // num_queries)
        most_labels = min(most_labels, max(self._label_block, BLOCK_ENTRIES // num_queries - k))
        if self._bank.dtype != "float32":
            most_labels = min(most_labels, max(1, EXPANDED_ENTRIES // self.dim))
        start, width = 0, min(FIRST_BLOCK, most_labels)
        while start < self.num_labels:
            part = slice(start, start + width)
            labels_LD = self._bank.rows(part)
            first, start, width = start, start + width, min(2 * width, most_labels)
            scores_QL = queries_QD @ labels_LD.T
            if self._bank.scales_L is not None:
                scores_QL *= self._bank.scales_L[part]
            # A label that equals the floor loses to those before it, whose numbers are lower.
            entries = np.flatnonzero(scores_QL > floor_Q1)
            if not len(entries):
                continue
            rows, columns = np.divmod(entries, len(labels_LD))
            counts_Q = np.bincount(rows, minlength=len(queries_QD))
            places = np.arange(len(rows)) - np.repeat(np.cumsum(counts_Q) - counts_Q, counts_Q)
            most = int(counts_Q.max())
            merged = np.full((len(queries_QD), k + most), NOTHING, np.int64)
            merged[:, :k] = best_QK
            merged[rows, k + places] = _encode(scores_QL.reshape(-1)[entries], first + columns)
            merged.partition(most, axis=1)
            best_QK = merged[:, most:]
            floor_Q1 = _decode(best_QK.min(axis=1, keepdims=True))[0]
        return np.sort(best_QK, axis=1)[:, ::-1]

    def _write(self, directory: Path) -> None:
        self._bank.save(directory)


def load(directory: Path, header: dict[str, Any], name: str = bank_lib.EMBEDDINGS) -> ExactIndex:
    """Opens a saved index whose embeddings are in the file `name`; they are memory-mapped."""
    return ExactIndex(bank_lib.load(directory, header, name))


def _encode(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Packs score and label into one int64 that is higher for a higher score, then for a lower label.

    So a partition of plain integers, for which NumPy has vector code, settles ties on the way.
    """
    bits = (scores + 0.0).view(np.int32)  # + 0.0 makes -0.0 the equal of 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats rise with their bits: turn them over
    return (ordered.astype(np.int64) << 32) | (0xFFFFFFFF - ids)


def _decode(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels of keys; -inf and -1 for NOTHING."""
    ordered = (keys >> 32).astype(np.int32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(np.float32)
    ids = (0xFFFFFFFF - (keys & 0xFFFFFFFF)).astype(np.int32)
    empty = keys == NOTHING
    return np.where(empty, np.float32(-np.inf), scores), np.where(empty, np.int32(-1), ids)
