from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
import raw_folders
from raw_folders import LABELS, TEST, TRAIN, image_list, json_folder, picture

from vixml_jax import data
from vixml_jax.data import dataset as dataset_lib
from vixml_jax.errors import UserError
from vixml_jax.prepare import prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A small prepared dataset with pictures and filter pairs."""
    raw = json_folder(tmp_path_factory.mktemp("raw"))
    (raw / "1.png").write_bytes(picture("red"))
    (raw / "2.png").write_bytes(picture("blue"))
    image_list(raw, "trn", [("b", "1.png"), ("d", "2.png"), ("d", "none.png"), ("d", "1.png")])
    image_list(raw, "lbl", [("l1", "2.png")])
    (raw / "filter_labels_trn.txt").write_text("0 1\n2 0\n2 1\n3 2\n")
    (raw / "filter_labels_tst.txt").write_text("1 1\n")
    out = tmp_path_factory.mktemp("prepared") / "set"
    prepare(raw, out, "Small set")
    return out


def test_columns_hold_what_was_written(prepared):
    ds = data.load(prepared)
    for split, rows in ((ds.train, TRAIN), (ds.test, TEST), (ds.labels, LABELS)):
        assert len(split) == len(rows)
        assert list(split.uids) == [row["uid"] for row in rows]
        assert list(split.titles) == [row["title"] for row in rows]
        assert list(split.contents) == [" ".join(row["content"].split()) for row in rows]
        assert split.texts == split.titles
    assert ds.name == "Small set"
    assert ds.train.titles[-1] == TRAIN[-1]["title"]
    assert ds.train.titles[1:3] == [TRAIN[1]["title"], TRAIN[2]["title"]]
    assert ds.train.titles[np.array([2, 0])] == [TRAIN[2]["title"], TRAIN[0]["title"]]
    with pytest.raises(IndexError):
        ds.train.titles[4]


def test_fields_are_joined_without_empty_ones(prepared):
    ds = data.load(prepared)
    assert list(ds.train.text_of(("title", "content"))) == [
        "Red shoe size 42",
        "Ölbild",
        "nothing known",
        "boot 👢 two lines",
    ]
    with pytest.raises(UserError, match="unknown text fields"):
        ds.train.text_of(("summary",))


def test_long_columns_are_read_in_chunks(prepared, monkeypatch):
    monkeypatch.setattr(dataset_lib, "CHUNK_ROWS", 3)
    assert list(data.load(prepared).train.uids) == ["a", "b", "c", "d"]


def test_targets_and_pairs(prepared):
    ds = data.load(prepared)
    for matrix, rows in ((ds.train_targets, TRAIN), (ds.test_targets, TEST)):
        assert matrix.shape == (len(rows), len(LABELS))
        assert matrix.dtype == np.float32
        assert [matrix[i].indices.tolist() for i in range(len(rows))] == [row["target_ind"] for row in rows]
        assert (matrix.data == 1).all()
    np.testing.assert_array_equal(ds.filter_pairs_train, [[0, 1], [2, 0], [2, 1], [3, 2]])
    np.testing.assert_array_equal(ds.filter_pairs_test, [[1, 1]])
    assert ds.filter_pairs_test.dtype == np.int64


def test_pictures_are_the_bytes_of_their_files(prepared):
    ds = data.load(prepared)
    red, blue = picture("red"), picture("blue")
    assert list(ds.train.images) == [[], [red], [], [blue, b"", red]]
    assert ds.train.images[-1] == [blue, b"", red]
    assert ds.labels.images[1:] == [[blue], []]
    np.testing.assert_array_equal(ds.train.images.counts(), [0, 1, 0, 2])
    np.testing.assert_array_equal(ds.train.take(np.array([3, 0])).images.counts(), [2, 0])


def test_a_dataset_can_be_sent_to_another_process(prepared):
    ds = data.load(prepared)
    ds.train.images[3]
    again = pickle.loads(pickle.dumps(ds))
    assert list(again.train.titles) == list(ds.train.titles)
    assert again.train.images[1] == ds.train.images[1]


def test_a_subset_is_renumbered(prepared):
    ds = data.load(prepared)
    view = data.subset(ds, train_rows=np.array([3, 0, 2]), test_rows=np.array([1]))
    assert list(view.train.uids) == ["d", "a", "c"]
    assert list(view.train.take(np.array([1, 1])).uids) == ["a", "a"]
    assert view.train.images[0] == ds.train.images[3]
    np.testing.assert_array_equal(view.train_targets.toarray(), ds.train_targets.toarray()[[3, 0, 2]])
    np.testing.assert_array_equal(view.filter_pairs_train, [[0, 2], [1, 1], [2, 0], [2, 1]])
    np.testing.assert_array_equal(view.filter_pairs_test, [[0, 1]])
    assert len(view.labels) == len(ds.labels)
    assert len({ds.fingerprint, view.fingerprint, data.subset(ds, np.arange(4)).fingerprint}) == 3


def test_holdout_never_shows_the_test_split(prepared):
    ds = data.load(prepared)
    view = data.holdout(ds, 0.5, seed=3)
    assert sorted([*view.train.uids, *view.test.uids]) == ["a", "b", "c", "d"]
    assert len(view.test) == 2
    known = {row["uid"]: row for row in TRAIN}
    for split, matrix in ((view.train, view.train_targets), (view.test, view.test_targets)):
        for i, uid in enumerate(split.uids):
            assert matrix[i].indices.tolist() == known[uid]["target_ind"]
    pairs = {(view.test.uids[row], label) for row, label in view.filter_pairs_test.tolist()}
    every = {("abcd"[row], label) for row, label in ds.filter_pairs_train.tolist()}
    assert pairs == {(uid, label) for uid, label in every if uid in list(view.test.uids)}
    same, other = data.holdout(ds, 0.5, seed=3), data.holdout(ds, 0.5, seed=4)
    assert list(same.test.uids) == list(view.test.uids)
    assert same.fingerprint == view.fingerprint
    assert other.fingerprint != view.fingerprint
    with pytest.raises(UserError, match="between 0 and 1"):
        data.holdout(ds, 1.0, seed=0)


@pytest.mark.parametrize("by", ["title", "first_word"])
def test_holdout_keeps_groups_together(tmp_path, by):
    raw = tmp_path / "raw"
    raw.mkdir()
    titles = [
        f"{word} {number % 3}" for word in ("Phone", "phone", "lamp", "mug", "rug") for number in range(7)
    ]
    records = [{"title": title, "labels": ["a"]} for title in titles]
    raw_folders.write_lines(raw / "train.jsonl", records)
    prepare(raw, tmp_path / "out")
    ds = data.load(tmp_path / "out")
    view = data.holdout(ds, 0.3, seed=1, by=by)
    key = (lambda title: title) if by == "title" else (lambda title: title.lower().split()[0])
    assert not {key(title) for title in view.train.titles} & {key(title) for title in view.test.titles}
    assert len(view.train) + len(view.test) == len(titles)
    assert 0 < len(view.test) <= 13
    with pytest.raises(UserError, match="row, title, first_word"):
        data.holdout(ds, 0.3, seed=1, by="colour")


def test_other_directories_are_refused(tmp_path):
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="not a prepared dataset; make it with `vixml prepare"):
            data.load(directory)


def test_another_version_is_refused(prepared, tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "meta.json").write_text('{"format": "vixml dataset 99"}')
    with pytest.raises(UserError, match="99"):
        data.load(tmp_path)


def test_a_folder_without_test_rows(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    raw_folders.write_lines(raw / "train.jsonl", [{"uid": "a", "title": "x", "labels": ["red", "shoe"]}])
    prepare(raw, tmp_path / "out")
    ds = data.load(tmp_path / "out")
    assert (len(ds.train), len(ds.test), len(ds.labels)) == (1, 0, 2)
    assert ds.test_targets.shape == (0, 2)
    assert list(ds.test.titles) == []
    assert list(ds.test.images) == []
    assert list(ds.labels.titles) == ["red", "shoe"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("meta.json", b"[]"),
        ("meta.json", b"{"),
        ("meta.json", b'{"format": "vixml dataset 0"}'),
        ("meta.json", b'{"format": "vixml dataset 1", "name": 3, "fingerprint": "a"}'),
        ("targets_train.npz", b""),
        ("targets_test.npz", b"PK\x03\x04"),
        ("filter_pairs_train.npy", b"\x93NUMPY"),
        ("filter_pairs_test.npy", None),
        ("columns/train/title/offsets.npy", b"\x93NUMPY\x01\x00v\x00{"),
        ("columns/train/title/values.npy", None),
    ],
)
def test_a_damaged_dataset_is_one_clear_line(prepared, tmp_path, file, content):
    shutil.copytree(prepared, tmp_path / "set")
    path = tmp_path / "set" / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(data.load(tmp_path / "set").train.titles)
    assert str(tmp_path / "set") in str(caught.value)
    assert "anew" in str(caught.value) or "rebuild" in str(caught.value) or "JSON" in str(caught.value)
