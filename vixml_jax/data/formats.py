"""Raw folders: what they may look like, and reading them record by record.

Three layouts are known, told apart by their files:

* `json`: `{trn,tst,lbl}.json[.gz]`, as the Extreme Classification Repository hands its datasets out;
* `text`: `{trn,tst,lbl}.raw.txt`, one text a line, with `{trn,tst}_X_Y.{txt,npz}`;
* `jsonl`: one's own `train.jsonl`, `test.jsonl`, `labels.jsonl` with label texts inline, or `.csv`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from vixml_jax import files
from vixml_jax.data import fields, raw_embeddings, sparse_text, text_lines
from vixml_jax.data.fields import Where
from vixml_jax.data.raw_embeddings import RawEmbeddings
from vixml_jax.data.raw_images import ImageList, ImagePath, ImageReader
from vixml_jax.data.report import Report
from vixml_jax.data.text_lines import TextFile
from vixml_jax.errors import UserError

BLANK = " \t\r\n\v\f"  # what makes a line blank
# What a raw folder is, for its dataset's card: description, citation, homepage, license; all may be missing.
ABOUT = "about.json"
# Names of the splits, and what the repository's files call them.
SHORT = {"train": "trn", "test": "tst", "labels": "lbl"}


@dataclasses.dataclass(slots=True)
class Record:
    """One row of a split.

    Attributes:
      uid: as the raw folder names it.
      title: text, cleaned.
      content: text, cleaned, often empty.
      targets: int32, increasing; the row's labels, empty in the split `labels`.
      images: pictures, in order.
      file: the file that names the pictures.
    """

    uid: str
    title: str
    content: str
    targets: np.ndarray
    images: list[ImagePath]
    file: Path


class RawFolder(abc.ABC):
    """A raw folder, gone through once: its files are whole and their sizes agree.

    `splits` must be read in its order, each one once: what a later one is checked against is known from the
    earlier ones.

    Attributes:
      layout: "json", "text" or "jsonl".
      path: the folder.
      report: takes findings while records are read.
      splits: names of the splits, in the order in which they are read.
      sizes: rows of each split; those of `labels` may be known only once it is reached.
      files: every text file that is read.
      images: reads pictures.
      embeddings: ready ones of the splits that have them.
    """

    layout: str
    splits: tuple[str, ...] = ("labels", "train", "test")

    def __init__(self, path: Path, report: Report):
        self.path, self.report = path, report
        self.sizes: dict[str, int] = {}
        self.files: list[TextFile] = []
        self._others: dict[str, str] = {}  # digests of files that are not text
        self.images = ImageReader(path, report)
        self.embeddings: dict[str, RawEmbeddings] = {}
        self._filters = {
            split: self._find(
                [f"filter_labels_{SHORT[split]}.txt", f"filter_labels_{split}.txt"], required=False
            )
            for split in ("train", "test")
        }

    @abc.abstractmethod
    def records(self, split: str) -> Iterator[Record]:
        """Yields the rows of a split in order.

        Raises:
          UserError: naming file and line, if a row cannot be used.
        """

    @property
    def num_labels(self) -> int:
        """Number of labels; final once every split before `labels` has been read."""
        return self.sizes["labels"]

    def filter_pairs(self, split: str) -> np.ndarray:
        """Reads the pairs (row, label) that evaluation leaves out, int64 [n, 2]."""
        file = self._filters[split]
        if file is None or split not in self.sizes:
            return np.zeros((0, 2), np.int64)
        pairs = sparse_text.read_filter_pairs(file.path)
        for column, (what, size) in enumerate((("row", self.sizes[split]), ("label", self.num_labels))):
            wrong = np.flatnonzero(pairs[:, column] >= size)
            if len(wrong):
                line = _line_of_pair(file, int(wrong[0]))
                problem = f"{what} {pairs[wrong[0], column]} is outside the {size} {what}s"
                raise UserError(problem, file=file.path, row=line, fix=f"{what}s are 0 to {size - 1}")
        return pairs

    def about(self) -> dict[str, str]:
        """Reads what the folder says about itself; empty if it says nothing."""
        path = self.path / ABOUT
        about = files.read_json(path) if path.is_file() else {}
        if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
            raise UserError("not an object of texts", file=path, fix='give {"description": "...", ...}')
        return about

    def digest(self) -> str:
        """SHA-256 over the names and bytes of the files read, pictures aside."""
        parts = {file.path.name: file.digest for file in self.files} | self._others
        parts |= self._embedding_digests
        return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()

    @functools.cached_property
    def _embedding_digests(self) -> dict[str, str]:
        return raw_embeddings.digest(self.embeddings)

    def _find(self, names: list[str], required: bool = True) -> TextFile | None:
        """Goes through the first of `names` that exists."""
        found = [name for name in names if (self.path / name).is_file()]
        if not found:
            if required:
                fix = f"the folder also needs {' or '.join(names)}"
                raise UserError("no such file", file=self.path / names[0], fix=fix)
            return None
        if len(found) > 1:
            self.report.note(f"both {found[0]} and {found[1]} are there: {found[0]} was read")
        known = next((file for file in self.files if file.path == self.path / found[0]), None)
        if known is not None:
            return known
        file = text_lines.scan(self.path / found[0])
        if file.not_utf8_line:
            line = file.not_utf8_line
            self.report.repair(file.path, line, "not UTF-8", "the whole file was read as latin-1")
        self.files.append(file)
        return file

    def _require(self, *names: str) -> TextFile:
        file = self._find(list(names))
        assert file is not None
        return file

    def _check_filled(self, split: str, file: TextFile) -> None:
        if not self.sizes[split]:
            problem = f"no rows: the split {split!r} is empty"
            raise UserError(problem, file=file.path, fix="give at least one row")

    def _objects(self, file: TextFile) -> Iterator[tuple[dict, Where]]:
        for line, text in file.lines():
            where = Where(file.path, line, self.report)
            if not text.strip(BLANK):
                if line < file.num_lines:
                    where.repair("a blank line", "skipped")
                continue
            yield fields.parse_object(text, where), where


class RepositoryFolder(RawFolder):
    """What the two layouts of the Extreme Classification Repository share.

    Beside the texts there may be lists of pictures, and ready embeddings of pictures.
    """

    suffixes: tuple[str, ...]

    def __init__(self, path: Path, report: Report):
        super().__init__(path, report)
        self._texts = {
            split: self._require(*(SHORT[split] + suffix for suffix in self.suffixes)) for split in SHORT
        }
        self._lists = {
            split: self._find([f"img_paths.{short}.csv"], required=False) for split, short in SHORT.items()
        }
        self.embeddings = raw_embeddings.find(path)

    def _with_images(self, split: str, rows: Iterator[Record]) -> Iterator[Record]:
        file = self._lists[split]
        if file is None:
            yield from rows
            return
        images = ImageList(file, self.report)
        for record in rows:
            record.images, record.file = images.images(record.uid), file.path
            yield record
        images.report_unused()


class JsonFolder(RepositoryFolder):
    """`{trn,tst,lbl}.json[.gz]`: a JSON object a line with `uid`, `title`, `content`, `target_ind`."""

    layout = "json"
    suffixes = (".json.gz", ".json")

    def __init__(self, path: Path, report: Report):
        super().__init__(path, report)
        for split, file in self._texts.items():
            self.sizes[split] = file.num_filled
            self._check_filled(split, file)

    def records(self, split: str) -> Iterator[Record]:
        """Yields the rows of a split in order."""
        return self._with_images(split, self._rows(split))

    def _rows(self, split: str) -> Iterator[Record]:
        none = np.zeros(0, np.int32)
        file = self._texts[split]
        for row, (record, where) in enumerate(self._objects(file)):
            targets = none if split == "labels" else fields.target_ind(record, self.num_labels, where)
            uid, title = fields.uid(record, row, where), _title(record, where)
            yield Record(uid, title, fields.content(record, where), targets, [], file.path)


class TextFolder(RepositoryFolder):
    """`{trn,tst,lbl}.raw.txt`: a text a line, content after a tab; labels in `{trn,tst}_X_Y.{txt,npz}`.

    A row's uid is its zero-based number.
    """

    layout = "text"
    suffixes = (".raw.txt",)

    def __init__(self, path: Path, report: Report):
        super().__init__(path, report)
        for split, file in self._texts.items():
            self.sizes[split] = file.num_lines
            self._check_filled(split, file)
        self._targets = {split: self._read_targets(split) for split in ("train", "test")}

    def records(self, split: str) -> Iterator[Record]:
        """Yields the rows of a split in order."""
        return self._with_images(split, self._rows(split))

    def _rows(self, split: str) -> Iterator[Record]:
        file, matrix = self._texts[split], self._targets.get(split)
        targets = np.zeros(0, np.int32)
        for line, text in file.lines():
            where = Where(file.path, line, self.report)
            title, _, content = text.partition("\t")
            if matrix is not None:
                targets = matrix.indices[matrix.indptr[line - 1] : matrix.indptr[line]]
            title, content = fields.title(title, where), fields.content({"content": content}, where)
            yield Record(str(line - 1), title, content, targets, [], file.path)

    def _read_targets(self, split: str) -> scipy.sparse.csr_matrix:
        names = [f"{SHORT[split]}_X_Y{suffix}" for suffix in (".txt", ".npz")]
        path = next((self.path / name for name in names if (self.path / name).is_file()), None)
        if path is None:
            fix = f"the folder also needs {' or '.join(names)}"
            raise UserError("no such file", file=self.path / names[0], fix=fix)
        self._others[path.name] = files.sha256(path)
        findings = sparse_text.SparseReport()
        matrix: Any = sparse_text.read_sparse(path, findings)
        for line in findings.unsorted:
            self.report.repair(path, line, "labels not in increasing order", "sorted")
        for line in findings.duplicated:
            self.report.repair(path, line, "a label named twice", "kept once")
        for size, expected, what, other in (
            (matrix.shape[0], self.sizes[split], "rows", self._texts[split]),
            (matrix.shape[1], self.sizes["labels"], "labels", self._texts["labels"]),
        ):
            if size != expected:
                raise UserError(
                    f"{size} {what}, but {other.path.name} has {expected}",
                    file=path,
                    row=1,
                    fix="both must count the same",
                )
        if (matrix.data <= 0).any():
            rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
            for row in np.unique(rows[matrix.data <= 0]):
                self.report.repair(path, int(row) + 2, "a label of relevance 0", "dropped")
            matrix.data = np.maximum(matrix.data, 0)
            matrix.eliminate_zeros()
        return matrix


def _title(record: dict, where: Where) -> str:
    if "title" not in record:
        raise where.error('no "title"', 'give a text, "" if there is none')
    return fields.title(record["title"], where)


def _line_of_pair(file: TextFile, number: int) -> int:
    filled = (line for line, text in file.lines() if text.strip())
    return next(line for i, line in enumerate(filled) if i == number)


def open_raw(path: str | os.PathLike[str]) -> RawFolder:
    """Finds out which layout a raw folder has and goes through its files once.

    Raises:
      UserError: if it has none of the known layouts, lacks a file of its layout, or a file is broken.
    """
    from vixml_jax.data.own_jsonl import OwnFolder, names_of

    path = Path(path)
    if not path.is_dir():
        raise UserError("no such folder", file=path, fix="give --raw a folder that holds the raw files")
    report = Report(path)
    markers: dict[type[RawFolder], list[str]] = {
        JsonFolder: [name + suffix for name in SHORT.values() for suffix in JsonFolder.suffixes],
        TextFolder: [name + suffix for name in SHORT.values() for suffix in TextFolder.suffixes],
        OwnFolder: [*names_of("train"), *names_of("test")],
    }
    found = [layout for layout, names in markers.items() if any((path / name).is_file() for name in names)]
    if not found:
        raise UserError(
            "no raw dataset",
            file=path,
            fix="it needs trn.json.gz, or trn.raw.txt, or train.jsonl, or train.csv, ...",
        )
    if len(found) > 1:
        names = " and ".join(layout.layout for layout in found)
        report.note(f"the folder holds the layouts {names}: {found[0].layout} was read")
    return found[0](path, report)
