from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import raw_folders
import scipy.sparse
from raw_folders import LABELS, TEST, TRAIN, image_list, json_folder, own_folder, picture, text_folder

from vixml_jax.data.formats import open_raw
from vixml_jax.errors import UserError


def read(path):
    """All records of a folder by split, and the folder."""
    folder = open_raw(path)
    return {split: list(folder.records(split)) for split in folder.splits}, folder


def findings(folder):
    return [(f.file, f.line, f.problem) for f in (*folder.report.repaired, *folder.report.rejected)]


def fatal(path):
    """The error of a folder that cannot be used."""
    with pytest.raises(UserError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("make", [json_folder, text_folder, own_folder])
def test_every_layout_gives_the_same_rows(tmp_path, make):
    splits, folder = read(make(tmp_path))
    for split, rows in (("train", TRAIN), ("test", TEST), ("labels", LABELS)):
        assert [r.title for r in splits[split]] == [row["title"] for row in rows]
        assert [r.content for r in splits[split]] == [" ".join(row["content"].split()) for row in rows]
        assert [r.targets.tolist() for r in splits[split]] == [row.get("target_ind", []) for row in rows]
        assert all(r.targets.dtype == np.int32 for r in splits[split])
        expected = [str(i) for i in range(len(rows))] if make is text_folder else [row["uid"] for row in rows]
        assert [r.uid for r in splits[split]] == expected
        assert folder.sizes[split] == len(rows)
    assert not findings(folder)
    assert not folder.report.notes


def test_files_may_be_packed_or_not_whatever_they_are_called(tmp_path):
    json_folder(tmp_path, packed=False)
    (tmp_path / "lbl.json").write_bytes(gzip.compress((tmp_path / "lbl.json").read_bytes()))
    assert [r.title for r in read(tmp_path)[0]["labels"]] == [label["title"] for label in LABELS]


def test_npz_targets(tmp_path):
    text_folder(tmp_path)
    (tmp_path / "trn_X_Y.txt").unlink()
    matrix = np.zeros((4, 3))
    matrix[0, 2] = matrix[3, 0] = 1
    scipy.sparse.save_npz(tmp_path / "trn_X_Y.npz", scipy.sparse.csr_matrix(matrix))
    assert [r.targets.tolist() for r in read(tmp_path)[0]["train"]] == [[2], [], [], [0]]


def test_labels_seen_make_the_label_set(tmp_path):
    own_folder(tmp_path, closed=False)
    splits, folder = read(tmp_path)
    assert folder.splits == ("train", "test", "labels")
    assert [r.title for r in splits["labels"]] == ["red", "shoe", "naïve art"]
    assert [r.targets.tolist() for r in splits["test"]] == [[1], [0, 2]]


def test_test_rows_are_optional_in_own_files(tmp_path):
    own_folder(tmp_path)
    (tmp_path / "test.jsonl").unlink()
    splits, _ = read(tmp_path)
    assert set(splits) == {"labels", "train"}


def test_labels_go_by_title_or_uid(tmp_path):
    own_folder(tmp_path)
    raw_folders.write_lines(tmp_path / "train.jsonl", [{"uid": "a", "title": "x", "labels": ["l2", "red"]}])
    assert read(tmp_path)[0]["train"][0].targets.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"title": "x", "target_ind": [3]}, "label index 3 is outside the 3 labels"),
        ({"title": "x", "target_ind": [-1]}, "label index -1"),
        ({"title": "x", "target_ind": [True]}, "truth value true"),
        ({"title": "x", "target_ind": ["1"]}, "the text '1'"),
        ({"title": "x", "target_ind": [1.0]}, "the number 1.0"),
        ({"title": "x", "target_ind": 1}, '"target_ind" is the number 1'),
        ({"title": "x"}, 'no "target_ind"'),
        ({"title": "x", "target_ind": [0, 1], "target_rel": [1.0]}, "target_rel"),
        ({"title": "x", "target_ind": [0], "target_rel": ["a"]}, "target_rel"),
        ({"title": 7, "target_ind": []}, '"title" is the number 7'),
        ({"title": None, "target_ind": []}, '"title" is null'),
        ({"target_ind": []}, 'no "title"'),
        ({"title": "x", "content": ["y"], "target_ind": []}, '"content" is a list'),
        ({"uid": {}, "title": "x", "target_ind": []}, '"uid" is an object'),
        ('{"title": "x"', "not valid JSON"),
        ('["x"]', "not a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"uid": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_a_bad_json_row_is_named(tmp_path, record, problem):
    json_folder(tmp_path, trn=[TRAIN[0], record, TRAIN[1]])
    error = fatal(tmp_path)
    assert problem in str(error)
    assert (error.file.name, error.row) == ("trn.json.gz", 2)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"title": "x", "labels": ["rad"]}, "'rad' is not in labels.jsonl; 'red' is near"),
        ({"title": "x", "labels": [1]}, '"labels" holds the number 1'),
        ({"title": "x", "labels": "red"}, '"labels" is the text'),
        ({"title": "x"}, 'no "labels"'),
        ({"title": "x", "labels": [], "images": "a.png"}, '"images" is the text'),
        ({"title": [], "labels": []}, '"title" is a list'),
    ],
)
def test_a_bad_row_of_own_files_is_named(tmp_path, record, problem):
    own_folder(tmp_path)
    raw_folders.write_lines(tmp_path / "train.jsonl", [{"title": "ok", "labels": []}, record])
    error = fatal(tmp_path)
    assert problem in str(error)
    assert (error.file.name, error.row) == ("train.jsonl", 2)


