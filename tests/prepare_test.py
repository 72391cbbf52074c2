from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
from raw_folders import LABELS, TEST, TRAIN, image_list, json_folder, own_folder, picture, text_folder

from vixml_jax import data
from vixml_jax.data import builder
from vixml_jax.errors import UserError
from vixml_jax.prepare import prepare, table


@pytest.fixture
def raw(tmp_path):
    """A raw folder with a picture, one missing picture, and one row to repair."""
    raw = json_folder(tmp_path / "raw", trn=[*TRAIN, {"uid": "z", "title": " x ", "target_ind": [2, 1]}])
    (raw / "1.png").write_bytes(picture())
    image_list(raw, "trn", [("a", "1.png"), ("a", "2.png"), ("ghost", "1.png")])
    return raw


@pytest.mark.parametrize("make", [json_folder, text_folder, own_folder])
def test_tfds_reads_what_was_prepared(tmp_path, make):
    import tensorflow_datasets as tfds

    prepare(make(tmp_path / "raw"), tmp_path / "out", "my-set")
    read = tfds.builder_from_directory(os.fspath(tmp_path / "out"))
    assert set(read.info.splits) == {"train", "test", "labels"}
    for split, rows in (("train", TRAIN), ("test", TEST), ("labels", LABELS)):
        source = read.as_data_source(split)
        assert [r["title"].decode() for r in source] == [row["title"] for row in rows]
        assert [r["targets"].tolist() for r in source] == [row.get("target_ind", []) for row in rows]
        assert all(r["images"] == [] for r in source)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_what_a_folder_says_about_itself_is_on_the_card(raw, tmp_path):
    import tensorflow_datasets as tfds

    plain = prepare(raw, tmp_path / "plain", "set")["fingerprint"]
    (raw / "about.json").write_text('{"description": "Shoes.", "citation": "@Misc{shoes}", "license": "CC0"}')
    assert prepare(raw, tmp_path / "out", "set")["fingerprint"] == plain
    info = tfds.builder_from_directory(os.fspath(tmp_path / "out")).info
    assert (info.description, info.citation) == ("Shoes.", "@Misc{shoes}")
    for text in ("[]", '{"description": 3}', "{"):
        (raw / "about.json").write_text(text)
        with pytest.raises(UserError, match=r"about\.json"):
            prepare(raw, tmp_path / "bad", "set")


def test_pictures_are_stored_undecoded_in_their_places(raw, tmp_path):
    import tensorflow_datasets as tfds

    prepare(raw, tmp_path / "out")
    source = tfds.builder_from_directory(os.fspath(tmp_path / "out")).as_data_source("train")
    assert [bytes(image) for image in source[0]["images"]] == [picture(), b""]


def test_the_report_lists_every_repair(raw, tmp_path):
    returned = prepare(raw, tmp_path / "out", "set")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["splits"]["train"] == {
        "rows": 5,
        "positives": 6,
        "rows_without_labels": 1,
        "rows_with_images": 1,
        "images": 1,
        "images_missing": 1,
    }
    assert report["splits"]["labels"]["rows"] == 3
    assert [(f["file"], f["line"], f["done"]) for f in report["repaired"]] == [
        ("trn.json.gz", 5, "sorted"),
        ("trn.json.gz", 5, "cleaned"),
    ]
    assert [(f["file"], f["line"], f["problem"]) for f in report["rejected"]] == [
        ("img_paths.trn.csv", 4, "a uid that no row has")
    ]
    assert returned["problems"] == report["problems"]
    assert "1 x a uid that no row has" in table(returned)
    assert "rows" in table(returned)


def test_the_report_is_the_same_on_any_number_of_processors(raw, tmp_path, monkeypatch):
    """They decide how far ahead pictures are read."""
    names = [f"{i}.png" for i in range(100)]
    json_folder(raw, trn=[{"uid": name, "title": name, "target_ind": []} for name in names])
    for name in names[::3]:
        (raw / name).write_bytes(b"no picture")
    image_list(raw, "trn", [*((name, name) for name in names), ("ghost", "1.png")])
    for count in (1, 8):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        prepare(raw, tmp_path / str(count), "set")
    assert (tmp_path / "1/report.json").read_bytes() == (tmp_path / "8/report.json").read_bytes()


