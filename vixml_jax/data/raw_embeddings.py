"""Ready embeddings of pictures in a raw folder, as the public ViXML release ships them.

`trn_embs_imgs_3_1152_siglip2.npy` has the embeddings of all pictures, float [M, V]; `trn_imgs_384_3_map.npy`
says which of them are whose: an object array with a list of rows for every query or label, -1 where there is
no picture. The same for `tst` and `lbl`; the release's scripts also write `train`, `test` and `labels`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np

from vixml_jax import files, npy
from vixml_jax.data.image_bank import dense_slots
from vixml_jax.data.inert_pickle import load_lists
from vixml_jax.data.report import Report
from vixml_jax.errors import UserError
from vixml_jax.progress import Progress

NAMES = {"labels": ("lbl", "labels"), "train": ("trn", "train"), "test": ("tst", "test")}
ROWS, SLOTS = "rows.npy", "slots.npy"
# Read, converted and hashed so much at a time.
CHUNK_BYTES = 64 << 20


class RawEmbeddings:
    """The embeddings of a split's pictures.

    Args:
      rows: file of the embeddings.
      row_map: file that says which are whose.

    Raises:
      UserError: if `rows` is no float array [M, V].
    """

    def __init__(self, rows: Path, row_map: Path):
        self.files = (rows, row_map)
        self._rows = npy.load(rows, fix="it may be cut off")
        if self._rows.ndim != 2 or self._rows.dtype.kind != "f" or not self._rows.shape[1]:
            raise UserError(
                f"an array of {self._rows.dtype} and shape {self._rows.shape}",
                file=rows,
                fix="embeddings are floating-point numbers, a row a picture",
            )

    @property
    def dim(self) -> int:
        """V, size of an embedding."""
        return self._rows.shape[1]

    def write(self, directory: Path, num_rows: int, report: Report) -> int:
        """Writes what a prepared dataset keeps: bits of bfloat16 embeddings, and the rows of every item.

        Args:
          directory: made; gets ROWS, uint16 [M, V], and SLOTS, int32 [N, I] with -1 where there is none.
          num_rows: N, rows of the split.
          report: takes embeddings that are not finite; they count as missing.

        Returns:
          How many of the N rows have a picture.

        Raises:
          UserError: if the map is broken, or does not fit the embeddings or the split.
        """
        rows_file, map_file = self.files
        values, lengths = load_lists(map_file)
        if len(lengths) != num_rows:
            raise UserError(
                f"{len(lengths):,} entries, but the split has {num_rows:,} rows",
                file=map_file,
                fix="it must have an entry for every row",
            )
        items = np.repeat(np.arange(num_rows), lengths)
        wrong = np.flatnonzero((values < -1) | (values >= len(self._rows)))
        if len(wrong):
            raise UserError(
                f"names row {values[wrong[0]]:,} of {len(self._rows):,} embeddings",
                file=map_file,
                row=int(items[wrong[0]]),
                fix=f"rows of {rows_file.name} count from 0; -1 stands for none",
            )
        directory.mkdir(parents=True)
        is_finite = self._write_rows(directory / ROWS)
        broken = (values >= 0) & ~is_finite[np.maximum(values, 0)] if len(values) else values < 0
        for place in np.flatnonzero(broken):
            report.reject(
                map_file, int(items[place]) + 1, "an embedding that is not finite", "counted as missing",
                name=f"{rows_file.name}, row {values[place]}",
            )  # fmt: skip
        slots = dense_slots(np.where(broken, -1, values), lengths)
        np.save(directory / SLOTS, slots, allow_pickle=False)
        return int((slots[:, 0] >= 0).sum())

    def _write_rows(self, file: Path) -> np.ndarray:
        """Writes the embeddings; returns which of them are finite, bool [M]."""
        is_finite = np.ones(len(self._rows), bool)
        step = max(CHUNK_BYTES // self._rows[:1].nbytes, 1) if len(self._rows) else 1
        with (
            files.atomic_file(file) as target,
            Progress(len(self._rows), f"copy {self.files[0].name}") as progress,
        ):
            header = {"descr": "<u2", "fortran_order": False, "shape": self._rows.shape}
            np.lib.format.write_array_header_1_0(target, header)
            for start in range(0, len(self._rows), step):
                part = self._rows[start : start + step].astype(np.float32)
                is_finite[start : start + step] = np.isfinite(part).all(axis=1)
                target.write(part.astype(ml_dtypes.bfloat16).tobytes())
                progress.update(len(part))
        return is_finite


def find(folder: Path) -> dict[str, RawEmbeddings]:
    """Finds the embeddings that a raw folder has, by split.

    Raises:
      UserError: if there are several for one split, one without its map, or sizes that differ.
    """
    found: dict[str, RawEmbeddings] = {}
    for split, names in NAMES.items():
        rows = _matching(folder, [f"{name}_embs_imgs_*.npy" for name in names])
        if rows is None:
            continue
        row_map = _matching(folder, [f"{name}_*map.npy" for name in names])
        if row_map is None:
            fix = f"the folder also needs {names[0]}_imgs_*_map.npy"
            raise UserError("no map says which row is whose", file=rows, fix=fix)
        found[split] = RawEmbeddings(rows, row_map)
    if len({embeddings.dim for embeddings in found.values()}) > 1:
        sizes = ", ".join(f"{each.dim} in {each.files[0].name}" for each in found.values())
        raise UserError(f"embeddings of different sizes: {sizes}", file=folder, fix="give those of one tower")
    return found


def digest(embeddings: dict[str, RawEmbeddings]) -> dict[str, str]:
    """SHA-256 of every file, in hex, by name."""
    digests = {}
    paths = [path for each in embeddings.values() for path in each.files]
    total = sum(path.stat().st_size for path in paths) >> 20
    if not paths:
        return {}
    with Progress(total, "read embeddings", "MB") as progress:
        for path in paths:
            whole, size = hashlib.sha256(), 0
            with open(path, "rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    whole.update(chunk)
                    progress.update(((size + len(chunk)) >> 20) - (size >> 20))
                    size += len(chunk)
            digests[path.name] = whole.hexdigest()
    return digests


def _matching(folder: Path, patterns: list[str]) -> Path | None:
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"several files for one split: {names}", file=folder, fix="keep one of them there")
    return found[0] if found else None
