"""The second stage of a run: it continues, is scored as an ensemble, and is found again."""

import json
import shutil

import numpy as np
import pytest
import tiny

from vixml_jax import XmcModel, classifier_stage, classifiers, cli, data, sharding
from vixml_jax import config as config_lib
from vixml_jax import run as run_lib
from vixml_jax.errors import UserError
from vixml_jax.prepare import prepare
from vixml_jax.train import train

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(autouse=True)
def _quick(one_device):
    """Every test of this file."""


def with_classifiers(config, epochs=6):
    config.classifier.epochs = epochs
    config.classifier.batch_size = 32
    config.classifier.shortlist = 12
    config.classifier.lr = 0.05
    return config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A dataset, and runs on an off-the-shelf tower: without classifiers and with."""
    root = tmp_path_factory.mktemp("stage")
    prepare(tiny.write_raw(root / "raw", seed=3, images=False), root / "dataset", "tiny")
    with tiny.only_devices(1):
        config = tiny.config(root / "dataset")
        config.train.epochs = 0
        config.retrieval.kind = "exact"
        train(config, root / "plain")
        shutil.copytree(root / "plain", root / "run")  # a finished run, to which classifiers are then added
        train(with_classifiers(config), root / "run")
    return root


def load(workdir):
    config = config_lib.load(workdir / "config.json")
    with sharding.use(sharding.make_mesh()) as mesh:
        model = run_lib.load_model(workdir, mesh)
        return classifier_stage.load(config, workdir, model.spec, model.step, mesh)


def figures_of(workdir):
    return json.loads((workdir / "metrics.json").read_text())


def test_classifiers_raise_an_untrained_tower(root):
    assert figures_of(root / "run")["P@1"] > figures_of(root / "plain")["P@1"]
    losses = [record["classifier/loss"] for record in records(root / "run") if "classifier/loss" in record]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def records(workdir):
    """What is in metrics.jsonl, without times."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if "perf/" not in name} for line in lines
    ]


def test_a_finished_run_that_is_run_again_keeps_its_records(root, tmp_path):
    shutil.copytree(root / "run", tmp_path / "run")
    train(config_lib.load(tmp_path / "run" / "config.json"), tmp_path / "run")
    assert records(tmp_path / "run") == records(root / "run")


def test_predictions_are_those_of_the_ensemble(root):
    labels = np.load(root / "run" / "embeddings" / "labels.npy")
    np.testing.assert_array_equal(labels, np.load(root / "plain" / "embeddings" / "labels.npy"))
    vectors = load(root / "run")
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = np.load(root / "run" / "embeddings" / "test.npy")
    scores = 0.5 * queries @ labels.T + 0.5 * queries @ vectors.T
    model = XmcModel.load(root / "run")
    ids, found = model.predict(list(data.load(root / "dataset").test.texts), k=5)
    np.testing.assert_allclose(found, -np.sort(-scores, axis=1)[:, :5], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(scores, ids, axis=1), found, atol=1e-5)


def test_the_weight_may_be_chosen_afterwards(root, tmp_path):
    shutil.copytree(root / "run", tmp_path / "run")
    config = config_lib.load(tmp_path / "run" / "config.json")
    config.retrieval.classifier_weight = 0.0
    config_lib.save(config, tmp_path / "run" / "config.json")
    assert not cli.run(["eval", f"--workdir={tmp_path / 'run'}"])
    assert figures_of(tmp_path / "run") == figures_of(root / "plain")


def test_a_stage_that_was_killed_continues(root, tmp_path, monkeypatch):
    shutil.copytree(root / "plain", tmp_path / "run")
    place, count = classifiers.place, 0

    def killed(*args):
        nonlocal count
        count += 1
        if count == 11:  # three steps an epoch: in the fourth one
            raise KeyboardInterrupt
        return place(*args)

    config = with_classifiers(config_lib.load(tmp_path / "run" / "config.json"))
    with monkeypatch.context() as patch:
        patch.setattr(classifiers, "place", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run")
    with pytest.raises(UserError, match="no finished classifiers"):
        load(tmp_path / "run")
    train(config, tmp_path / "run")
    np.testing.assert_array_equal(load(tmp_path / "run"), load(root / "run"))
    assert figures_of(tmp_path / "run") == figures_of(root / "run")
    assert records(tmp_path / "run") == records(root / "run")


def test_other_settings_begin_anew(tmp_path):
    directory = tmp_path / "classifiers"
    for origin, kept in (({"step": 1}, False), ({"step": 1}, True), ({"step": 2}, False)):
        classifier_stage._claim(directory, origin)
        assert (directory / "checkpoint").exists() == kept
        (directory / "checkpoint").touch()


def test_of_classifiers_half_removed_nothing_counts(tmp_path, monkeypatch):
    directory = tmp_path / "classifiers"
    classifier_stage._claim(directory, {"step": 1})
    (directory / "checkpoint").touch()

    def killed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            classifier_stage._claim(directory, {"step": 2})
    classifier_stage._claim(directory, {"step": 1})  # as before
    assert not (directory / "checkpoint").exists()


def test_eval_takes_a_tower_off_the_shelf(root, tmp_path):
    """`vixml eval` of no epochs needs no run before it, and labels are their texts whatever the prototype."""
    config = tiny.config(root / "dataset")
    assert config.prototype.kind == "prime"
    path = tmp_path / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n  return ConfigDict({config.to_dict()!r})\n"
    )
    command = ["eval", f"--config={path}", "--config.train.epochs=0", f"--workdir={tmp_path / 'run'}"]
    assert not cli.run([*command, "--config.text.query_prompt=find {text}"])
    assert json.loads((tmp_path / "run" / "model.json").read_text())["prototype"] == "none"
    queries, labels = (
        [np.load(run / "embeddings" / f"{of}.npy") for run in (root / "plain", tmp_path / "run")]
        for of in ("test", "labels")
    )
    np.testing.assert_allclose(*labels, atol=1e-6)
    assert not np.allclose(*queries, atol=1e-3)  # an instruction for queries alone
