"""Several tokens of a picture, from the frozen tower's patches to predictions."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from PIL import Image

from vixml_jax import XmcModel, config_rules, data
from vixml_jax.errors import UserError
from vixml_jax.prepare import prepare
from vixml_jax.train import train


def test_a_run_with_four_tokens_a_picture(tmp_path, one_device):
    prepare(tiny.write_raw(tmp_path / "raw", seed=2), tmp_path / "dataset", "tiny")
    dataset = tmp_path / "dataset"
    config = tiny.config(dataset, images=2)
    config.vision.checkpoint, config.vision.tokens = "random:siglip-tiny", 4
    config.text.layers, config.prototype.kind, config.loss.name = 1, "none", "info_nce"
    config.train.epochs = 1
    train(config, tmp_path / "run")
    model = XmcModel.load(tmp_path / "run")
    test = data.load(dataset).test
    titles, pictures = test.text_of(("title",)), [test.images[row] for row in range(len(test))]
    embedded = model.encode_queries(titles, images=pictures)
    # Embedded anew, a picture at a time, they are what the run's own bank has.
    np.testing.assert_allclose(embedded, np.load(tmp_path / "run" / "embeddings" / "test.npy"), atol=2e-3)
    # Where in a picture a thing is makes a difference, which the mean over all patches would not see.
    halves = np.zeros((2, 32, 32, 3), np.uint8)
    halves[0, :16], halves[1, 16:] = 255, 255
    first, second = model.encode_queries(["lamp"] * 2, images=[[Image.fromarray(half)] for half in halves])
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision.tokens": 5}, r"vision\.tokens=5; give a square number"),
        ({"vision.tokens": 4, "vision.train": "lora"}, r"tokens=4 with config\.vision\.train='lora'"),
        ({"vision.tokens": 4, "vision.precomputed": True}, r"tokens=4 with config\.vision\.precomputed"),
        ({"vision.tokens": 16, "vision.images": 3, "text.max_tokens": 32}, "items of up to 80 slots"),
    ],
)
def test_what_does_not_go_together(changes, message):
    config = tiny.config("somewhere", images=1)
    config.train.row_length = 64
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        config_rules.validate(config)
