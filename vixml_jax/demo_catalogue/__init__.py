"""A catalogue of products, drawn from nothing: a dataset to try everything on, without a download.

The task is that of shops' product-to-product retrieval: a query is a product's title, labels are other
products and shoppers' phrases related to it, and most on both sides have pictures. What is relevant depends
on what the title says (series, kind of thing) and on what only the picture shows (colour, pattern);
`products` says how.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vixml_jax import files
from vixml_jax.demo_catalogue import drawing, products
from vixml_jax.demo_catalogue.products import Item
from vixml_jax.errors import UserError

# Of the training queries: how many test queries there are beside them.
TEST_SHARE = 0.25


def write_raw(directory: str | os.PathLike[str], num_train: int, seed: int = 0) -> Path:
    """Writes the catalogue as a raw folder in the layout of the Extreme Classification Repository.

    The folder is what `vixml_jax.prepare.prepare` takes. The same `num_train` and `seed` give the same bytes
    in every file.

    Args:
      directory: becomes the raw folder; appears only once it is complete, and replaces an earlier one.
      num_train: number of training queries; there are a quarter as many test queries, and labels grow with it
        (3000 training queries: about 1,200 labels).
      seed: another one gives another catalogue.

    Returns:
      The folder.

    Raises:
      UserError: if `directory` holds something else, or `num_train` is less than 1.
    """
    directory = Path(directory)
    if num_train < 1:
        raise UserError(f"{num_train} training queries", fix="give at least 1")
    if directory.exists() and not _replaceable(directory):
        raise UserError(
            "holds something else than a raw folder", file=directory, fix="give another directory"
        )
    catalogue = products.make(num_train, max(1, round(TEST_SHARE * num_train)), seed)
    with files.atomic_dir(directory) as folder:
        (folder / "images").mkdir()
        drawn: set[bytes] = set()
        for number, (short, items) in enumerate(
            {"trn": catalogue.train, "tst": catalogue.test, "lbl": catalogue.labels}.items()
        ):
            _write_items(folder / f"{short}.json.gz", items, with_targets=short != "lbl")
            _write_images(folder, short, items, (seed, number), drawn)
        for short, pairs in {"trn": catalogue.filter_train, "tst": catalogue.filter_test}.items():
            lines = "".join(f"{row} {label}\n" for row, label in pairs)
            (folder / f"filter_labels_{short}.txt").write_text(lines, encoding="ascii", newline="\n")
    return directory


def _replaceable(directory: Path) -> bool:
    return directory.is_dir() and ((directory / "trn.json.gz").is_file() or not any(directory.iterdir()))


def _write_items(path: Path, items: list[Item], with_targets: bool) -> None:
    lines = []
    for item in items:
        record = {"uid": item.uid, "title": item.title, "content": ""}
        if with_targets:
            record |= {"target_ind": item.targets}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    # Without a time in it, the same lines give the same bytes.
    path.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


def _write_images(
    folder: Path, short: str, items: list[Item], key: tuple[int, ...], drawn: set[bytes]
) -> None:
    """Draws the pictures of a split and lists them; `drawn` holds what all splits have drawn so far."""
    wanted = [(row, view) for row, item in enumerate(items) for view in range(item.images)]

    def draw(place: tuple[int, int], attempt: int = 0) -> bytes:
        row, view = place
        finish = items[row].finish
        assert finish is not None  # phrases have no pictures
        rng = np.random.default_rng((*key, row, view, attempt))
        return drawing.draw(items[row].thing, finish.colour, finish.pattern, view, rng)

    def look(place: tuple[int, int]) -> tuple:
        item = items[place[0]]
        return item.thing, item.finish, place

    # Products that look alike one after the other: the art they are taken from is kept for a while only.
    # Each picture has its own key, so that their order plays no part in what they show.
    in_turn = sorted(wanted, key=look)
    with ThreadPoolExecutor(2) as pool:  # much of Pillow's work is done outside Python's lock
        for place, picture in zip(in_turn, pool.map(draw, in_turn), strict=True):
            attempt = 0
            while (digest := hashlib.sha256(picture).digest()) in drawn:  # no picture lies in two places
                attempt += 1
                picture = draw(place, attempt)
            drawn.add(digest)
            (folder / _path(short, *place)).write_bytes(picture)
    listing = io.StringIO()
    table = csv.writer(listing, lineterminator="\n")
    table.writerow(("uid", "path"))
    table.writerows((items[row].uid, _path(short, row, view)) for row, view in wanted)
    (folder / f"img_paths.{short}.csv").write_text(listing.getvalue(), encoding="ascii", newline="\n")


def _path(short: str, row: int, view: int) -> str:
    return f"images/{short}-{row:06d}-{view + 1}.png"
