"""Ready embeddings in a raw folder: from the files of the public release to what a run reads."""

from __future__ import annotations

import json
import os

import ml_dtypes
import numpy as np
import pytest
import tiny
from raw_folders import LABELS, TEST, TRAIN, json_folder, text_folder

from vixml_jax import banks, data
from vixml_jax.data import raw_embeddings
from vixml_jax.errors import UserError
from vixml_jax.prepare import prepare, table

DIM = 6
MAPS = {
    "trn": [[0, 2], -1, [3], None],  # of the four rows of TRAIN
    "tst": [-1, [1]],
    "lbl": [[0], [1, 2, 0], []],
}


def objects(elements):
    array = np.empty(len(elements), object)
    for number, element in enumerate(elements):
        array[number] = element
    return array


def write(raw, names=("trn", "tst", "lbl"), dtype=np.float32, dim=DIM):
    """Writes the release's files; returns the embeddings by split."""
    embeddings = {}
    for name in names:
        rows = np.random.default_rng(len(name)).normal(size=(4, dim)).astype(dtype)
        np.save(raw / f"{name}_embs_imgs_3_{dim}_siglip2.npy", rows)
        np.save(raw / f"{name}_imgs_384_3_map.npy", objects(MAPS[name]), allow_pickle=True)
        embeddings[name] = rows
    return embeddings


@pytest.fixture
def raw(tmp_path):
    return json_folder(tmp_path / "raw")


def slow(rows, row_map, images):
    """The embeddings of every item, padded with zeros, and where they are: one at a time."""
    features, present = (
        np.zeros((len(row_map), images, rows.shape[1])),
        np.zeros((len(row_map), images), bool),
    )
    for item, numbers in enumerate(row_map):
        for place, number in enumerate([] if numbers in (None, -1) else numbers[:images]):
            features[item, place] = rows[number].astype(ml_dtypes.bfloat16)
            present[item, place] = True
    return features, present


@pytest.mark.parametrize("make", [json_folder, text_folder])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_run_takes_them_as_they_are(tmp_path, make, dtype):
    embeddings = write(make(tmp_path / "raw"), dtype=dtype)
    report = prepare(tmp_path / "raw", tmp_path / "out")
    counts = {split: each["rows_with_embeddings"] for split, each in report["splits"].items()}
    assert counts == {"train": 2, "test": 1, "labels": 2}
    assert "embedded" in table(report)
    config = tiny.config(tmp_path / "out", images=2)
    config.vision.precomputed = True
    dataset = data.load(tmp_path / "out")
    for split, name in (("train", "trn"), ("test", "tst"), ("labels", "lbl")):
        part = getattr(dataset, split)
        for view, items in ((part, np.arange(len(part))), (part.take(np.array([1, 0])), np.array([1, 0]))):
            bank = banks.picture_bank(config, view, tmp_path / "cache", split)
            expected = slow(embeddings[name], [MAPS[name][item] for item in items], 2)
            for got, wanted in zip(bank.take(np.arange(len(items)), 2), expected, strict=True):
                np.testing.assert_array_equal(
                    got[:, : wanted.shape[1]].astype(wanted.dtype), wanted[:, : got.shape[1]]
                )
                assert not wanted[:, got.shape[1] :].any()
    assert not (tmp_path / "cache").exists()
    assert prepare(tmp_path / "raw", tmp_path / "out")["unchanged"]


def test_names_that_the_release_s_scripts_write(raw, tmp_path):
    embeddings = write(raw)
    for short, long in (("trn", "train"), ("tst", "test"), ("lbl", "labels")):
        (raw / f"{short}_imgs_384_3_map.npy").rename(raw / f"{long}_imgs_384_3_map.npy")
    prepare(raw, tmp_path / "out")
    bank = data.load(tmp_path / "out").labels.image_embeddings()
    assert bank.slots.tolist() == [[0, -1, -1], [1, 2, 0], [-1, -1, -1]]
    np.testing.assert_array_equal(bank.rows, embeddings["lbl"].astype(ml_dtypes.bfloat16))


