"""Trains: `vixml train --config=configs/demo.py --workdir=runs/demo/text`.

Run again on the same workdir, where --config may be left out, it continues where it stopped. SIGTERM, which
schedulers send before they take a machine away, saves and ends it with exit code 75; a second run on the same
workdir is refused. At the end it evaluates and writes `metrics.json`, `predictions.npz`, `embeddings/` and
`index/` into the workdir.

Examples:
  vixml train --config=configs/picto_tags.py:images=3 --workdir=runs/picto
  vixml train --config=configs/picto_tags.py --config.optimizer.lr=1e-4 --workdir=runs/low
  vixml train --workdir=runs/low
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from absl import flags
from flax import nnx
from ml_collections import ConfigDict

from vixml_jax import (
    banks,
    centroids,
    classifier_stage,
    distributed,
    evaluate,
    metrics,
    mining,
    not_finite,
    optim,
    ownership,
    preemption,
    sharding,
)
from vixml_jax import config as config_lib
from vixml_jax import run as run_lib
from vixml_jax.checkpoint import Checkpointer
from vixml_jax.collapse import CollapseWatch
from vixml_jax.data.dataset import XmcDataset
from vixml_jax.data.pipeline import TrainingData, num_batches, train_batches
from vixml_jax.errors import UserError
from vixml_jax.prepare import prepare_demo
from vixml_jax.progress import Progress
from vixml_jax.run import Run
from vixml_jax.tracking import Tracker, import_wandb
from vixml_jax.train_state import Tables, TrainState, abstract, create, row_table, zero_table
from vixml_jax.train_step import compile_step, make_loss


def define_flags() -> None:
    """Registers --config and --workdir."""
    config_lib.define_config_flag()


def main() -> int:
    """Runs the command."""
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir and Path(flags.FLAGS.workdir)
    if config is None and workdir and (workdir / "config.json").is_file():
        config = config_lib.load(workdir / "config.json")
    if config is None or not workdir:
        raise UserError(
            "train needs --config and --workdir", fix="as in --config=configs/demo.py --workdir=runs/demo"
        )
    train(config, workdir)
    return 0


def train(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Trains or continues the run in `workdir`, evaluates it and returns the figures of `metrics.json`.

    Raises:
      UserError: if the config, the dataset or the workdir is not fit for it.
      Preempted: on SIGTERM, when all is saved.
    """
    if config.train.wandb:
        import_wandb()  # now, not after minutes of preparation
    distributed.initialize()
    with preemption.at_once(), ownership.owned(workdir):
        run_lib.begin(config, workdir)
        if config.dataset.demo_queries:
            distributed.on_lead(lambda: prepare_demo(config.dataset.dir, config.dataset.demo_queries))
        dataset = run_lib.open_dataset(config)
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        check_batch_size(config, "train", mesh)
        check_classifier(config, mesh)
        with (
            sharding.use(mesh),
            Checkpointer(workdir, config.checkpoint.keep, config.checkpoint.keep_every) as checkpointer,
        ):
            return train_on(mesh, config, dataset, workdir, checkpointer)


