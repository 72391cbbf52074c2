"""Tables of one's own give what the same rows as JSON lines give."""

from __future__ import annotations

import csv
import io

import fresh
import numpy as np
import pytest
import raw_folders
from raw_folders import LABELS, TEST, TRAIN

from vixml_jax.data import formats
from vixml_jax.errors import UserError
from vixml_jax.prepare import prepare


def _table(rows: list[list[str]], delimiter: str = ",") -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _queries(rows: list[dict]) -> list[list[str]]:
    cells = [
        [row["uid"], row["title"], row["content"], "|".join(LABELS[i]["title"] for i in row["target_ind"])]
        for row in rows
    ]
    return [["uid", "title", "content", "labels"], *cells]


def _records(path) -> dict:
    folder = formats.open_raw(path)
    found = {
        split: [(row.uid, row.title, row.content, row.targets.tolist()) for row in folder.records(split)]
        for split in folder.splits
    }
    assert {split: len(rows) for split, rows in found.items()} == folder.sizes
    assert not folder.report.repaired
    return found


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_the_same_as_json_lines(tmp_path, delimiter, closed, encoding):
    lines, table = raw_folders.own_folder(tmp_path / "lines", closed=closed), tmp_path / "table"
    table.mkdir()
    tables = {"train": _queries(TRAIN), "test": _queries(TEST)}
    if closed:
        tables["labels"] = [
            ["content", "label", "uid"],
            *([x["content"], x["title"], x["uid"]] for x in LABELS),
        ]
    for name, rows in tables.items():
        (table / f"{name}.csv").write_text(_table(rows, delimiter), encoding=encoding)
    assert _records(table) == _records(lines)


def test_two_columns(tmp_path):
    """A text and a label are enough; a comma in one label is no separator there."""
    (tmp_path / "train.csv").write_text('Text,Label\n"Red shoe, left",shoes\nBlue hat,"hats, caps"\n\nA|B,\n')
    assert _records(tmp_path) == {
        "train": [("0", "Red shoe, left", "", [0]), ("1", "Blue hat", "", [1]), ("2", "A|B", "", [])],
        "labels": [("0", "shoes", "", []), ("1", "hats, caps", "", [])],
    }


def test_pictures_line_breaks_and_other_columns(tmp_path):
    (tmp_path / "1.png").write_bytes(raw_folders.picture())
    text = 'title,labels,images,price\n"two\nlines",a | b|,1.png|2.png,3\nplain,b,,4\n'
    (tmp_path / "train.csv").write_text(text)
    report = prepare(tmp_path, tmp_path.parent / "out", "mine")
    assert report["splits"]["train"]["images"] == 1
    assert report["splits"]["train"]["images_missing"] == 1
    assert report["splits"]["labels"]["rows"] == 2
    assert report["notes"] == ["train.csv: the column 'price' is not used"]


@pytest.mark.parametrize(
    ("text", "row", "problem"),
    [
        ("", 1, "no column title among none"),
        ("shoe,red\n", 1, "no column title among shoe, red"),
        ("title,colour\nshoe,red\n", 1, "no column labels"),
        ("title,text,labels\n", 1, "two columns of title"),
        ("title,labels\nshoe,red\nhat,blue,green\n", 3, "3 cells, but 2 columns"),
        ("title,labels\nshoe\n", 2, "1 cells, but 2 columns"),
        ("title,labels\n", None, "the split 'train' is empty"),
        (f"title,labels\n{'x' * 200_000},red\n", 2, "not CSV"),
    ],
)
def test_mistakes(tmp_path, text, row, problem):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(UserError, match=problem) as error:
        list(formats.open_raw(tmp_path).records("train"))
    assert (error.value.file, error.value.row) == (tmp_path / "train.csv", row)


def test_a_label_that_the_table_of_labels_lacks(tmp_path):
    (tmp_path / "train.csv").write_text("title,labels\nshoe,red|rad\n")
    (tmp_path / "labels.csv").write_text("label\nred\n")
    with pytest.raises(
        UserError, match=r"train\.csv: row 2: label 'rad' is not in labels\.csv; 'red' is near"
    ):
        _records(tmp_path)


def test_any_text_survives(tmp_path):
    """Texts of all kinds of characters, through the csv module of Python and back."""
    rng = np.random.default_rng(fresh.seeds(1)[0])
    titles = ["".join(rng.choice(list('ab",;\n|é鞋 \t'), 12)).strip() + "." for _ in range(200)]
    rows = [["title", "label"], *([title, f"x{i % 3}"] for i, title in enumerate(titles))]
    (tmp_path / "train.csv").write_bytes(_table(rows).encode())
    folder = formats.open_raw(tmp_path)
    assert [row.title for row in folder.records("train")] == [" ".join(title.split()) for title in titles]