def test_a_split_without_them_has_no_pictures(raw, tmp_path):
    write(raw, ["trn"])
    prepare(raw, tmp_path / "out")
    dataset = data.load(tmp_path / "out")
    assert len(dataset.train.image_embeddings().used_rows()) == 3
    for split, size in ((dataset.test, len(TEST)), (dataset.labels, len(LABELS))):
        features, present = split.image_embeddings().take(np.arange(size), 2)
        assert features.shape == (size, 1, DIM)
        assert not present.any()
    (tmp_path / "without").mkdir()
    prepare(json_folder(tmp_path / "plain"), tmp_path / "without")
    config = tiny.config(tmp_path / "without", images=1)
    config.vision.precomputed = True
    with pytest.raises(UserError, match="no embeddings of pictures"):
        banks.picture_bank(config, data.load(tmp_path / "without").train, tmp_path, "train")


def test_a_change_in_them_is_noticed(raw, tmp_path):
    write(raw)
    first = prepare(raw, tmp_path / "out")["fingerprint"]
    np.save(raw / f"trn_embs_imgs_3_{DIM}_siglip2.npy", np.ones((4, DIM), np.float32))
    with pytest.raises(UserError, match="another content"):
        prepare(raw, tmp_path / "out")
    assert prepare(raw, tmp_path / "out", overwrite=True)["fingerprint"] != first


def test_embeddings_that_are_not_finite_count_as_missing(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(raw_embeddings, "CHUNK_BYTES", 2 * DIM * 4)  # several chunks
    rows = write(raw)["trn"]
    rows[2, 3] = np.nan
    np.save(raw / f"trn_embs_imgs_3_{DIM}_siglip2.npy", rows)
    prepare(raw, tmp_path / "out")
    bank = data.load(tmp_path / "out").train.image_embeddings()
    assert bank.slots.tolist() == [[0], [-1], [3], [-1]]
    np.testing.assert_array_equal(bank.rows[[0, 1, 3]], rows[[0, 1, 3]].astype(ml_dtypes.bfloat16))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rejected"] == [
        {
            "file": "trn_imgs_384_3_map.npy", "line": 1, "problem": "an embedding that is not finite",
            "done": "counted as missing", "name": f"trn_embs_imgs_3_{DIM}_siglip2.npy, row 2",
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw: (raw / "trn_imgs_384_3_map.npy").unlink(), "no map says"),
        (lambda raw: save_map(raw, [[0]]), r"1 entries, but the split has 4 rows"),
        (lambda raw: save_map(raw, [[0], [4], [], []]), r"map\.npy: row 1: names row 4 of 4 embeddings"),
        (lambda raw: save_map(raw, [[0], [-2], [], []]), "names row -2"),
        (lambda raw: save_map(raw, [[0], "a", [], []]), "not a map of pictures"),
        (lambda raw: np.save(raw / "trn_embs_imgs_9.npy", np.ones((4, DIM))), "several files for one split"),
        (lambda raw: save_rows(raw, np.ones((4, DIM + 1))), "different sizes: 6 in lbl"),
        (lambda raw: save_rows(raw, np.ones(4)), "shape"),
        (lambda raw: save_rows(raw, np.ones((4, DIM), int)), "int64"),
        (lambda raw: save_rows(raw, objects([[1]])), "not a .npy file of numbers"),
        (lambda raw: os.truncate(raw / ROWS, 200), "not a .npy file of numbers"),
        (lambda raw: (raw / ROWS).write_bytes(b""), "not a .npy file of numbers"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(raw, tmp_path, spoil, message):
    write(raw)
    spoil(raw)
    with pytest.raises(UserError, match=message):
        prepare(raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()


ROWS = f"trn_embs_imgs_3_{DIM}_siglip2.npy"


def save_rows(raw, rows):
    np.save(raw / ROWS, rows, allow_pickle=True)


def save_map(raw, elements):
    assert len(TRAIN) == 4
    np.save(raw / "trn_imgs_384_3_map.npy", objects(elements), allow_pickle=True)


def test_new_pictures_need_the_tower_that_made_them(tmp_path, single_mesh):
    config = tiny.config(tmp_path, images=1)
    config.vision.precomputed, config.vision.checkpoint = True, "random:siglip-tiny"
    with pytest.raises(UserError, match=r"1152 numbers, random:siglip-tiny gives 32"):
        banks.pictures_in_memory(config, [[]], 1152)
    assert len(banks.pictures_in_memory(config, [[]], 32)) == 1