def train_on(
    mesh: jax.sharding.Mesh,
    config: ConfigDict,
    dataset: XmcDataset,
    workdir: Path,
    checkpointer: Checkpointer,
) -> dict[str, float]:
    """Trains on the mesh that is set, beginning where the newest checkpoint ends."""
    steps_per_epoch = num_batches(len(dataset.train), config.train.batch_size)
    total_steps = config.train.epochs * steps_per_epoch
    optimizer = optim.make(**config.optimizer, total_steps=total_steps)
    label_centroids = centroids.LabelCentroids(
        dataset.train_targets, sharding.table_rows(len(dataset.train)), mesh
    )
    resumed_at = checkpointer.latest_step()
    if resumed_at is None:
        run, params = run_lib.start(config, dataset, workdir, mesh)
        check_dims(config, run.spec.dim)
        params, tables = first_tables(run, params, label_centroids)
        state = create(params, optimizer, tables, mesh)
    else:
        run, params = run_lib.resume(config, dataset, workdir, mesh)
        check_dims(config, run.spec.dim)
        state = checkpointer.restore(abstract(params, optimizer, run_lib.tables_of(run.spec, mesh), mesh))
    del params  # the state holds them from here on
    logged_until = resumed_at
    if resumed_at is not None:
        logged_until = resumed_at + classifier_stage.steps_saved(config, workdir, resumed_at)
    if not total_steps:  # an off-the-shelf tower: what there is to load is the start
        checkpointer.save(state, 0)

    step_fn = compile_step(
        run.graphdef,
        optimizer,
        make_loss(**loss_settings(config)),
        state,
        config.train.seed,
        tuple(config.text.dims),
        config.train.chunk_rows,
    )
    data = training_data(run)
    step = int(state.step)
    lr_at = optim.schedule(config.optimizer.lr, config.optimizer.warmup_steps, total_steps)
    watch = CollapseWatch()
    with (
        Tracker(
            workdir,
            enabled=distributed.is_lead(),
            resumed_at=logged_until,
            last_step=total_steps,
            wandb_project=config.train.wandb,
            config=config.to_dict(),
        ) as tracker,
        Progress(total_steps, "train", "steps", initial=step) as progress,
    ):
        for epoch in range(step // steps_per_epoch, config.train.epochs):
            order = epoch_order(state.tables, len(dataset.train), config.train.seed, epoch)
            sampling = {"batch_size": config.train.batch_size, "seed": config.train.seed, "epoch": epoch}
            start, chunk_rows = step - epoch * steps_per_epoch, config.train.chunk_rows
            batches = train_batches(data, order, mesh=mesh, start=start, chunk_rows=chunk_rows, **sampling)
            stop = functools.partial(not_finite.stop, workdir, dataset, data, order, checkpointer, **sampling)
            meter = Meter(
                tracker, progress, config.train.log_every, config.train.batch_size, lr_at, stop, watch
            )
            with preemption.put_off() as is_preempted:
                for batch in batches:
                    with jax.profiler.StepTraceAnnotation("train", step_num=step):
                        state, figures = step_fn(state, run.frozen, batch)
                    step += 1
                    meter.update(step, epoch, figures)
                    ends_here = is_preempted(step)
                    if (ends_here or is_due(config.checkpoint.every_steps, step)) and step % steps_per_epoch:
                        meter.finish()  # stops where figures are not finite: no such state is saved
                        checkpointer.save(state, step)
                    if ends_here:
                        break
                if step % steps_per_epoch == 0:
                    meter.finish()
                    state = end_epoch(state, label_centroids, config, epoch, mesh, run.spec.num_queries)
                    # Before the checkpoint, so that a run that is killed in between evaluates again.
                    if is_due(config.eval.every, epoch + 1) and epoch + 1 < config.train.epochs:
                        result = evaluate.evaluate(run, state.params, state.tables)
                        tracker.log_evaluation(step, result.figures if result else {})
                    checkpointer.save(state, step)
        vectors_LD = None
        if config.classifier.epochs:
            vectors_LD = classifier_stage.train(run, state.params, state.tables, step, tracker.log)
        result = evaluate.evaluate(run, state.params, state.tables, vectors_LD)
        tracker.log_evaluation(step, result.figures if result else {})
    return evaluate.write(run, result, step)


def training_data(run: Run) -> TrainingData:
    """What the batches of a run are made of."""
    config, targets = run.config, run.dataset.train_targets
    return TrainingData(
        queries=run.banks.train,
        labels=run.banks.labels,
        targets=targets,
        propensities=metrics.inverse_propensity(targets, config.dataset.A, config.dataset.B),
        positives=config.loss.positives,
        row_length=config.train.row_length,
        drop_images=config.vision.drop_images,
        drop_text=config.vision.drop_text,
        augmentation=banks.augmentation(config),
    )


def check_classifier(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """The second stage draws negatives from an index, which every process would build a little otherwise."""
    if not config.classifier.epochs:
        return
    check_batch_size(config, "classifier", mesh)
    if jax.process_count() > 1:
        raise UserError(
            f"config.classifier.epochs={config.classifier.epochs} in {jax.process_count()} processes",
            fix="train the tower with 0, then the classifiers in one process on the same workdir",
        )


def check_batch_size(config: ConfigDict, section: str, mesh: jax.sharding.Mesh) -> None:
    """Every device takes the same number of queries."""
    batch_size, shards = config[section].batch_size, sharding.num_row_shards(mesh)
    if batch_size % shards:
        raise UserError(
            f"config.{section}.batch_size={batch_size} does not split over {shards} devices (data x fsdp)",
            fix=f"give a multiple of {shards}, such as {sharding.round_up(batch_size, shards)}",
        )


def check_dims(config: ConfigDict, dim: int) -> None:
    """Prefixes of embeddings are no longer than embeddings."""
    for name, width in [
        *(("text.dims", width) for width in config.text.dims),
        ("retrieval.dims", config.retrieval.dims),
    ]:
        if width > dim:
            raise UserError(f"config.{name} has {width}", fix=f"embeddings have {dim} dimensions")


def loss_settings(config: ConfigDict) -> dict[str, Any]:
    """The arguments of `make_loss`."""
    settings = dict(config.loss)
    del settings["positives"]  # the pipeline's, not the loss's
    return settings


def first_tables(
    run: Run, params: nnx.State, label_centroids: centroids.LabelCentroids
) -> tuple[nnx.State, Tables]:
    """One pass over all labels and queries before training: the label -> vector map and the first centroids.

    Where a label is its text alone, training reads these only after the first epoch has embedded every query,
    and there is no pass.

    Returns:
      The parameters, their free vectors set to cluster means where the config asks for it, and the tables.
    """
    spec, prototype = run.spec, run.config.prototype
    num_labels, num_queries = spec.num_labels, spec.num_queries
    no_clusters_N = row_table(np.full(num_queries, -1, np.int32), run.mesh, fill=-1)
    if spec.prototype == "none" and run.config.train.epochs:
        return params, Tables(
            label_clusters=zero_table((num_labels,), jnp.int32, run.mesh),
            centroids=zero_table((num_labels, spec.dim), jnp.float32, run.mesh),
            query_embeddings=zero_table((num_queries, spec.dim), jnp.float32, run.mesh),
            query_clusters=no_clusters_N,
        )
    texts_LD = run.embedder.table(params, run.frozen, run.banks.labels, "embed labels")
    queries_ND = run.embedder.table(params, run.frozen, run.banks.train, "embed queries", unit=True)
    clusters_L = np.zeros(num_labels, np.int32)
    if spec.prototype != "none":
        clusters_L = mining.balanced_clusters_into(
            texts_LD,
            min(prototype.free_vectors, num_labels),
            jax.random.key(run.config.train.seed),
            num_rows=num_labels,
            title="cluster labels",
        )
    if spec.prototype != "none" and prototype.init == "labels":
        shape = (num_labels, spec.num_vectors)
        pairs = np.ones(num_labels), (np.arange(num_labels), clusters_L)
        membership = scipy.sparse.csr_matrix(pairs, shape)
        means_CD = centroids.label_centroids(texts_LD, membership)
        vectors = params["free_vectors"]
        vectors[...] = jax.device_put(means_CD, vectors[...].sharding)
    return params, Tables(
        label_clusters=row_table(clusters_L, run.mesh),
        centroids=label_centroids(queries_ND),
        query_embeddings=queries_ND,
        query_clusters=no_clusters_N,
    )


def is_due(every: int, count: int) -> bool:
    """Whether something that happens every `every` counts (0: never) happens at `count`."""
    return every > 0 and count % every == 0


def epoch_order(tables: Tables, num_queries: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the epoch's queries, int64 [N]: clusters in random order, or a random permutation."""
    return mining.epoch_order(tables.clusters_of(num_queries), num_queries, seed, epoch)


def end_epoch(
    state: TrainState,
    label_centroids: centroids.LabelCentroids,
    config: ConfigDict,
    epoch: int,
    mesh: jax.sharding.Mesh,
    num_queries: int,
) -> TrainState:
    """Refreshes the centroids from the epoch's own embeddings, and clusters the queries when that is due."""
    tables = state.tables
    centroids_LD = label_centroids(tables.query_embeddings)
    if decay := config.prototype.centroid_decay:
        centroids_LD = centroids.moving_average(tables.centroids, centroids_LD, decay)
    tables = dataclasses.replace(tables, centroids=centroids_LD)
    curriculum = mining.Curriculum(**config.mining)
    if curriculum.reclusters_after(epoch):
        key = jax.random.fold_in(jax.random.key(config.train.seed), epoch)
        clusters_N = mining.balanced_clusters(
            tables.query_embeddings,
            curriculum.size_after(epoch),
            key,
            num_rows=num_queries,
            title="cluster queries",
        )
        tables = dataclasses.replace(tables, query_clusters=row_table(clusters_N, mesh, fill=-1))
    return dataclasses.replace(state, tables=tables)


class Meter:
    """Logs every few steps, fetching figures only when the next step is already under way.

    The figures of all steps are looked at when some are logged, so that none that is not finite gets by. No
    more than two steps are ever unfinished, the one that the device computes and the next: so much is what
    SIGTERM waits for.

    Args:
      tracker: where figures go.
      progress: the bar of the run.
      every: logs the steps that are multiples of it.
      batch_size: B.
      lr_at: the learning rate of a step, from 0.
      stop: called with the first step whose figures are not all finite and these figures; must not return.
      watch: sees the figures of every step.
    """

    def __init__(
        self,
        tracker: Tracker,
        progress: Progress,
        every: int,
        batch_size: int,
        lr_at: Callable[[int], Any],
        stop: Callable[[int, dict[str, float]], NoReturn],
        watch: CollapseWatch,
    ):
        self._tracker, self._progress, self._every, self._batch_size = tracker, progress, every, batch_size
        self._lr_at, self._stop, self._watch = lr_at, stop, watch
        # (step, epoch, figures on the device) of the steps since the last that was logged.
        self._unseen: list[tuple[int, int, dict[str, jax.Array]]] = []
        self._since = time.monotonic()

    def update(self, step: int, epoch: int, figures: dict[str, jax.Array]) -> None:
        """Counts a dispatched step, waits for the one before it and shows that."""
        if self._unseen:
            jax.block_until_ready(self._unseen[-1][2])
            self._progress.update(1)
            if self._unseen[-1][0] % self._every == 0:
                self._show()
        self._unseen.append((step, epoch, figures))

    def finish(self) -> None:
        """Shows the last step, whatever its number."""
        if self._unseen:
            self._progress.update(1)
            self._show()

    def _show(self) -> None:
        step, epoch, _ = self._unseen[-1]
        fetched = jax.device_get([figures for _, _, figures in self._unseen])
        steps = [{name: float(value) for name, value in figures.items()} for figures in fetched]
        bad = not_finite.first_of(steps)
        if bad is not None:
            self._stop(self._unseen[bad][0], steps[bad])
        self._watch.update(step, steps)
        now = time.monotonic()
        speed = len(steps) * self._batch_size / (now - self._since)
        self._since, self._unseen = now, []
        settings = {
            "train/epoch": epoch,
            "train/lr": float(self._lr_at(step - 1)),
            "perf/examples_per_s": speed,
        }
        self._tracker.log(step, {**steps[-1], **settings})
        self._progress.update(0, epoch=epoch, loss=steps[-1]["train/loss"], examples_per_s=speed)
