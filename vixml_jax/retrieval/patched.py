"""An index whose labels changed after it was built: some are hidden, others stand in a small one beside it.

ScaNN can insert and delete, but only in an index with document ids, which lie in a pickle and turn every
result into strings; and its tree and codes were fitted to the labels of the beginning. An exact index beside
the main one needs none of this, finds new labels with certainty, and serves every kind of index alike. It
costs time in proportion to the number of changes: when they are many, the main index is better built anew.
"""

from __future__ import annotations

import numpy as np

from vixml_jax.retrieval.index import Index

# Places asked for beyond k while some labels are hidden: usually enough, doubled where it is not.
SPARE = 16


class PatchedIndex:
    """A main index with changes; searched like an `Index`.

    Args:
      main: the index as it was built.
      numbers_M: int [M], increasing; the label of each of its rows.
      hidden: int [h]; labels of the main index that are not to be found.
      added: index over further labels, None for none; its scores must be comparable to those of `main`.
      numbers_A: int [A], the label of each of its rows.

    Attributes:
      num_labels: how many can be found.
    """

    def __init__(
        self,
        main: Index,
        numbers_M: np.ndarray,
        hidden: np.ndarray,
        added: Index | None = None,
        numbers_A: np.ndarray | None = None,
    ):
        self.main, self.added = main, added
        self._numbers_M = np.asarray(numbers_M, np.int32)
        self._numbers_A = np.asarray([] if numbers_A is None else numbers_A, np.int32)
        self._is_hidden_M = np.isin(self._numbers_M, hidden)
        self._num_hidden = int(self._is_hidden_M.sum())
        self.num_labels = len(self._numbers_M) - self._num_hidden + len(self._numbers_A)

    def search(self, queries: np.typing.ArrayLike, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Finds the k best labels of each query, equal scores by the lower label; see `Index.search`."""
        ids_QK, scores_QK = self._search_main(queries, k)
        if self.added is None:
            return ids_QK, scores_QK
        places_QK, others_QK = self.added.search(queries, k)
        others = np.where(places_QK >= 0, self._numbers_A[np.maximum(places_QK, 0)], -1)
        return _best(np.concatenate([ids_QK, others], 1), np.concatenate([scores_QK, others_QK], 1), k)

    def _search_main(self, queries: np.typing.ArrayLike, k: int) -> tuple[np.ndarray, np.ndarray]:
        asked = k + min(self._num_hidden, SPARE)
        while True:
            rows_QK, scores_QK = self.main.search(queries, asked)
            there_QK = rows_QK >= 0
            there_QK[there_QK] = ~self._is_hidden_M[rows_QK[there_QK]]
            # What a search that finds all would leave of the k best, whichever of the hidden are among them.
            enough = min(k, len(self._numbers_M) - self._num_hidden)
            short = not len(there_QK) or int(there_QK.sum(axis=1).min()) < enough
            if not short or asked >= min(k + self._num_hidden, len(self._numbers_M)):
                break
            asked = min(2 * asked, k + self._num_hidden)
        ids_QK = np.where(there_QK, self._numbers_M[np.maximum(rows_QK, 0)], -1)
        return _best(ids_QK, np.where(there_QK, scores_QK, -np.inf), k)


def _best(ids_QM: np.ndarray, scores_QM: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k highest scores of each row, of equal ones those with the lower label; -1 stands last."""
    unlikely = np.where(ids_QM < 0, np.iinfo(np.int32).max, ids_QM)
    order_QK = np.lexsort((unlikely, -scores_QM), axis=1)[:, :k]
    ids_QK = np.take_along_axis(ids_QM, order_QK, axis=1).astype(np.int32)
    return ids_QK, np.take_along_axis(scores_QM, order_QK, axis=1).astype(np.float32)
