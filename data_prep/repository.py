"""Archives of the Extreme Classification Repository into raw folders that `vixml prepare` reads.

Two kinds are about. The one with raw texts holds {trn,tst,lbl}.json[.gz], which are taken as they are. The
other, of MM-AmazonTitles-300K among them, holds raw_data/{train,test,label}.raw.txt with a line `uid->text` a
row, and the labels in {trn,tst}_X_Y.txt; it becomes JSON lines, so that uids are kept and pictures find their
rows.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import archives
from vixml_jax import files
from vixml_jax.data import sparse_text, text_lines
from vixml_jax.errors import UserError
from vixml_jax.progress import Progress

FILTERS = ("filter_labels_train.txt", "filter_labels_test.txt")
JSON_NAMES = tuple(f"{split}.json{suffix}" for split in ("trn", "tst", "lbl") for suffix in (".gz", ""))
# Of the second kind: what each becomes, and where its labels are.
TEXTS = {
    "trn": ("train.raw.txt", "trn_X_Y.txt"),
    "tst": ("test.raw.txt", "tst_X_Y.txt"),
    "lbl": ("label.raw.txt", ""),
}
ARROW = "->"
# MUFIN's list of pictures: uid, tab, address; `data_prep.images` reads it.
URL_LIST = "img.urls.txt"


def unpack(archive: Path, directory: Path, max_bytes: float) -> None:
    """Makes the files of a raw folder from an archive with texts, of either kind.

    Args:
      archive: a zip file.
      directory: an existing one, to which nothing else is written.
      max_bytes: of all that is unpacked.

    Raises:
      UserError: if it holds no such texts, or a row of them cannot be used.
    """
    names = archives.names(archive)
    extras = {name: name for name in (*FILTERS, URL_LIST)}
    if {"trn.json", "trn.json.gz"} & names:
        found = archives.unpack(archive, {name: name for name in JSON_NAMES} | extras, directory, max_bytes)
        _require(archive, found, {f"{short}.json" for short in TEXTS})
        return
    if "train.raw.txt" not in names:
        problem = f"neither trn.json.gz nor train.raw.txt among {', '.join(sorted(names)[:8]) or 'nothing'}"
        raise UserError(problem, file=archive, fix="give --text_url the archive with raw texts")
    wanted = {name: name for pair in TEXTS.values() for name in pair if name}
    found = archives.unpack(archive, wanted | extras, directory, max_bytes)
    _require(archive, found, set(wanted))
    for short, (text, labels) in TEXTS.items():
        try:
            convert(directory / text, directory / labels if labels else None, directory / f"{short}.json.gz")
        except UserError as error:
            # Named by the archive: what was unpacked from it will be gone.
            inside = archive / Path(error.file or "").name
            raise UserError(error.problem, file=inside, row=error.row, fix=error.fix) from None
    for name in wanted:
        (directory / name).unlink()


def unpack_filters(archive: Path, directory: Path, max_bytes: float) -> set[str]:
    """Takes the filter files out of an archive; returns which it had."""
    return archives.unpack(archive, {name: name for name in FILTERS}, directory, max_bytes)


def convert(texts: Path, labels: Path | None, out: Path) -> None:
    """Writes JSON lines, gzipped, from lines `uid->text` and a matrix of labels.

    Raises:
      UserError: naming the line that cannot be used, or files that do not fit.
    """
    file = text_lines.scan(texts)
    matrix: Any = None if labels is None else sparse_text.read_sparse(labels)
    if matrix is not None and matrix.shape[0] != file.num_lines:
        problem = f"{matrix.shape[0]:,} rows, but {texts.name} has {file.num_lines:,}"
        raise UserError(problem, file=labels, row=1, fix="both must count the same")
    with (
        files.atomic_file(out) as file_out,
        gzip.GzipFile("", "wb", compresslevel=6, fileobj=file_out, mtime=0) as packed,
        Progress(file.num_lines, f"convert {texts.name}") as progress,
    ):
        for row, (uid, text) in enumerate(_pairs(file)):
            record: dict = {"uid": uid, "title": text, "content": ""}
            if matrix is not None:
                span = slice(matrix.indptr[row], matrix.indptr[row + 1])
                relevant = np.sort(matrix.indices[span][matrix.data[span] > 0])
                record["target_ind"] = relevant.tolist()
            packed.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            progress.update()


def _require(archive: Path, found: set[str], needed: set[str]) -> None:
    """Raises UserError for a file that an archive lacks, gzipped or not."""
    for missing in sorted(needed - {name.removesuffix(".gz") for name in found}):
        raise UserError(f"holds no {missing}", file=archive, fix="give --text_url the whole archive")


def _pairs(file: text_lines.TextFile) -> Iterator[tuple[str, str]]:
    for number, line in file.lines():
        uid, arrow, text = line.partition(ARROW)
        if not arrow or not uid.strip():
            problem = f"no uid before {ARROW!r}"
            raise UserError(problem, file=file.path, row=number, fix=f"a line is: uid{ARROW}text")
        yield uid.strip(), text.strip()
