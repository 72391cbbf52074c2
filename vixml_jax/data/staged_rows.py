"""Rows on their way to those who read pictures, and what these say of them: files of JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from vixml_jax import files
from vixml_jax.data.formats import Record
from vixml_jax.data.raw_images import ImagePath, PictureFacts
from vixml_jax.data.report import Finding


def write_rows(path: Path, records: Iterable[Record]) -> None:
    """Writes rows; `read_rows` reads them."""
    with files.atomic_file(path, "w") as file:
        for record in records:
            named_by = os.path.abspath(record.file)  # readers may be in another directory
            targets = record.targets.tolist()
            row = (record.uid, record.title, record.content, targets, record.images, named_by)
            file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> Iterator[Record]:
    """Yields the rows that `write_rows` wrote."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            uid, title, content, targets, images, named_by = json.loads(line)
            paths = [ImagePath(*image) for image in images]
            yield Record(uid, title, content, np.asarray(targets, np.int32), paths, Path(named_by))


class RowFacts(NamedTuple):
    """What is known of a row that has been written.

    Attributes:
      num_bytes: of its record.
      pictures: in order.
      findings: about its pictures.
    """

    num_bytes: int
    pictures: list[PictureFacts]
    findings: list[Finding]


def write_facts(file: IO[str], facts: RowFacts) -> None:
    """Writes the facts of one row; `read_facts` reads those of all."""
    pictures = [(picture.size, picture.digest.hex()) for picture in facts.pictures]
    file.write(json.dumps((facts.num_bytes, pictures, facts.findings)) + "\n")


def read_facts(path: Path) -> Iterator[RowFacts]:
    """Yields the facts of every row of a file, in order."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            num_bytes, pictures, findings = json.loads(line)
            facts = [PictureFacts(size, bytes.fromhex(digest)) for size, digest in pictures]
            yield RowFacts(num_bytes, facts, [Finding(*finding) for finding in findings])
