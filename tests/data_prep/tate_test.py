"""The Tate builder on a checkout of a few artworks, of which each shows one rule."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from data_prep import tate
from vixml_jax import cli
from vixml_jax.data import formats

SEA, TREE = ("nature", "seascapes", "sea"), ("nature", "plants", "tree")
MAN, KING = ("people", "adults", "man"), ("people", "named", "king")


def _subjects(*paths: tuple[str, ...]) -> dict:
    """Nests paths of names as Tate does, below a root."""
    root: dict = {"id": 1, "name": "subject"}
    for path in paths:
        node = root
        for name in path:
            children = node.setdefault("children", [])
            known = [child for child in children if child["name"] == name]
            if not known:
                children.append({"id": 7, "name": name})
            node = (known or children[-1:])[0]
    return root


def _artwork(uid: str, title: str | None, *paths: tuple[str, ...], **fields) -> dict:
    record = {"acno": uid, "title": title, "all_artists": "A. Painter", "dateText": "1801", "medium": None}
    return {**record, "subjects": _subjects(*paths) if paths else None, **fields}


ARTWORKS = [
    _artwork("A1", "Sea  and\ntree", SEA, TREE, medium=" Oil on  canvas "),
    _artwork("A2", "Sea", SEA, ("nature", " seascapes", "sea "), groupTitle="Sketchbook"),  # one term, twice
    _artwork("A3", "Man", MAN, catalogueGroup={"shortTitle": "Heads"}, groupTitle="Other"),
    _artwork("A4", "A king by the sea", SEA, KING),  # test: no training query has the king
    _artwork("A5", "King", KING),  # test: nothing is left of it
    _artwork("A6", "MAN", MAN, catalogueGroup={"shortTitle": None}, groupTitle="heads"),  # the text of A3
    _artwork("A7", "No subjects"),
    _artwork("A8", None, SEA),
    _artwork("A9", " ", SEA),
    _artwork("B1", "Sea, man", MAN, SEA, all_artists=None, dateText="", catalogueGroup=None),
]


@pytest.fixture
def checkout(tmp_path):
    path = tmp_path / "collection"
    for i, artwork in enumerate(ARTWORKS):
        file = path / "artworks" / "a" / f"00{i % 3}" / f"{artwork['acno'].lower()}-{i}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(artwork), encoding="utf-8")
    return path


@pytest.fixture
def test_list(tmp_path, monkeypatch):
    path = tmp_path / "test.txt"
    path.write_text("A4\nA5\nA3\n")
    monkeypatch.setattr(tate, "TEST_LIST", path)


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def _queries(path: Path) -> dict[str, tuple]:
    return {row["uid"]: (row["title"], row["content"], row["target_ind"]) for row in _lines(path)}


def test_the_rules(checkout, test_list, tmp_path, capsys):
    out = tmp_path / "raw"
    flags = [f"--checkout={checkout}", f"--out={out}"]
    assert cli.run_job(tate, "tate", flags) == 0
    assert "(the published set has 50,008)" in capsys.readouterr().out
    labels = [(row["uid"], row["title"], row["content"]) for row in _lines(out / "lbl.json.gz")]
    assert labels == [
        ("l000000", "tree", "nature > plants"),
        ("l000001", "sea", "nature > seascapes"),
        ("l000002", "man", "people > adults"),
    ]
    train = {
        row["uid"]: (row["title"], row["content"], row["target_ind"]) for row in _lines(out / "trn.json.gz")
    }
    assert train == {
        "A1": ("Sea and tree", "A. Painter; 1801; Oil on canvas", [0, 1]),
        "A2": ("Sea", "A. Painter; 1801; Sketchbook", [1]),
        "B1": ("Sea, man", "", [1, 2]),
    }
    test = {
        row["uid"]: (row["title"], row["content"], row["target_ind"]) for row in _lines(out / "tst.json.gz")
    }
    assert test == {
        "A3": ("Man", "A. Painter; 1801; Heads", [2]),
        "A4": ("A king by the sea", "A. Painter; 1801", [1]),
        "A6": ("MAN", "A. Painter; 1801; heads", [2]),
    }
    folder = formats.open_raw(out)
    assert {split: len(list(folder.records(split))) for split in folder.splits} == {
        "labels": 3,
        "train": 3,
        "test": 3,
    }
    assert not folder.report.repaired
    # The same bytes again; but only when asked, and never over something else.
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert cli.run_job(tate, "tate", flags) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.run_job(tate, "tate", [*flags, "--overwrite"]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "mine.txt").touch()
    assert cli.run_job(tate, "tate", [*flags, "--overwrite"]) == 2


def test_mistakes(checkout, tmp_path, capsys):
    out = tmp_path / "raw"
    assert cli.run_job(tate, "tate", [f"--checkout={tmp_path / 'none'}", f"--out={out}"]) == 2
    assert "git clone" in capsys.readouterr().err
    file = next((checkout / "artworks").rglob("*.json"))
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "not a record of an artwork"),
        ("{}", "not a record of an artwork"),
        ('{"acno": "A1", "title": "x", "subjects": 3}', "not a record of an artwork"),
        ('{"acno": "A1", "title": 3}', "not a record of an artwork"),
        ('{"acno": "A1", "title": "x", "subjects": {"children": [{"id": 3}]}}', "not a record"),
    ):
        file.write_text(text)
        assert cli.run_job(tate, "tate", [f"--checkout={checkout}", f"--out={out}"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error
        assert str(file) in error
    assert not out.exists()


def test_the_published_list():
    """15 % of 58,801 artworks; six of them have no label that a training query has."""
    uids = tate.TEST_LIST.read_text().split()
    assert uids == sorted(set(uids))
    assert len(uids) == tate.COUNTS["test"] + 6