def test_own_files_without_any_label(tmp_path):
    raw_folders.write_lines(tmp_path / "train.jsonl", [{"title": "ok", "labels": []}])
    assert "no row has a label" in str(fatal(tmp_path))


def test_own_labels_need_titles(tmp_path):
    own_folder(tmp_path)
    raw_folders.write_lines(tmp_path / "labels.jsonl", [LABELS[0], {"uid": "l1", "title": " "}])
    assert fatal(tmp_path).row == 2


@pytest.mark.parametrize("name", ["trn", "tst", "lbl"])
def test_a_truncated_gzip_file_is_named(tmp_path, name):
    rng = np.random.default_rng(0)
    rows = [{"uid": str(i), "title": str(rng.random()), "target_ind": []} for i in range(300)]
    json_folder(tmp_path, **{name: rows})
    file = tmp_path / f"{name}.json.gz"
    file.write_bytes(file.read_bytes()[:-20])
    error = fatal(tmp_path)
    assert error.file.name == file.name
    assert "gzip" in str(error)


def test_a_gz_that_is_none_is_named(tmp_path):
    json_folder(tmp_path)
    (tmp_path / "tst.json.gz").write_text(json.dumps(TEST[0]) + "\n")
    assert "tst.json.gz: not a gzip file" in str(fatal(tmp_path))


@pytest.mark.parametrize("make", [json_folder, text_folder])
@pytest.mark.parametrize("name", ["trn", "tst", "lbl"])
def test_missing_and_empty_files_are_named(tmp_path, make, name):
    make(tmp_path)
    file = tmp_path / (f"{name}.json.gz" if make is json_folder else f"{name}.raw.txt")
    file.unlink()
    error = fatal(tmp_path)
    assert error.file.name == file.name
    assert "no such file" in str(error)
    file.write_bytes(gzip.compress(b"") if make is json_folder else b"")
    error = fatal(tmp_path)
    assert error.file.name == file.name
    assert "empty" in str(error)


def test_missing_targets_are_named(tmp_path):
    text_folder(tmp_path)
    (tmp_path / "tst_X_Y.txt").unlink()
    assert "tst_X_Y.txt: no such file" in str(fatal(tmp_path))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("3 3\n0:1\n\n1:1\n", "3 rows, but trn.raw.txt has 4"),
        ("5 3\n0:1\n\n1:1\n", "5 rows, but trn.raw.txt has 4"),
        ("4 4\n0:1\n", "4 labels, but lbl.raw.txt has 3"),
        ("4 3\n0:1\n3:1\n", "row 3: label 3 is outside"),
        ("4 3\n0:1\nx:1\n", "row 3: 'x:1' is not label:value"),
    ],
)
def test_counts_and_labels_must_agree(tmp_path, text, problem):
    text_folder(tmp_path)
    (tmp_path / "trn_X_Y.txt").write_text(text)
    message = str(fatal(tmp_path))
    assert "trn_X_Y.txt" in message
    assert problem in message


def test_a_folder_without_a_dataset(tmp_path):
    assert "no raw dataset" in str(fatal(tmp_path))
    assert "no such folder" in str(fatal(tmp_path / "none"))


def test_two_layouts_are_noted(tmp_path):
    own_folder(json_folder(tmp_path))
    _, folder = read(tmp_path)
    assert folder.layout == "json"
    assert "json and jsonl" in folder.report.notes[0]


def test_label_rows_are_sorted_and_kept_once(tmp_path):
    rows = [
        {"uid": "a", "title": "x", "target_ind": [2, 0]},
        {"uid": "b", "title": "x", "target_ind": [1, 1]},
        {"uid": "c", "title": "x", "target_ind": [0, 1], "target_rel": [0.0, 1.0]},
    ]
    json_folder(tmp_path, trn=rows)
    splits, folder = read(tmp_path)
    assert [r.targets.tolist() for r in splits["train"]] == [[0, 2], [1], [1]]
    assert findings(folder) == [
        ("trn.json.gz", 1, "labels not in increasing order"),
        ("trn.json.gz", 2, "a label named twice"),
        ("trn.json.gz", 3, "a label of relevance 0"),
    ]


