"""Data at the edges of what there can be: each case trains, is evaluated and predicts, with finite figures.

What is defined: an item without text and pictures has the embedding of an empty text; a query without labels
and a label without queries pull and push nothing; a label that a row names twice counts once; where there are
fewer labels than are asked for, predictions end with -1 and -inf; a batch larger than the data is filled up
with its first queries.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from raw_folders import image_list, json_folder

from vixml_jax import XmcModel, data, losses, retrieval
from vixml_jax.errors import UserError
from vixml_jax.models.two_tower import l2_normalize
from vixml_jax.prepare import prepare
from vixml_jax.train import train


@pytest.fixture(autouse=True)
def _quick(one_device):
    """One device is enough."""


def label(number: int, title: str) -> dict:
    return {"uid": f"l{number}", "title": title, "content": ""}


def query(number: int, title: str, targets: list[int]) -> dict:
    return {"uid": f"q{number}", "title": title, "content": "", "target_ind": targets}


CASES = {
    # One query, one label, one test query; a batch of 32 and k = 100 are far more than there is.
    "one of each": {
        "lbl": [label(0, "red")],
        "trn": [query(0, "red shoe", [0])],
        "tst": [query(1, "red hat", [0])],
    },
    "strange rows": {
        "lbl": [
            label(0, "red"),
            label(1, "red"),  # the same text
            label(2, ""),  # no text at all
            label(3, "never seen"),  # no query has it
            label(4, "\u05d0\u05d1 \u202e\u0645 e\u0301\u0301 \U0001f462 \U000e0041 \U0010ffff"),
        ],
        "trn": [
            query(0, "red shoe", [0, 1, 1]),
            query(1, "", [2]),
            query(2, "no labels", []),
            query(3, "a\0b\u2028\ud800c", [4]),  # half a character, and one that ends no line
            query(4, "long " * 20_000, [0]),
        ],
        "tst": [query(5, "", [2]), query(6, "nothing fits", []), query(7, "\u202e\u0645\u0631", [4])],
    },
    # No query of the training split has a label: there is nothing to learn, and nothing to fall over.
    "no labels in training": {
        "lbl": [label(0, "red"), label(1, "blue")],
        "trn": [query(0, "red shoe", []), query(1, "blue shoe", [])],
        "tst": [query(2, "red hat", [0])],
    },
}


def raw_of(case: str, folder: Path) -> Path:
    """Writes a case as JSON in ASCII, which can name half a character."""
    return json_folder(folder, **{name: list(map(json.dumps, rows)) for name, rows in CASES[case].items()})


# With pictures none is there, but for two of one label.
QUICK = [("one of each", 0), ("strange rows", 2)]
SLOW = [(case, images) for case in CASES for images in (0, 2) if (case, images) not in QUICK]


@pytest.mark.parametrize(
    ("case", "images"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_a_run_at_the_edge(tmp_path, case, images):
    raw = raw_of(case, tmp_path / "raw")
    if images:
        # Every query names a picture, and there is none; a label has two, so that there is something to fit.
        for name in ("trn", "tst"):
            image_list(raw, name, [(row["uid"], f"{row['uid']}.png") for row in CASES[case][name]])
        image_list(raw, "lbl", [("l0", "red.png"), ("l0", "blue.png")])
        for colour in ("red", "blue"):
            Image.new("RGB", (8, 8), colour).save(raw / f"{colour}.png")
    prepare(raw, tmp_path / "dataset", "edge")
    config = tiny.config(tmp_path / "dataset", images)
    config.text.layers = 1
    config.train.epochs = 2
    config.mining.start = 1
    workdir = tmp_path / "run"
    figures = train(config, workdir)
    assert all(np.isfinite(value) and 0 <= value <= 100 for value in figures.values()), figures
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(list(record.values())).all() for record in records)

    num_labels = len(CASES[case]["lbl"])
    for name, count in (("labels", num_labels), ("test", len(CASES[case]["tst"]))):
        lengths = np.linalg.norm(np.load(workdir / "embeddings" / f"{name}.npy"), axis=1)
        assert len(lengths) == count
        assert (np.isclose(lengths, 1, atol=1e-4) | (lengths == 0)).all()
    model = XmcModel.load(workdir)
    ids, scores = model.predict(["red", "", "\0", "\u05d0" * 5000], k=7)
    assert (np.sort(ids[:, :num_labels], axis=1) == np.arange(num_labels)).all()
    assert (ids[:, num_labels:] == -1).all()
    assert np.isfinite(scores[:, :num_labels]).all()
    assert np.isneginf(scores[:, num_labels:]).all()


def test_no_picture_in_the_whole_dataset_is_said(tmp_path):
    raw = raw_of("one of each", tmp_path / "raw")
    image_list(raw, "trn", [("q0", "nowhere.png")])
    prepare(raw, tmp_path / "dataset", "edge")
    with pytest.raises(UserError, match=r"the dataset has no pictures; give --config\.vision\.images=0"):
        train(tiny.config(tmp_path / "dataset", 1), tmp_path / "run")


def test_a_query_without_labels_leaves_the_parameters_alone():
    """Its row of the targets is empty: no loss has a gradient for it."""
    similarities = jnp.array([[0.3, -0.2, 0.9], [0.1, 0.4, -0.5], [0.0, 0.0, 0.0]])
    targets = jnp.array([[1, 0, 0], [0, 0, 0], [0, 0, 1]])
    for loss in (losses.triplet, losses.decoupled_softmax, losses.ngame):
        gradient = jax.grad(lambda values, loss=loss: loss(values, targets))(similarities)
        assert np.isfinite(gradient).all()
        assert (gradient[1] == 0).all()


def test_a_zero_embedding_has_a_zero_gradient_and_a_zero_score():
    zero, unit = jnp.zeros(4), jnp.array([1.0, 0, 0, 0])
    assert (l2_normalize(zero) == 0).all()
    gradient = jax.grad(lambda x: jnp.sum(l2_normalize(x) * unit))(zero)
    assert (gradient == 0).all()
    labels = np.stack([np.zeros(4), unit, -unit]).astype(np.float32)
    for kind in ("exact", "mesh", "scann"):
        index = retrieval.build(labels, kind=kind, k=2)
        ids, scores = index.search(np.zeros((1, 4), np.float32), 5)
        assert sorted(ids[0, :3]) == [0, 1, 2]
        assert (scores[0, :3] == 0).all()
        ids, scores = index.search(np.asarray(unit)[None], 2)
        assert ids.tolist() == [[1, 0]]
        assert scores.tolist() == [[1, 0]]


def test_a_label_that_two_rows_of_the_dataset_share_is_two_labels(tmp_path):
    prepare(raw_of("strange rows", tmp_path / "raw"), tmp_path / "dataset", "edge")
    dataset = data.load(tmp_path / "dataset")
    assert dataset.labels.titles[0] == dataset.labels.titles[1] == "red"
    assert dataset.train_targets[[0]].toarray().tolist() == [[1, 1, 0, 0, 0]]
    assert dataset.train_targets.data.max() == 1
