"""Banks of pictures: made once for all views of a dataset, on any mesh, and after any interruption."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from vixml_jax import banks, data, sharding
from vixml_jax.data import image_bank
from vixml_jax.prepare import prepare

# A bank of the training pictures, with a tower that takes its time, until it is killed.
SLOW_BANK = """
import dataclasses, sys, time
import numpy as np
import tiny
from pathlib import Path
from vixml_jax import banks, data
from vixml_jax.data import image_bank

config = tiny.config(Path(sys.argv[1]), images=2)
config.vision.checkpoint, config.vision.batch_size = "random:siglip-tiny", 8
fast = banks.vision_tower(config)

def embed(pixels):
    time.sleep(0.3)
    return np.asarray(fast.embed(pixels))

tower = dataclasses.replace(fast, embed=embed)
image_bank.build_or_load(data.load(sys.argv[1]).train.images, tower, Path(sys.argv[2]), "train")
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Products of which no two have the same picture."""
    raw = tiny.write_raw(tmp_path_factory.mktemp("banks") / "raw", seed=3, num_train=70, num_test=10)
    for number, file in enumerate(sorted(raw.glob("images/*.png"))):
        Image.new("RGB", (40, 30 + number % 7), (3 * number % 256, number, 255 - number)).save(file)
    return raw


@pytest.fixture(scope="module")
def prepared(raw):
    prepare(raw, raw.parent / "prepared")
    return raw.parent / "prepared"


def config_of(prepared: Path, cache: Path):
    config = tiny.config(prepared, images=2)
    config.vision.checkpoint, config.vision.batch_size = "random:siglip-tiny", 8
    config.dataset.cache_dir = str(cache)
    return config


@pytest.fixture
def calls(monkeypatch):
    """Sizes of the batches that the vision tower embeds."""
    calls: list[int] = []
    make = banks.vision_tower

    def watched(config):
        tower = make(config)

        def embed(pixels):
            calls.append(len(pixels))
            return tower.embed(pixels)

        return dataclasses.replace(tower, embed=embed)

    monkeypatch.setattr(banks, "vision_tower", watched)
    return calls


def pictures_of(dataset, config, split: str) -> image_bank.ImageBank:
    return banks.picture_bank(config, getattr(dataset, split), Path(config.dataset.cache_dir), split)


def embeddings(bank: image_bank.ImageBank) -> np.ndarray:
    return bank.rows[bank.used_rows()].astype(np.float32)


def test_views_share_the_embeddings_of_their_dataset(prepared, tmp_path, calls, single_mesh):
    dataset, config = data.load(prepared), config_of(prepared, tmp_path)
    whole = pictures_of(dataset, config, "train")
    assert len(calls) == -(-60 // 8)  # every seventh of 70 has none
    assert pictures_of(dataset, config, "labels").used_rows().size == 0
    calls.clear()
    held = data.holdout(dataset, 0.3, seed=1)
    for split in ("train", "test"):
        rows = getattr(held, split).rows
        np.testing.assert_array_equal(pictures_of(held, config, split).slots, whole.slots[rows])
    pictures_of(data.dataset.subset(dataset, np.arange(9)), config, "train")
    pictures_of(data.load(prepared), config_of(prepared, tmp_path), "train")
    assert not calls
    assert pictures_of(dataset, config, "test").used_rows().size == 8
    assert len(calls) == 1


def test_a_small_view_embeds_what_it_shows_only(prepared, tmp_path, calls, single_mesh):
    few = data.dataset.subset(data.load(prepared), np.arange(1, 7))
    assert pictures_of(few, config_of(prepared, tmp_path), "train").used_rows().size == 6
    assert len(calls) == 1


def test_a_changed_picture_costs_one_embedding(raw, tmp_path, calls, single_mesh):
    prepare(raw, tmp_path / "out")
    config = config_of(tmp_path / "out", tmp_path / "out" / "derived")
    before = pictures_of(data.load(tmp_path / "out"), config, "train")
    kept = embeddings(before)
    file = raw / "images" / "trn5.png"
    whole = file.read_bytes()
    try:
        Image.new("RGB", (40, 30), (200, 100, 0)).save(file)
        prepare(raw, tmp_path / "out", overwrite=True)
    finally:
        file.write_bytes(whole)
    calls.clear()
    after = embeddings(pictures_of(data.load(tmp_path / "out"), config, "train"))
    assert len(calls) == 1
    changed = np.flatnonzero((after != kept).any(axis=1))
    assert changed.tolist() == [4]  # the first row has no picture


def test_batches_are_split_over_the_devices_of_a_mesh(prepared, tmp_path):
    dataset, found = data.load(prepared), []
    for number, sizes in enumerate([(1, 1, 1), (2, 2, 2)]):
        with sharding.use(sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])):
            found.append(
                embeddings(pictures_of(dataset, config_of(prepared, tmp_path / str(number)), "test"))
            )
    assert len(found[0]) == 8
    np.testing.assert_allclose(found[1], found[0], rtol=0.01, atol=0.01)


def test_a_killed_bank_goes_on_where_it_stopped(prepared, tmp_path, calls):
    arguments = [sys.executable, "-c", SLOW_BANK, str(prepared), str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    done = 0
    while done < 20:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
        done = sum(file.stat().st_size // 16 for file in tmp_path.glob("killed/*/digests.bin"))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = sum(file.stat().st_size // 16 for file in tmp_path.glob("killed/*/digests.bin"))
    assert 20 <= done < 60

    dataset = data.load(prepared)
    with sharding.use(sharding.make_mesh(devices=jax.devices()[:1])):
        continued = pictures_of(dataset, config_of(prepared, tmp_path / "killed"), "train")
        assert len(calls) == -(-(60 - done) // 8)
        whole = pictures_of(dataset, config_of(prepared, tmp_path / "whole"), "train")
    for name in ("rows.bin", "digests.bin"):
        files = [next(tmp_path.glob(f"{run}/*/{name}")).read_bytes() for run in ("killed", "whole")]
        assert files[0] == files[1], name
    np.testing.assert_array_equal(continued.slots, whole.slots)


def test_a_dataset_prepared_before_pictures_had_digests_gets_them(raw, tmp_path):
    prepare(raw, tmp_path / "out")
    dataset = data.load(tmp_path / "out")
    for split in ("train", "test", "labels"):
        shutil.rmtree(tmp_path / "out" / "columns" / split / "image_digests")
        names, counts = getattr(data.load(tmp_path / "out"), split).images.digests()
        images = [image for item in getattr(dataset, split).images for image in item]
        assert len(images) == counts.sum() == len(names)
        assert names.tobytes() == b"".join(hashlib.sha256(image).digest()[:16] for image in images)


def test_a_changed_tower_is_another_tower(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(json.dumps({"a": 1}))
    first = banks.tower_fingerprint(str(tmp_path))
    assert banks.tower_fingerprint(str(tmp_path)) == first
    (tmp_path / "README.md").write_text("read me")
    assert banks.tower_fingerprint(str(tmp_path)) == first
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(json.dumps({"a": 23}))
        second = banks.tower_fingerprint(str(tmp_path))
        assert second != first
        first = second
