"""The TFDS dataset that a raw folder becomes, and the arrays that lie beside it.

TFDS runs without TensorFlow here, with ArrayRecord files. Pictures are stored as the bytes of their files,
undecoded: they are read once, by the frozen vision tower, and decoding them here would only make them larger.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

from vixml_jax.data.ahead import mapped_ahead
from vixml_jax.data.formats import RawFolder, Record
from vixml_jax.data.raw_images import ImageReader, PictureFacts, RawPicture
from vixml_jax.data.report import Finding
from vixml_jax.data.split_columns import PictureColumns, TextColumns
from vixml_jax.errors import UserError
from vixml_jax.progress import Progress

VERSION = "1.0.0"
# Rows whose pictures a thread reads at a time: text-only rows should not cost a task each.
ROWS_PER_TASK = 16


def features() -> tfds.features.FeaturesDict:
    """Returns the features of every split.

    `targets`: int32, the row's labels, increasing, empty in the split `labels`. `images`: the encoded bytes
    of the row's pictures, in order, b"" for one whose file is missing.
    """
    return tfds.features.FeaturesDict(
        {
            "uid": tfds.features.Text(),
            "title": tfds.features.Text(),
            "content": tfds.features.Text(),
            "targets": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "images": tfds.features.Sequence(tfds.features.Tensor(shape=(), dtype=np.object_)),
        }
    )


with registered.skip_registration():

    class XmcBuilder(tfds.core.GeneratorBasedBuilder):
        """Builds the TFDS dataset of a raw folder.

        Args:
          folder: the raw folder.
          columns: where the columns and matrices that lie beside the dataset are written.
          name: the dataset's name; letters, digits and underscores.
        """

        VERSION = tfds.core.Version(VERSION)
        code_path = None  # nothing is downloaded, so TFDS need not look for checksums beside the code

        def __init__(self, *, folder: RawFolder, columns: Path, name: str, **kwargs: Any):
            vars(self)["name"] = name  # TFDS means it to be the class's; ours is known only now
            self._folder, self._columns = folder, columns
            self.counts: dict[str, dict[str, int]] = {}
            self.image_digest = hashlib.sha256()
            self.picture_findings: list[Finding] = []
            super().__init__(**kwargs)

        def _info(self) -> tfds.core.DatasetInfo:
            # Rows keep their order: predictions, filter pairs and label indices go by row number.
            about = self._folder.about()
            return tfds.core.DatasetInfo(
                builder=self,
                description=about.get(
                    "description", "Queries, labels and their pictures, prepared by vixml."
                ),
                citation=about.get("citation"),
                homepage=about.get("homepage"),
                license=about.get("license"),
                features=features(),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
            del dl_manager
            return {split: self._generate_examples(split) for split in self._folder.splits}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            folder = self._folder
            with (
                TextColumns(self._columns, split) as texts,
                PictureColumns(self._columns, split) as columns,
                Progress(folder.sizes[split], f"prepare {split}") as progress,
            ):
                rows = with_pictures(folder.records(split), folder.images, check=True)
                for row, (record, pictures) in enumerate(rows):
                    texts.append(record)
                    self._add_pictures(
                        columns,
                        [picture.facts for picture in pictures],
                        folder.images.findings(record.images, record.file, pictures),
                    )
                    progress.update()
                    yield row, example(record, pictures)
                texts.finish()
            self._end_split(split, texts, columns)

        def _add_pictures(
            self, columns: PictureColumns, pictures: list[PictureFacts], findings: list[Finding]
        ) -> None:
            """Takes the pictures of the next row."""
            columns.append(pictures, findings)
            for picture in pictures:
                self.image_digest.update(picture.digest)

        def _end_split(self, split: str, texts: TextColumns, columns: PictureColumns) -> None:
            """Takes what was counted and found in a split."""
            self.counts[split] = {**texts.counts, **columns.counts}
            self.picture_findings += columns.findings


def example(record: Record, pictures: list[RawPicture]) -> dict[str, Any]:
    """Returns a row as the dataset holds it; see `features`."""
    return {
        "uid": record.uid,
        "title": record.title,
        "content": record.content,
        "targets": record.targets,
        "images": [picture.data for picture in pictures],
    }


def write(
    folder: RawFolder, directory: Path, name: str, make: Callable[..., XmcBuilder]
) -> tuple[dict[str, dict[str, int]], str]:
    """Writes a raw folder as a TFDS dataset, with columns and matrices beside it.

    Args:
      folder: the raw folder, not yet read.
      directory: an existing directory; `tfds.builder_from_directory` then reads it.
      name: the dataset's name.
      make: makes the TFDS builder out of the arguments of `XmcBuilder`.

    Returns:
      The counts of each split, and the SHA-256 of its pictures, in hex.

    Raises:
      UserError: if a row of the raw folder cannot be used.
    """
    work = directory / ".building"
    builder = make(
        folder=folder,
        columns=directory,
        name=tfds_name(name),
        data_dir=os.fspath(work),
        file_format="array_record",
    )
    with _quiet():
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    # After those of all texts: when and where pictures are read must not show.
    folder.report.rejected += builder.picture_findings
    # TFDS lays a dataset out as name/version; ours is a directory of its own.
    for file in Path(builder.data_dir).iterdir():
        os.replace(file, directory / file.name)
    shutil.rmtree(work)
    for split in ("train", "test"):
        _write_targets(directory, split, builder.counts, folder.num_labels)
        np.save(directory / f"filter_pairs_{split}.npy", folder.filter_pairs(split), allow_pickle=False)
    return builder.counts, builder.image_digest.hexdigest()


def image_digest(folder: RawFolder) -> str:
    """Returns the SHA-256 of a folder's pictures as `write` computes it, without writing anything."""
    digest = hashlib.sha256()
    for split in folder.splits:
        for _, pictures in with_pictures(folder.records(split), folder.images, check=False):
            for picture in pictures:
                digest.update(picture.digest)
    return digest.hexdigest()


