import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
import tiny

from vixml_jax import XmcModel, data, evaluate, sharding
from vixml_jax import config as config_lib
from vixml_jax import run as run_lib
from vixml_jax import train as train_lib
from vixml_jax.config_rules import MODALITIES
from vixml_jax.errors import UserError
from vixml_jax.prepare import prepare
from vixml_jax.train import train


@pytest.fixture(autouse=True)
def _quick(one_device):
    """Every test but that of the meshes."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    prepare(tiny.write_raw(root / "raw", seed=0), root / "dataset", "tiny")
    return root / "dataset"


def losses(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """Finished runs by the pictures that they use."""
    root = tmp_path_factory.mktemp("runs")
    with tiny.only_devices(1):
        for images in (0, 2):
            config = tiny.config(dataset, images)
            config.train.epochs = 20
            config.eval.every = 10
            train(config, root / str(images))
    return {images: root / str(images) for images in (0, 2)}


@pytest.mark.parametrize("images", [0, 2])
def test_a_run_learns_and_leaves_what_it_promises(runs, images):
    workdir = runs[images]
    figures = json.loads((workdir / "metrics.json").read_text())
    chance = 100 * 2 / 30
    assert figures["P@1"] > 4 * chance
    for name in ("config.json", "model.json", "predictions.npz", "embeddings/labels.npy", "index",
                 "index_of.json", "checkpoints", "events", "tokenizer"):  # fmt: skip
        assert (workdir / name).exists(), name
    curve = losses(workdir)
    assert curve[max(curve)] < curve[min(curve)]
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evaluated = {record["step"]: record["eval/P@1"] for record in records if "eval/P@1" in record}
    assert sorted(evaluated) == [30, 60]  # three steps an epoch
    assert evaluated[60] == pytest.approx(figures["P@1"])
    rates = [record["train/lr"] for record in records if "train/lr" in record]
    assert max(rates) == pytest.approx(1e-3, rel=0.1)
    assert rates[-1] < 1e-4


def test_pictures_tell_what_titles_leave_out(runs):
    figures = {images: json.loads((runs[images] / "metrics.json").read_text()) for images in runs}
    assert figures[2]["R@3"] > figures[0]["R@3"]


KILLED = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import tiny
    from vixml_jax import train_step
    from vixml_jax.train import train
    train(tiny.config(Path({dataset!r}), images=2), Path({workdir!r}))
"""


