"""Builds LF-TateSubjects, a benchmark that anybody can rebuild, from Tate's collection metadata (CC0).

Queries are artworks: title, and as content artists, date, medium and group. Labels are the terms of Tate's
subject index that cataloguers gave after looking at the artwork: a leaf, and as content its two parents.
Artworks without title or subjects are left out, as are labels that no training query has. Which artworks are
test queries is listed in data_prep/tate_test.txt (15 %); artworks of equal text are on one side.

At commit a51d8afc988ed083557e2950f4d0b644e7719f4a of github.com/tategallery/collection, the last one, the set
has 50,008 training queries, 8,787 test queries and 15,113 labels. Tate asks, on goodwill, for the attribution
"Tate". There are no pictures in it.

Examples:
  git clone --depth=1 https://github.com/tategallery/collection
  python -m data_prep.tate --checkout=collection --out=raw/LF-TateSubjects
  vixml prepare --raw=raw/LF-TateSubjects --out=data/tate_subjects --name=lf_tate_subjects
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from data_prep import about
from vixml_jax import cli, files
from vixml_jax.data.formats import ABOUT
from vixml_jax.errors import UserError
from vixml_jax.progress import Progress

TEST_LIST = Path(__file__).with_name("tate_test.txt")
COUNTS = {"train": 50_008, "test": 8_787, "labels": 15_113}
CITATION = """@Misc{TateCollection,
  author = {Tate},
  title = {The Tate Collection},
  url = {https://github.com/tategallery/collection},
  year = {2014}
}"""
FILES = {"train": "trn.json.gz", "test": "tst.json.gz", "labels": "lbl.json.gz"}


class Term(NamedTuple):
    """A label; terms of equal text are one. They sort as labels are numbered."""

    parents: str
    name: str


class Artwork(NamedTuple):
    """A query.

    Attributes:
      uid: Tate's accession number.
      title: its title.
      content: artists, date, medium and group, as far as they are known.
      terms: its subjects.
    """

    uid: str
    title: str
    content: str
    terms: frozenset[Term]

    @property
    def text(self) -> str:
        """What makes two artworks equal."""
        return f"{self.title}\n{self.content}".lower()


def define_flags() -> None:
    """Registers the command's flags."""
    flags.DEFINE_string("checkout", None, "Checkout of github.com/tategallery/collection", required=True)
    flags.DEFINE_string("out", None, "Becomes a raw folder for `vixml prepare`", required=True)
    flags.DEFINE_bool("overwrite", False, "Replace the files of an earlier build in --out")


def main() -> int:
    """Runs the command."""
    values = flags.FLAGS
    counts = build(values.checkout, values.out, overwrite=values.overwrite)
    for split, count in counts.items():
        published = "" if count == COUNTS[split] else f"  (the published set has {COUNTS[split]:,})"
        print(f"{split:<8}{count:>8,}{published}")
    print(f"next: vixml prepare --raw={values.out} --out=DIR --name=lf_tate_subjects")
    return 0


def build(checkout: str | Path, out: str | Path, *, overwrite: bool = False) -> dict[str, int]:
    """Builds the set.

    Args:
      checkout: of Tate's repository.
      out: becomes a raw folder of the Extreme Classification Repository's JSON layout.
      overwrite: replace an earlier build.

    Returns:
      Rows of each split.

    Raises:
      UserError: if `checkout` is no such checkout, a file of it is broken, or `out` holds something else.
    """
    out = Path(out)
    found = {path.name for path in out.iterdir()} if out.is_dir() else set()
    strangers = found - {*FILES.values(), ABOUT}
    if strangers or (found and not overwrite):
        fix = "give another --out" if strangers else "give --overwrite to replace it"
        raise UserError("is not empty", file=out, fix=fix)
    rows = split(read(Path(checkout)), set(TEST_LIST.read_text(encoding="utf-8").split()))
    with files.atomic_dir(out) as directory:
        for name, records in rows.items():
            _write(directory / FILES[name], records)
        about.write(
            directory,
            description="Artworks of the Tate collection, and the subject terms that cataloguers gave them.",
            citation=CITATION,
            homepage="https://github.com/tategallery/collection",
            license="CC0 1.0; Tate asks for the attribution 'Tate'",
        )
    return {name: len(records) for name, records in rows.items()}


def read(checkout: Path) -> list[Artwork]:
    """Reads all artworks that have a title and subjects.

    Raises:
      UserError: naming the file, if one is no record of an artwork.
    """
    paths = sorted((checkout / "artworks").rglob("*.json"))
    if not paths:
        fix = "give --checkout the folder that `git clone` made of github.com/tategallery/collection"
        raise UserError("no artworks/**/*.json", file=checkout, fix=fix)
    artworks = []
    with Progress(len(paths), "read artworks", "files") as progress:
        for path in paths:
            artwork = _artwork(files.read_json(path), path)
            if artwork.title and artwork.terms:
                artworks.append(artwork)
            progress.update()
    return artworks


def split(artworks: Iterable[Artwork], test_uids: set[str]) -> dict[str, list[dict[str, Any]]]:
    """Makes the rows of the three files.

    Args:
      artworks: in any order.
      test_uids: those of the test split; what has the text of one of them belongs there too.
    """
    # An order that says nothing about an artwork, and is the same everywhere.
    artworks = sorted(artworks, key=lambda artwork: hashlib.sha1(artwork.uid.encode()).hexdigest())
    test_texts = {artwork.text for artwork in artworks if artwork.uid in test_uids}
    train = [artwork for artwork in artworks if artwork.text not in test_texts]
    test = [artwork for artwork in artworks if artwork.text in test_texts]
    terms = sorted({term for artwork in train for term in artwork.terms})
    number = {term: i for i, term in enumerate(terms)}
    labels = [
        {"uid": f"l{i:06d}", "title": term.name, "content": term.parents} for i, term in enumerate(terms)
    ]
    return {"train": list(_queries(train, number)), "test": list(_queries(test, number)), "labels": labels}


def _queries(artworks: list[Artwork], number: dict[Term, int]) -> Iterator[dict[str, Any]]:
    for artwork in artworks:
        targets = sorted(number[term] for term in artwork.terms if term in number)
        if targets:
            yield {
                "uid": artwork.uid,
                "title": artwork.title,
                "content": artwork.content,
                "target_ind": targets,
                "target_rel": [1.0] * len(targets),
            }


def _artwork(record: Any, path: Path) -> Artwork:
    try:
        group = (record.get("catalogueGroup") or {}).get("shortTitle") or record.get("groupTitle")
        content = [record.get(name) for name in ("all_artists", "dateText", "medium")]
        terms = frozenset(_leaves(record.get("subjects") or {}, ()))
        described = "; ".join(text for text in map(_clean, [*content, group]) if text)
        return Artwork(_clean(record["acno"]), _clean(record["title"]), described, terms)
    except (AttributeError, KeyError, TypeError, RecursionError):
        fix = "check out github.com/tategallery/collection once more"
        raise UserError("not a record of an artwork", file=path, fix=fix) from None


def _leaves(node: dict[str, Any], parents: tuple[str, ...]) -> Iterator[Term]:
    """Yields the leaves of a subject tree; its root stands for the tree as a whole and is no parent."""
    for child in node.get("children") or ():
        name = _clean(child["name"])
        if child.get("children"):
            yield from _leaves(child, (*parents, name))
        else:
            yield Term(" > ".join(parents), name)


def _clean(text: str | None) -> str:
    return " ".join((text or "").split())


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes JSON lines, gzipped without a time stamp: the same records are the same bytes."""
    with open(path, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        for record in records:
            packed.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(cli.run_job(sys.modules[__name__], "python -m data_prep.tate"))
