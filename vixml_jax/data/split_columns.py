"""What lies beside the records of a split: text columns, labels, sizes and digests of pictures, counts."""

from __future__ import annotations

import contextlib
from array import array
from pathlib import Path

import numpy as np

from vixml_jax.data.embedding_store import DIGEST_BYTES, NOTHING
from vixml_jax.data.formats import Record
from vixml_jax.data.ragged import RaggedWriter
from vixml_jax.data.raw_images import PictureFacts
from vixml_jax.data.report import Finding

TEXT_FIELDS = ("uid", "title", "content")


class TextColumns(contextlib.ExitStack):
    """Writes what the texts of a split say, row by row.

    Args:
      directory: of the dataset.
      split: name of the split.

    Attributes:
      counts: of the rows so far.
    """

    def __init__(self, directory: Path, split: str):
        super().__init__()
        self._directory, self._split = directory, split
        columns = directory / "columns" / split
        self._texts = [self.enter_context(RaggedWriter(columns / field, np.uint8)) for field in TEXT_FIELDS]
        self._labels, self._ends = array("i"), array("q", [0])
        self.counts = {"rows": 0, "positives": 0, "rows_without_labels": 0}

    def append(self, record: Record) -> None:
        """Adds a row."""
        for writer, text in zip(self._texts, (record.uid, record.title, record.content), strict=True):
            writer.append(text.encode())
        self._labels.frombytes(np.ascontiguousarray(record.targets, np.int32).tobytes())
        self._ends.append(len(self._labels))
        self.counts["rows"] += 1
        self.counts["positives"] += len(record.targets)
        self.counts["rows_without_labels"] += not len(record.targets)

    def finish(self) -> None:
        """Writes the labels of the rows, all of which have been added."""
        if self._split == "labels":
            for name in ("positives", "rows_without_labels"):
                del self.counts[name]
            return
        indices, indptr = np.frombuffer(self._labels, np.int32), np.frombuffer(self._ends, np.int64)
        np.savez(self._directory / f"indices_{self._split}.npz", indices=indices, indptr=indptr)


class PictureColumns(contextlib.ExitStack):
    """Writes what is known of the pictures of a split, row by row.

    Args:
      directory: of the dataset.
      split: name of the split.

    Attributes:
      counts: of the rows so far.
      findings: pictures that cannot be used.
    """

    def __init__(self, directory: Path, split: str):
        super().__init__()
        columns = directory / "columns" / split
        self._sizes = self.enter_context(RaggedWriter(columns / "image_sizes", np.int64))
        self._digests = self.enter_context(RaggedWriter(columns / "image_digests", np.uint8))
        self.counts = {"rows_with_images": 0, "images": 0, "images_missing": 0}
        self.findings: list[Finding] = []

    def append(self, pictures: list[PictureFacts], findings: list[Finding]) -> None:
        """Adds a row, and what was found about its pictures."""
        self._sizes.append(np.array([picture.size for picture in pictures], np.int64))
        digests = (picture.digest[:DIGEST_BYTES] if picture.size else NOTHING for picture in pictures)
        self._digests.append(b"".join(digests))
        present = sum(1 for picture in pictures if picture.size)
        self.counts["rows_with_images"] += present > 0
        self.counts["images"] += present
        self.counts["images_missing"] += len(pictures) - present
        self.findings += findings