def run_until(workdir, dataset, step):
    """Runs training in a process of its own and kills it once `step` is logged."""
    code = textwrap.dedent(KILLED).format(
        tests=os.path.dirname(__file__), dataset=str(dataset), workdir=str(workdir)
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None:
        path = workdir / "metrics.jsonl"
        if step is not None and path.exists() and f'"step": {step},' in path.read_text():
            saved = [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    _, errors = process.communicate()
    assert process.returncode == (0 if step is None else -signal.SIGKILL), errors
    assert step is None or saved, "killed before there was a checkpoint"


def test_killed_and_continued_is_uninterrupted(dataset, tmp_path):
    run_until(tmp_path / "whole", dataset, None)
    run_until(tmp_path / "killed", dataset, 5)  # in the middle of the second epoch of three steps
    run_until(tmp_path / "killed", dataset, None)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert (whole / "metrics.json").read_text() == (killed / "metrics.json").read_text()
    assert losses(whole) == losses(killed)
    np.testing.assert_array_equal(
        np.load(whole / "embeddings" / "test.npy"), np.load(killed / "embeddings" / "test.npy")
    )


@pytest.mark.parametrize(
    ("sizes", "adapted"),
    [
        ((2, 2, 2), False),
        pytest.param((8, 1, 1), False, marks=pytest.mark.slow),
        pytest.param((1, 8, 1), False, marks=pytest.mark.slow),
        pytest.param((2, 2, 2), True, marks=pytest.mark.slow),
        pytest.param((2, 4, 1), True, marks=pytest.mark.slow),
    ],
)
def test_every_mesh_gives_the_same_curve(dataset, tmp_path, sizes, adapted):
    """On many devices in chunks of rows, on one all rows at once; an encoder, and a decoder's adapters."""
    curves = {}
    for name, (axes, devices) in {"one": ((1, 1, 1), 1), "many": (sizes, 8)}.items():
        config = tiny.config(dataset, images=2)
        config.train.chunk_rows = 2 * (devices > 1)
        if adapted:
            config.text.checkpoint, config.text.train, config.text.lora_rank = "random:qwen2-tiny", "lora", 8
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor = axes
        with tiny.only_devices(devices):
            train(config, tmp_path / name)
        curves[name] = losses(tmp_path / name)
    assert curves["one"].keys() == curves["many"].keys()
    np.testing.assert_allclose(list(curves["one"].values()), list(curves["many"].values()), rtol=2e-4)


def test_another_config_does_not_continue_a_run(dataset, runs):
    config = tiny.config(dataset)
    config.train.epochs = 20
    config.optimizer.lr = 2e-3
    with pytest.raises(UserError, match=r"optimizer\.lr was 0\.001, is 0\.002"):
        train(config, runs[0])


def test_another_dataset_does_not_continue_a_run(runs, tmp_path):
    prepare(tiny.write_raw(tmp_path / "raw", seed=5), tmp_path / "other", "tiny")
    config = tiny.config(tmp_path / "other")
    config.train.epochs = 20
    config.eval.every = 10
    with pytest.raises(UserError, match="not the dataset that the run was trained on"):
        train(config, runs[0])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("text.pooling", "max", "mean, last"),
        ("train.batch_size", 0, "at least 1"),
        ("train.row_length", 4, "row_length"),
        ("train.seed", -1, "0 or more"),
        ("eval.ks", (0,), "at least 1"),
        ("loss.temperature", 0.0, "above 0"),
        ("mesh.data", 3, "does not fit"),
        ("dataset.dir", "", "vixml prepare"),
        ("dataset.dir", "nowhere", "nowhere"),
        ("dataset.fields", ("name",), "title, content"),
        ("prototype.kind", "none", "prototype.kind"),
        ("text.checkpoint", "random:nothing", "bert-tiny"),
        ("text.prompt", "{words}", "placeholder {words}"),
        ("text.adapter", "nowhere", "nowhere"),
    ],
)
def test_a_wrong_config_is_one_clear_line(dataset, tmp_path, key, value, message):
    config = tiny.config(dataset)
    section, name = key.split(".")
    config[section][name] = value
    with pytest.raises(UserError, match=message) as caught:
        train(config, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_the_python_face_predicts_as_the_run_evaluated(dataset, runs):
    model = XmcModel.load(runs[2])
    test = data.load(dataset).test
    queries = model.encode_queries(test.texts, [list(pictures) for pictures in test.images])
    np.testing.assert_allclose(queries, np.load(runs[2] / "embeddings" / "test.npy"), atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-5)
    labels = model.encode_labels(data.load(dataset).labels.texts)
    np.testing.assert_allclose(labels, np.load(runs[2] / "embeddings" / "labels.npy"), atol=1e-5)
    ids, scores = model.predict(test.texts, [list(pictures) for pictures in test.images], k=4)
    assert ids.shape == scores.shape == (len(test), 4)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert model.encode_labels([]).shape == model.encode_queries([], []).shape == (0, model.dim)
    new = model.encode_labels(["a label nobody has seen"])
    np.testing.assert_allclose(np.linalg.norm(new, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        ("sigmoid", "dexa"),
        *(
            pytest.param(loss, kind, marks=pytest.mark.slow)
            for loss in ("triplet", "info_nce", "decoupled_softmax", "sigmoid")
            for kind in ("prime", "dexa", "none")
        ),
    ],
)
def test_every_loss_trains_with_every_prototype(dataset, tmp_path, loss, kind):
    config = tiny.config(dataset)
    config.loss.name, config.prototype.kind = loss, kind
    config.train.epochs = 2
    train(config, tmp_path / "run")
    curve = losses(tmp_path / "run")
    assert np.isfinite(list(curve.values())).all()


def test_queries_are_averaged_over_modalities_on_a_mesh(runs):
    with sharding.use(sharding.make_mesh(devices=jax.local_devices())) as mesh:
        assert mesh.size == 8
        run, model = run_lib.load(config_lib.load(runs[2] / "config.json"), runs[2], mesh)
        bank, given = run.banks.train, (model.params, run.frozen)
        text_ND, image_ND, both_ND = (run.embedder.queries(*given, bank.seen_as(name)) for name in MODALITIES)
        has_both_N1 = bank.image_counts()[:, None] > 0
        wanted_ND = np.where(has_both_N1, text_ND + image_ND, 0) + both_ND
        wanted_ND /= np.linalg.norm(wanted_ND, axis=1, keepdims=True)
        assert 0 < has_both_N1.sum() < len(bank)
        found_ND = run.embedder.queries(*given, bank, modalities=MODALITIES)
        new_ND = run.embedder.new_queries(*given, bank, None, modalities=MODALITIES)
    np.testing.assert_allclose(found_ND, wanted_ND, atol=1e-5)
    np.testing.assert_allclose(new_ND, wanted_ND, atol=1e-5)
    assert np.abs(found_ND - both_ND).max() > 0.01


@pytest.mark.parametrize(("kind", "loss"), [("none", "info_nce"), ("prime", "prime")])
def test_only_prototypes_need_a_pass_before_the_first_step(dataset, tmp_path, capsys, kind, loss):
    config = tiny.config(dataset)
    config.loss.name, config.prototype.kind = loss, kind
    config.train.epochs = 1
    config.retrieval.query_weight = 0.1  # and the near queries are those of the steps, not the zeros before
    train(config, tmp_path / "run")
    before = capsys.readouterr().err.split("train: ")[0]
    assert ("embed queries: " in before) == (kind == "prime")
    scores = np.load(tmp_path / "run" / "predictions.npz")["data"]
    assert np.isfinite(scores).all()
    assert scores.max() > 0


def test_a_run_stopped_in_its_first_epoch_knows_which_queries_it_has_embedded(dataset, tmp_path, monkeypatch):
    """Indexes are tuned on these: by zeros, which find nothing, any setting would do."""
    config = tiny.config(dataset)
    config.loss.name, config.prototype.kind, config.retrieval.query_weight = "info_nce", "none", 0.0

    def stop(*_):
        raise InterruptedError

    monkeypatch.setattr(train_lib, "end_epoch", stop)
    with pytest.raises(InterruptedError):
        train(config, tmp_path / "run")
    with sharding.use(sharding.make_mesh()) as mesh:
        run, model = run_lib.load(config, tmp_path / "run", mesh)
        queries_ND = evaluate.embed_train_queries(run, model.params, model.tables)
    assert model.step == 2
    assert len(queries_ND) == 2 * config.train.batch_size < len(run.dataset.train)
    np.testing.assert_allclose(np.linalg.norm(queries_ND, axis=1), 1, rtol=1e-5)
