"""A run's second stage: extreme classifiers on its finished tower (see `classifiers`).

It begins when the tower is trained and `config.classifier.epochs` is not 0, also when `vixml train` is called
again on a finished run. Its state lies in `workdir/classifiers`, bound to the tower's checkpoint and to its
settings; with another checkpoint or other settings it begins anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vixml_jax import classifiers, distributed, files, metrics, mining, optim, search, sharding
from vixml_jax.checkpoint import Checkpointer
from vixml_jax.classifiers import ClassifierState
from vixml_jax.data.pipeline import num_batches
from vixml_jax.errors import UserError
from vixml_jax.model_factory import ModelSpec
from vixml_jax.progress import Progress
from vixml_jax.run import Run
from vixml_jax.train_state import Tables, row_table

# Directory of a workdir, and the file in it that says of which checkpoint and settings it is.
DIRECTORY, OF = "classifiers", "of.json"
# The state is large beside what an epoch costs: it is saved so many times, and at the end.
SAVES = 10

Log = Callable[[int, dict[str, Any]], Any]


def train(run: Run, params: nnx.State, tables: Tables, step: int, log: Log) -> np.ndarray:
    """Trains the classifiers of the checkpoint of `step`, continues them, or opens them where they are done.

    Args:
      run: the run.
      params: of the finished tower.
      tables: of its checkpoint; queries go in the order of the last clusters.
      step: the checkpoint's; figures are logged as of the steps after it.
      log: takes (step, figures).

    Returns:
      float32 [L, D], not normalised.
    """
    config, targets, mesh = run.config, run.dataset.train_targets, run.mesh
    settings, num_queries = config.classifier, run.spec.num_queries
    steps_per_epoch = num_batches(num_queries, settings.batch_size)
    total_steps = settings.epochs * steps_per_epoch
    _claim(run.workdir / DIRECTORY, _origin(config, step))

    with Checkpointer(run.workdir / DIRECTORY) as checkpointer:
        if checkpointer.latest_step() == total_steps:
            return _read_vectors(checkpointer, run.spec, mesh)
        labels_LD = run.embedder.labels(params, run.frozen, run.banks.labels, tables)
        queries_ND = run.embedder.queries(
            params,
            run.frozen,
            run.banks.train,
            "embed train queries",
            modalities=config.retrieval.modalities,
        )
        index = search.make_index(labels_LD, config.retrieval, settings.shortlist, queries_ND)
        shortlist_NK, _ = index.search(queries_ND, min(settings.shortlist, len(labels_LD)))

        state = classifiers.create(labels_LD, mesh)
        if checkpointer.latest_step() is not None:
            state = _from_parts(checkpointer.restore_parts(_parts(state)))
        step_fn = classifiers.compile_step(
            state,
            schedule=optim.schedule(settings.lr, config.optimizer.warmup_steps, total_steps),
            margin=settings.margin,
            hardest=settings.hardest,
            seed=config.train.seed,
        )
        propensities = metrics.inverse_propensity(targets, config.dataset.A, config.dataset.B)
        clusters_N = tables.clusters_of(num_queries)
        save_every = max(1, settings.epochs // SAVES)
        done = int(state.step)
        with Progress(total_steps, "train classifiers", "steps", initial=done) as progress:
            for epoch in range(done // steps_per_epoch, settings.epochs):
                figures: dict[str, Any] = {}
                for batch in classifiers.batches(
                    queries_ND,
                    targets,
                    shortlist_NK,
                    mining.epoch_order(clusters_N, num_queries, config.train.seed, epoch),
                    batch_size=settings.batch_size,
                    negatives=settings.negatives,
                    positives=config.loss.positives,
                    propensities=propensities,
                    seed=config.train.seed,
                    epoch=epoch,
                ):
                    state, figures = step_fn(state, classifiers.place(batch, mesh))
                    progress.update(1)
                done = (epoch + 1) * steps_per_epoch
                log(step + done, {**figures, "classifier/epoch": epoch})
                progress.update(0, epoch=epoch, loss=float(figures["classifier/loss"]))
                if (epoch + 1) % save_every == 0 or epoch + 1 == settings.epochs:
                    checkpointer.save_parts(_parts(state), done)
        return _on_host(state.vectors, run.spec, mesh)


def steps_saved(config: ConfigDict, workdir: Path, step: int) -> int:
    """How many steps of the classifiers of the checkpoint of `step` are trained and saved."""
    directory = workdir / DIRECTORY
    if not config.classifier.epochs or not _is_of(directory, _origin(config, step)):
        return 0
    with Checkpointer(directory) as checkpointer:
        return checkpointer.latest_step() or 0


def load(config: ConfigDict, workdir: Path, spec: ModelSpec, step: int, mesh: Mesh) -> np.ndarray | None:
    """Opens the finished classifiers of the checkpoint of `step`, float32 [L, D]; None without any.

    Raises:
      UserError: if the config has classifiers, and they are not trained for this checkpoint.
    """
    settings = config.classifier
    if not settings.epochs:
        return None
    directory = workdir / DIRECTORY
    if _is_of(directory, _origin(config, step)):
        with Checkpointer(directory) as checkpointer:
            total_steps = settings.epochs * num_batches(spec.num_queries, settings.batch_size)
            if checkpointer.latest_step() == total_steps:
                return _read_vectors(checkpointer, spec, mesh)
    raise UserError(
        f"no finished classifiers of the checkpoint of step {step}, as config.classifier asks for",
        file=directory,
        fix="run `vixml train` on this workdir again, or give --config.classifier.epochs=0",
    )


def _origin(config: ConfigDict, step: int) -> dict[str, Any]:
    """What classifiers depend on, beside the run that they are of."""
    return {"step": step, "classifier": json.loads(config.classifier.to_json())}


def _is_of(directory: Path, origin: dict[str, Any]) -> bool:
    """Whether what `directory` holds was trained for `origin`."""
    return (directory / OF).is_file() and files.read_json(directory / OF) == origin


def _claim(directory: Path, origin: dict[str, Any]) -> None:
    """Makes `directory` one of `origin`, whatever it held before."""
    if distributed.is_lead() and not _is_of(directory, origin):
        if directory.exists():
            # First what says whose it is: of one half removed nothing may be taken for whole.
            (directory / OF).unlink(missing_ok=True)
            shutil.rmtree(directory)  # or fails: what is left of it would be taken for the new one's
        files.write_json(directory / OF, origin)


def _parts(state: ClassifierState) -> dict[str, Any]:
    """A state's checkpoint, in two parts: prediction reads the vectors alone."""
    training = {"step": state.step, "means": state.means, "squares": state.squares, "updates": state.updates}
    return {"vectors": state.vectors, "training": training}


def _from_parts(parts: dict[str, Any]) -> ClassifierState:
    return ClassifierState(vectors=parts["vectors"], **parts["training"])


def _read_vectors(checkpointer: Checkpointer, spec: ModelSpec, mesh: Mesh) -> np.ndarray:
    like = row_table(np.zeros((spec.num_labels, spec.dim), np.float32), mesh)
    return _on_host(checkpointer.restore_parts({"vectors": like})["vectors"], spec, mesh)


def _on_host(vectors: jax.Array, spec: ModelSpec, mesh: Mesh) -> np.ndarray:
    """Returns a table's rows on every process, float32 [L, D]."""
    whole = jax.jit(jnp.copy, out_shardings=sharding.replicated(mesh))(vectors)
    return np.asarray(whole)[: spec.num_labels]