def test_sparse_text_repairs_are_listed(tmp_path):
    text_folder(tmp_path)
    (tmp_path / "trn_X_Y.txt").write_text("4 3\n2:1 0:1\n1:1 1:1\n0:0 1:1\n\n")
    splits, folder = read(tmp_path)
    assert [r.targets.tolist() for r in splits["train"]] == [[0, 2], [1], [1], []]
    assert findings(folder) == [
        ("trn_X_Y.txt", 2, "labels not in increasing order"),
        ("trn_X_Y.txt", 3, "a label named twice"),
        ("trn_X_Y.txt", 4, "a label of relevance 0"),
    ]


@pytest.mark.parametrize(
    ("title", "cleaned"),
    [
        ("a\x00b", "ab"),
        (" a  b ", "a b"),
        ("a\tb\nc", "a b c"),
        ("a\x07b", "a b"),
        ("a\u00a0b", "a b"),
        ("\ud800x", "\ufffdx"),
    ],
)
def test_titles_are_cleaned(tmp_path, title, cleaned):
    json_folder(tmp_path, trn=[json.dumps({"uid": "a", "title": title, "target_ind": []})])
    splits, folder = read(tmp_path)
    assert splits["train"][0].title == cleaned
    splits["train"][0].title.encode()
    assert findings(folder) == [("trn.json.gz", 1, "white space or control characters in the title")]


@pytest.mark.parametrize("title", ["plain", "", "Ölbild 👢 日本語", "naïve “quoted”"])
def test_good_titles_stay(tmp_path, title):
    json_folder(tmp_path, trn=[{"uid": "a", "title": title, "target_ind": []}])
    splits, folder = read(tmp_path)
    assert splits["train"][0].title == title
    assert not findings(folder)


def test_lenient_fields_are_noted(tmp_path):
    rows = [
        {"uid": "a", "title": "x", "content": None, "target_ind": []},
        {"title": "x", "target_ind": []},
        {"uid": 12, "title": "x", "target_ind": []},
        "",
        {"uid": "b", "title": "x", "content": "y\x00\x01z", "target_ind": []},
    ]
    json_folder(tmp_path, trn=rows)
    splits, folder = read(tmp_path)
    assert [r.uid for r in splits["train"]] == ["a", "1", "12", "b"]
    assert [r.content for r in splits["train"]] == ["", "", "", "y z"]
    assert [(line, problem) for _, line, problem in findings(folder)] == [
        (1, '"content" is null'),
        (2, "no uid"),
        (4, "a blank line"),
        (5, "control characters in the content"),
    ]


def test_own_labels_are_repaired(tmp_path):
    own_folder(tmp_path)
    rows = [{"uid": "a", "title": "x", "labels": ["red", " red ", ""]}]
    raw_folders.write_lines(tmp_path / "train.jsonl", rows)
    raw_folders.write_lines(tmp_path / "labels.jsonl", [*LABELS, {"uid": "l3", "title": "red"}])
    splits, folder = read(tmp_path)
    assert splits["train"][0].targets.tolist() == [0]
    assert findings(folder) == [
        ("labels.jsonl", 4, "the label 'red' stands twice"),
        ("train.jsonl", 1, "an empty label"),
        ("train.jsonl", 1, "a label named twice"),
    ]


@pytest.mark.parametrize("make", [json_folder, text_folder])
def test_latin_1_is_detected_and_said(tmp_path, make):
    make(tmp_path)
    file = tmp_path / ("trn.json.gz" if make is json_folder else "trn.raw.txt")
    if make is json_folder:
        lines = [json.dumps(row, ensure_ascii=False) for row in TRAIN[:3]]
        file.write_bytes(gzip.compress("\n".join(lines).encode("latin-1")))
    else:
        file.write_bytes("Red shoe\nÖlbild\nnothing\nboot\n".encode("latin-1"))
    splits, folder = read(tmp_path)
    assert splits["train"][1].title == "Ölbild"
    assert splits["labels"][2].title == "naïve art"  # the other files are UTF-8
    assert findings(folder) == [(file.name, 2, "not UTF-8")]
    assert "latin-1" in folder.report.repaired[0].done