def with_pictures(
    records: Iterator[Record], images: ImageReader, *, check: bool
) -> Iterator[tuple[Record, list[RawPicture]]]:
    """Yields rows with their pictures, which threads read some rows ahead, and check.

    Args:
      records: the rows.
      images: reads pictures of their folder.
      check: whether each picture is decoded, to see whether it can be.
    """

    def chunks() -> Iterator[list[Record]]:
        while chunk := list(itertools.islice(records, ROWS_PER_TASK)):
            yield chunk

    def read(chunk: list[Record]) -> list[tuple[Record, list[RawPicture]]]:
        return [(record, images.read(record.images, check=check)) for record in chunk]

    for chunk in mapped_ahead(read, chunks(), per_thread=2):
        yield from chunk


def tfds_name(name: str) -> str:
    """Makes a dataset's name one that TFDS takes."""
    cleaned = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if not cleaned:
        raise UserError(f"{name!r} is no name", fix="give --name letters and digits")
    return cleaned if cleaned[0].isalpha() else f"xmc_{cleaned}"


def _write_targets(directory: Path, split: str, counts: dict[str, dict[str, int]], num_labels: int) -> None:
    """Writes the relevance matrix; a split that the folder lacks has no rows."""
    raw = directory / f"indices_{split}.npz"
    indices, indptr = np.zeros(0, np.int32), np.zeros(1, np.int64)
    if split in counts:
        with np.load(raw, allow_pickle=False) as arrays:
            indices, indptr = arrays["indices"], arrays["indptr"]
        raw.unlink()
    matrix = scipy.sparse.csr_matrix(
        (np.ones(len(indices), np.float32), indices, indptr), shape=(len(indptr) - 1, num_labels)
    )
    scipy.sparse.save_npz(directory / f"targets_{split}.npz", matrix, compressed=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences TFDS: its own bars and messages; ours go to the error stream."""
    logger = logging.getLogger("absl")
    level = logger.level
    tfds.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        tfds.enable_progress_bar()
