"""A tiny raw folder and config, small enough to train in seconds; made by the tests themselves."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from vixml_jax import config as config_lib

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 200), "gold": (210, 170, 20)}
THINGS = ("kettle", "lamp", "chair", "clock", "mug", "rug")


@contextlib.contextmanager
def only_devices(count: int):
    """Hides devices beyond the first `count`: programs for one compile much faster than for eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:count])
        yield


def write_raw(raw: Path, seed: int, num_train: int = 96, num_test: int = 24, images: bool = True) -> Path:
    """Writes products whose labels are "colour thing" and "thing"; the colour is only in the picture."""
    rng = np.random.default_rng(seed)
    raw.mkdir(parents=True)
    pairs = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
    labels = [*pairs, *THINGS]
    _write(
        raw / "lbl.json.gz", [{"uid": f"l{i}", "title": text, "content": ""} for i, text in enumerate(labels)]
    )
    for split, count in (("trn", num_train), ("tst", num_test)):
        records, paths = [], ["uid,path"]
        for number in range(count):
            colour, thing = rng.choice(list(COLOURS)), rng.choice(THINGS)
            uid = f"{split}{number}"
            title = f"{thing} number {rng.integers(50)}"
            targets = sorted([labels.index(f"{colour} {thing}"), labels.index(thing)])
            records.append({"uid": uid, "title": title, "content": "", "target_ind": targets})
            if images and number % 7:
                path = raw / "images" / f"{uid}.png"
                path.parent.mkdir(exist_ok=True)
                Image.new("RGB", (16, 16), COLOURS[str(colour)]).save(path)
                paths.append(f"{uid},images/{uid}.png")
        _write(raw / f"{split}.json.gz", records)
        if images:
            (raw / f"img_paths.{split}.csv").write_text("\n".join(paths) + "\n")
    return raw


def config(dataset: Path, images: int = 0):
    """Returns a config that trains on `dataset` in seconds."""
    config = config_lib.base()
    config_lib.shrink(config)
    config.dataset.dir = str(dataset)
    config.dataset.max_train = 0
    config.dataset.max_test = 0
    config.text.vocab_size = 256
    config.text.max_tokens = 16
    config.vision.images = images
    config.train.epochs = 3
    config.train.batch_size = 32
    config.train.row_length = 32
    config.mining.size = 8
    config.optimizer.lr = 1e-3
    config.optimizer.head_lr = 1e-3
    config.checkpoint.every_steps = 2
    config.eval.items_per_call = 32
    return config


def _write(path: Path, records: list[dict]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