def test_the_same_content_is_not_prepared_twice(raw, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = prepare(raw, out)
    assert not first["unchanged"]
    monkeypatch.setattr(builder, "write", lambda *args: pytest.fail("prepared again"))
    second = prepare(raw, out)
    assert second["unchanged"]
    assert second["fingerprint"] == first["fingerprint"]
    assert table(second) == table(first)


@pytest.mark.parametrize("change", ["text", "picture"])
def test_other_content_is_not_overwritten_unasked(raw, tmp_path, change):
    out = tmp_path / "out"
    before = prepare(raw, out)
    if change == "text":
        json_folder(raw)
    else:
        (raw / "1.png").write_bytes(picture("blue"))
    with pytest.raises(UserError, match="--overwrite"):
        prepare(raw, out)
    assert data.load(out).fingerprint == before["fingerprint"]
    after = prepare(raw, out, overwrite=True)
    assert data.load(out).fingerprint == after["fingerprint"] != before["fingerprint"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_of_others_is_never_touched(raw, tmp_path, overwrite):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not touched"):
        prepare(raw, out, overwrite=overwrite)
    assert (out / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UserError, match=r"thesis\.txt: a file"):
        prepare(raw, out / "thesis.txt", overwrite=overwrite)


def test_an_empty_directory_is_filled(raw, tmp_path):
    (tmp_path / "out").mkdir()
    prepare(raw, tmp_path / "out")
    assert len(data.load(tmp_path / "out").train) == 5


@pytest.mark.parametrize("bad", [{"title": "x", "target_ind": [3]}, "not json"])
@pytest.mark.parametrize("name", ["trn", "tst"])
def test_a_failure_leaves_nothing(tmp_path, bad, name):
    raw = json_folder(tmp_path / "raw", **{name: [TRAIN[0], bad]})
    with pytest.raises(UserError) as caught:
        prepare(raw, tmp_path / "out")
    assert (caught.value.file.name, caught.value.row) == (f"{name}.json.gz", 2)
    assert sorted(os.listdir(tmp_path)) == ["raw"]


def test_a_failure_keeps_the_dataset_that_was_there(raw, tmp_path):
    before = prepare(raw, tmp_path / "out")
    json_folder(raw, trn=["not json"])
    with pytest.raises(UserError):
        prepare(raw, tmp_path / "out", overwrite=True)
    assert data.load(tmp_path / "out").fingerprint == before["fingerprint"]


def test_bad_filter_pairs_leave_nothing(raw, tmp_path):
    (raw / "filter_labels_tst.txt").write_text("0 99\n")
    with pytest.raises(UserError, match="label 99"):
        prepare(raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_needs_no_network_and_is_quiet(raw, tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise AssertionError("a network call")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    prepare(raw, tmp_path / "out")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(line.startswith("prepare ") for line in printed.err.splitlines())


def test_targets_are_plain_npz(raw, tmp_path):
    prepare(raw, tmp_path / "out")
    matrix = scipy.sparse.load_npz(tmp_path / "out/targets_test.npz")
    np.testing.assert_array_equal(matrix.toarray(), [[0, 1, 0], [1, 0, 1]])


def test_a_name_without_letters_is_refused(raw, tmp_path):
    with pytest.raises(UserError, match="is no name"):
        prepare(raw, tmp_path / "out", "---")


@pytest.mark.parametrize("name", ["LF-AmazonTitles-131K", "3 sets", "ümlaut", "a.b/c"])
def test_any_other_name_will_do(name, tmp_path):
    prepare(json_folder(tmp_path / "raw"), tmp_path / "out", name)
    assert data.load(tmp_path / "out").name == name


def test_preparing_needs_no_accelerator():
    code = "import sys, vixml_jax.prepare, vixml_jax.data; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
