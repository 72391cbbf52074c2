"""Small pictures of labels for the start page: a label's own, else that of one of its training queries."""

from __future__ import annotations

import functools
import io
import threading

import numpy as np
import scipy.sparse

from vixml_jax.data import pictures
from vixml_jax.data.dataset import XmcDataset
from vixml_jax.label_changes import LabelChanges

SIZE = 240
# Thumbnails kept: some 10 kB each.
KEPT = 2048
# Training queries looked at for a picture.
QUERIES = 20


class LabelPictures:
    """Thumbnails by label number, made when they are first asked for.

    Args:
      dataset: the run's dataset.
      changes: labels that changed after training.
    """

    def __init__(self, dataset: XmcDataset, changes: LabelChanges):
        self._dataset, self._changes = dataset, changes
        self._lock = threading.Lock()  # the dataset's reader serves one at a time
        self._thumbnail = functools.lru_cache(maxsize=KEPT)(self._make)

    def thumbnail(self, number: int) -> bytes | None:
        """Returns a JPEG of at most SIZE x SIZE; None for no such label, or one without any picture."""
        if not 0 <= number < self._changes.total:
            return None
        return self._thumbnail(number)

    def _make(self, number: int) -> bytes | None:
        with self._lock:
            found = self._of_label(number)
            if found is None and number < self._changes.num_known:
                found = self._of_a_query(number)
            return found

    def _of_label(self, number: int) -> bytes | None:
        change = self._changes.by_number.get(number)
        if change is not None:
            return None if change.removed else _first(self._changes.pictures(change))
        return _first(self._dataset.labels.images[number])

    def _of_a_query(self, number: int) -> bytes | None:
        targets = self._queries_of_labels
        rows = targets.indices[targets.indptr[number] : targets.indptr[number + 1]]
        counts = self._dataset.train.images.counts()[rows]
        for row in rows[counts > 0][:QUERIES]:
            if (found := _first(self._dataset.train.images[int(row)])) is not None:
                return found
        return None

    @functools.cached_property
    def _queries_of_labels(self) -> scipy.sparse.csc_matrix:
        """The targets by label, without their values: the smallest form of them."""
        targets = self._dataset.train_targets
        ones = np.ones(targets.nnz, np.bool_)
        return scipy.sparse.csc_matrix(
            scipy.sparse.csr_matrix((ones, targets.indices, targets.indptr), shape=targets.get_shape())
        )


def _first(images: list) -> bytes | None:
    """The first picture that can be read, as a small JPEG."""
    for picture in images:
        if (image := pictures.decode(picture)) is not None:
            image.thumbnail((SIZE, SIZE))
            file = io.BytesIO()
            image.save(file, "JPEG", quality=82)
            return file.getvalue()
    return None
