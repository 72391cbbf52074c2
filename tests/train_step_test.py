"""The step against a slow reading of what it computes."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from vixml_jax import centroids, losses, metrics, optim, sharding, train
from vixml_jax import run as run_lib
from vixml_jax.data.pipeline import TrainingData, train_batches
from vixml_jax.embedding import normalized
from vixml_jax.errors import UserError
from vixml_jax.prepare import prepare
from vixml_jax.train_state import create
from vixml_jax.train_step import compile_step, make_loss


def test_matryoshka_is_the_mean_over_prefixes(tmp_path, one_device):
    prepare(tiny.write_raw(tmp_path / "raw", seed=5, images=False), tmp_path / "dataset", "tiny")
    config = tiny.config(tmp_path / "dataset")
    config.loss.name, config.loss.temperature = "decoupled_softmax", 0.05
    config.prototype.dropout = 0.0
    dataset = run_lib.open_dataset(config)
    with sharding.use(sharding.make_mesh()) as mesh:
        run, params = run_lib.start(config, dataset, tmp_path / "run", mesh)
        label_centroids = centroids.LabelCentroids(
            dataset.train_targets, sharding.table_rows(len(dataset.train)), mesh
        )
        params, tables = train.first_tables(run, params, label_centroids)
        training = TrainingData(
            run.banks.train,
            run.banks.labels,
            dataset.train_targets,
            metrics.inverse_propensity(dataset.train_targets, 0.55, 1.5),
            "uniform",
            config.train.row_length,
        )
        batch = next(iter(train_batches(training, np.arange(96), 32, mesh, seed=0, epoch=0)))
        optimizer = optim.make(**config.optimizer, total_steps=10)
        state = create(params, optimizer, tables, mesh)
        dims = (8, 24, run.spec.dim)
        loss = make_loss(**train.loss_settings(config))
        step = compile_step(run.graphdef, optimizer, loss, state, 0, dims)

        queries = run.embedder.queries(params, run.frozen, run.banks.train)[np.asarray(batch.query_rows)]
        labels = run.embedder.labels(params, run.frozen, run.banks.labels, tables)
        labels = labels[np.asarray(batch.label_ids)]
        _, figures = step(state, run.frozen, batch)
    expected = [
        losses.decoupled_softmax(
            normalized(queries[:, :dim]) @ normalized(labels[:, :dim]).T, batch.targets, temperature=0.05
        )
        for dim in dims
    ]
    assert len({round(float(value), 3) for value in expected}) == 3
    np.testing.assert_allclose(figures["train/loss"], np.mean(expected), rtol=1e-4)


def test_prefixes_are_no_longer_than_embeddings():
    config = tiny.config("nowhere")
    config.text.dims = (8, 400)
    with pytest.raises(UserError, match=r"text\.dims has 400; embeddings have 384"):
        train.check_dims(config, 384)
    config.text.dims, config.retrieval.dims = (), 385
    with pytest.raises(UserError, match=r"retrieval\.dims has 385"):
        train.check_dims(config, 384)
