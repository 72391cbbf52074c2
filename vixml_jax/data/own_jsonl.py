"""Raw folders of one's own making: JSON lines, or tables, with label texts and picture paths inline."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vixml_jax.data import fields, own_csv
from vixml_jax.data.fields import Where
from vixml_jax.data.formats import RawFolder, Record
from vixml_jax.data.raw_images import ImagePath
from vixml_jax.data.report import Report
from vixml_jax.data.text_lines import TextFile
from vixml_jax.errors import UserError


def names_of(split: str) -> list[str]:
    """Returns what the file of a split may be called."""
    return [f"{split}.jsonl", f"{split}.csv"]


class OwnFolder(RawFolder):
    """`train.jsonl`, and if they are there `test.jsonl` and `labels.jsonl`; each may be a `.csv` instead.

    Without `labels.jsonl` the labels are all texts seen in train, then in test, in the order of appearance;
    with it they are its rows, and a row may name them by title or by uid.
    """

    layout = "jsonl"

    def __init__(self, path: Path, report: Report):
        super().__init__(path, report)
        self._texts: dict[str, TextFile] = {"train": self._require(*names_of("train"))}
        for split in ("test", "labels"):
            file = self._find(names_of(split), required=False)
            if file is not None:
                self._texts[split] = file
        for split, file in self._texts.items():
            self.sizes[split] = self._count(split, file)
            self._check_filled(split, file)
        self.sizes.setdefault("labels", 0)
        queries = ("train", "test") if "test" in self._texts else ("train",)
        self._closed = "labels" in self._texts
        self.splits = ("labels", *queries) if self._closed else (*queries, "labels")
        self._numbers: dict[str, int] = {}
        self._by_uid: dict[str, int] = {}

    def records(self, split: str) -> Iterator[Record]:
        """Yields the rows of a split in order."""
        if split == "labels" and not self._closed:
            yield from self._seen_labels()
            return
        file = self._texts[split]
        for row, (record, where) in enumerate(self._rows(split, file)):
            uid, title = fields.uid(record, row, where), fields.title(record.get("title", ""), where)
            targets = np.zeros(0, np.int32)
            if split == "labels":
                self._add_label(row, uid, title, where)
            else:
                targets = self._targets(record, where)
            paths = fields.texts_of(record, "images", where, fields.IMAGES_FIX)
            images = [ImagePath(path, where.line) for path in paths]
            yield Record(uid, title, fields.content(record, where), targets, images, file.path)

    def _rows(self, split: str, file: TextFile) -> Iterator[tuple[dict, Where]]:
        if file.path.suffix == ".csv":
            return own_csv.rows(file, self.report, of_labels=split == "labels")
        return self._objects(file)

    def _count(self, split: str, file: TextFile) -> int:
        if file.path.suffix == ".csv":
            return own_csv.count(file, of_labels=split == "labels")
        return file.num_filled

    def _add_label(self, row: int, uid: str, title: str, where: Where) -> None:
        if not title:
            raise where.error("a label without a title", "give the text that rows name it by")
        if self._numbers.setdefault(title, row) != row:
            where.repair(f"the label {title!r} stands twice", "rows that name it mean the first one")
        self._by_uid.setdefault(uid, row)

    def _targets(self, record: dict, where: Where) -> np.ndarray:
        numbers = [self._number(text, where) for text in fields.label_texts(record, where)]
        return np.unique(np.asarray(numbers, np.int32))

    def _number(self, text: str, where: Where) -> int:
        if not self._closed:
            number = self._numbers.setdefault(text, len(self._numbers))
            self.sizes["labels"] = len(self._numbers)
            return number
        number = self._numbers.get(text, self._by_uid.get(text))
        if number is None:
            near = difflib.get_close_matches(text, list(self._numbers)[:100_000], n=1)
            hint = f"{near[0]!r} is near; " if near else ""
            raise where.error(
                f"label {text!r} is not in {self._texts['labels'].path.name}",
                f"{hint}add it there, or delete that file to take every label that is seen",
            )
        return number

    def _seen_labels(self) -> Iterator[Record]:
        if not self._numbers:
            raise UserError(
                "no row has a label", file=self._texts["train"].path, fix='give "labels": ["red", "shoe"]'
            )
        none = np.zeros(0, np.int32)
        for number, text in enumerate(self._numbers):
            yield Record(str(number), text, "", none, [], self._texts["train"].path)