def test_byte_order_marks_are_tolerated(tmp_path):
    text_folder(tmp_path)
    for file in tmp_path.glob("*"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    splits, folder = read(tmp_path)
    assert splits["train"][0].title == "Red shoe"
    assert not findings(folder)


def test_utf_16_is_named(tmp_path):
    text_folder(tmp_path)
    (tmp_path / "lbl.raw.txt").write_bytes("red\nshoe\n".encode("utf-16"))
    assert "lbl.raw.txt: row 1: UTF-16" in str(fatal(tmp_path))


@pytest.mark.parametrize("name", ["filter_labels_trn.txt", "filter_labels_train.txt"])
def test_filter_pairs(tmp_path, name):
    json_folder(tmp_path)
    (tmp_path / name).write_text("0 1\n3 2\n")
    _, folder = read(tmp_path)
    np.testing.assert_array_equal(folder.filter_pairs("train"), [[0, 1], [3, 2]])
    assert folder.filter_pairs("test").shape == (0, 2)


@pytest.mark.parametrize(
    ("pair", "problem"), [("4 0", "row 4 is outside the 4 rows"), ("0 3", "label 3 is outside")]
)
def test_filter_pairs_outside_are_named(tmp_path, pair, problem):
    json_folder(tmp_path)
    (tmp_path / "filter_labels_trn.txt").write_text(f"0 1\n\n{pair}\n")
    _, folder = read(tmp_path)
    with pytest.raises(UserError, match=problem) as caught:
        folder.filter_pairs("train")
    assert (caught.value.file.name, caught.value.row) == ("filter_labels_trn.txt", 3)


def pictures_of(folder, record):
    found = folder.images.read(record.images, check=True)
    folder.report.rejected += folder.images.findings(record.images, record.file, found)
    return [picture.data for picture in found]


def test_pictures_keep_order_and_place(tmp_path):
    json_folder(tmp_path)
    red, blue = picture("red"), picture("blue", "JPEG")
    (tmp_path / "i").mkdir()
    (tmp_path / "i/1.png").write_bytes(red)
    (tmp_path / "i/ü 2.jpg").write_bytes(blue)
    outside = tmp_path.parent / f"{tmp_path.name}_outside.png"
    outside.write_bytes(red)
    rows = [
        ("b", "i/ü 2.jpg"),
        ("a", "i/1.png"),
        ("b", "i/none.png"),
        ("ghost", "i/1.png"),
        ("b", "i/1.png"),
        ("d", f"../{outside.name}"),
        ("d", str(outside)),
    ]
    image_list(tmp_path, "trn", rows)
    splits, folder = read(tmp_path)
    pictures = [pictures_of(folder, record) for record in splits["train"]]
    assert pictures == [[red], [blue, b"", red], [], [b"", red]]
    assert findings(folder) == [
        ("img_paths.trn.csv", 5, "a uid that no row has"),
        ("img_paths.trn.csv", 7, "a path outside the raw folder"),
    ]


def test_files_that_are_no_pictures_count_as_missing(tmp_path):
    json_folder(tmp_path)
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "dir.jpg").mkdir()
    image_list(tmp_path, "trn", [("a", "page.jpg"), ("a", "empty.jpg"), ("a", "dir.jpg"), ("a", ""), ("b",)])
    splits, folder = read(tmp_path)
    assert pictures_of(folder, splits["train"][0]) == [b""] * 4
    assert [line for _, line, _ in findings(folder)] == [6, 2, 3, 4, 5]
    named = [(finding.name, finding.problem) for finding in folder.report.rejected[1:]]
    assert named == [
        ("page.jpg", "not a picture of a known format"),
        ("empty.jpg", "an empty file"),
        ("dir.jpg", "a directory"),
        ("", "not a path"),
    ]


@pytest.mark.parametrize("text", ["a,1.png\n", "", "id,path\na,1.png\n"])
def test_an_image_list_needs_its_header(tmp_path, text):
    json_folder(tmp_path)
    (tmp_path / "img_paths.trn.csv").write_text(text)
    assert "img_paths.trn.csv: row 1: no header" in str(fatal(tmp_path))


def test_own_files_name_their_pictures(tmp_path):
    own_folder(tmp_path)
    (tmp_path / "1.png").write_bytes(picture())
    rows = [{"uid": "a", "title": "x", "labels": [], "images": ["1.png", "../x.png", "2.png"]}]
    raw_folders.write_lines(tmp_path / "train.jsonl", rows)
    splits, folder = read(tmp_path)
    assert pictures_of(folder, splits["train"][0]) == [picture(), b"", b""]
    assert findings(folder) == [("train.jsonl", 1, "a path outside the raw folder")]


def test_the_digest_goes_by_content(tmp_path):
    first, second = json_folder(tmp_path / "1"), json_folder(tmp_path / "2")
    for file in first.iterdir():
        (second / file.name).write_bytes(file.read_bytes())
    assert open_raw(first).digest() == open_raw(second).digest()
    (second / "filter_labels_tst.txt").write_text("0 0\n")
    assert open_raw(first).digest() != open_raw(second).digest()
