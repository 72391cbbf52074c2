"""A vision tower that trains with the model, and is then frozen for another run's bank."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from flax import nnx

from vixml_jax import XmcModel, cli, data, sharding
from vixml_jax import run as run_lib
from vixml_jax.data import pictures
from vixml_jax.models import hub
from vixml_jax.prepare import prepare
from vixml_jax.train import train

pytestmark = pytest.mark.usefixtures("single_mesh")
TOWER = "random:siglip-tiny"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    prepare(tiny.write_raw(root / "raw", seed=4), root / "dataset", "tiny")
    return root / "dataset"


def config_of(dataset, kind):
    """Queries are their pictures alone."""
    config = tiny.config(dataset, images=1)
    config.vision.checkpoint, config.vision.train, config.vision.lora_rank = TOWER, kind, 4
    config.text.query_prompt, config.prototype.kind, config.loss.name = "{images}", "none", "sigmoid"
    config.text.layers = 1
    config.optimizer.vision_lr = 3e-3
    config.vision.augment = 0.2 if kind != "none" else 0.0
    config.train.epochs = 3
    return config


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with tiny.only_devices(1):
        train(config_of(dataset, "full"), workdir)
    return workdir


def model_of(workdir):
    with sharding.ensure() as mesh:
        model = run_lib.load_model(workdir, mesh)
    return model, nnx.merge(model.graphdef, model.params, model.frozen)


def flat(tower):
    return {
        ".".join(map(str, path)): np.asarray(leaf[...])
        for path, leaf in nnx.to_flat_state(nnx.split(tower)[1])
    }


def start():
    with sharding.ensure():
        return flat(hub.load_vision_tower(TOWER))


def test_all_of_it_trains(trained):
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert losses[-1] < losses[0]
    tower = flat(model_of(trained)[1].tower.vision)
    before = start()
    assert tower.keys() == before.keys()
    for name in ("patch_embedding.kernel", "layers.attention.q_proj.kernel", "final_norm.scale"):
        assert np.abs(tower[name] - before[name]).max() > 1e-4, name


def test_pictures_are_embedded_as_when_it_was_evaluated(trained, dataset):
    test = data.load(dataset).test
    queries = XmcModel.load(trained).encode_queries(test.texts, [list(items) for items in test.images])
    np.testing.assert_allclose(queries, np.load(trained / "embeddings" / "test.npy"), atol=2e-3)
    without = [not len(items) for items in test.images]
    assert any(without)
    assert not queries[without].any()  # a query of nothing is nothing


@pytest.mark.slow
def test_adapters_alone_train(dataset, tmp_path):
    config = config_of(dataset, "lora")
    config.train.epochs = 1
    with tiny.only_devices(1):
        train(config, tmp_path / "run")
    model, dual = model_of(tmp_path / "run")
    tower, before = flat(dual.tower.vision), start()
    for name, value in before.items():
        np.testing.assert_array_equal(tower[name], value, err_msg=name)
    adapters = [name for name in tower if "lora_b" in name]
    assert len(adapters) == 12  # six maps of the layers, six of the pooling head
    assert all(tower[name].any() for name in adapters)
    trained = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(model.params)}
    assert all("lora" in name for name in trained if name.startswith("tower.vision."))


def test_it_is_exported_and_frozen_for_another_run(trained, dataset, tmp_path):
    out = tmp_path / "vision"
    assert cli.run(["export", f"--workdir={trained}", f"--out={out}", "--vision"]) == 0
    mine = model_of(trained)[1].tower.vision
    with sharding.ensure():
        tower = hub.load_vision_tower(str(out))
    for name, value in flat(mine).items():
        np.testing.assert_array_equal(value, flat(tower)[name], err_msg=name)

    config = config_of(dataset, "none")
    config.vision.checkpoint = str(out)
    config.train.epochs = 0
    with tiny.only_devices(1):
        train(config, tmp_path / "run")
    with sharding.ensure() as mesh:
        run, _ = run_lib.load(config, tmp_path / "run", mesh)
    item = next(i for i, items in enumerate(run.dataset.test.images) if len(items))
    picture = pictures.decode(run.dataset.test.images[item][0])
    pixels = pictures.to_pixels(picture, **tower.config.preprocessing)[None]
    features, _ = run.banks.test.images.take(np.array([item]), 1)
    np.testing.assert_allclose(
        features[0].astype(np.float32), np.asarray(tower(pixels)), rtol=0.01, atol=0.02
    )


def test_export_needs_a_tower(dataset, tmp_path, capsys):
    config = tiny.config(dataset)
    config.train.epochs = 0
    with tiny.only_devices(1):
        train(config, tmp_path / "run")
    for part in ("vision", "adapter"):
        assert (
            cli.run(["export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", f"--{part}"])
            == 2
        )
        assert f"leave --{part} out" in capsys.readouterr().err
