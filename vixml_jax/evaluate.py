"""Evaluates a run: `vixml eval --workdir=runs/demo/vixml`.

Embeds test queries and labels with the newest checkpoint, retrieves, scores, prints the table and writes
`metrics.json`, `predictions.npz`, `embeddings/` and `index/` into the workdir.

With --modalities it evaluates queries as text, as pictures and as both against labels with and without their
pictures instead, prints the table and writes `modalities.json`: how a model that was trained with pictures
serves items without.

Examples:
  vixml eval --workdir=runs/demo/vixml
  vixml eval --workdir=runs/picto --modalities
  vixml eval --workdir=runs/picto --config.retrieval.kind=exact
  vixml eval --workdir=runs/shelf --config=configs/picto_tags.py --config.train.epochs=0

With --config.train.epochs=0, on a workdir that need not be there yet, a tower is evaluated off the shelf,
labels by their texts alone; `text.query_prompt` takes the instruction that such a model wants for queries.

The config is that of the run, or --config, with overrides. It may differ from what the run was trained with
in what training does not depend on (retrieval, eval, mesh, where data lies), and becomes that of the workdir.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import scipy.sparse
from absl import flags
from flax import nnx

from vixml_jax import (
    classifier_stage,
    classifiers,
    config_rules,
    distributed,
    files,
    metrics,
    score,
    sharding,
)
from vixml_jax import config as config_lib
from vixml_jax import run as run_lib
from vixml_jax.data.items import ItemBank
from vixml_jax.errors import UserError
from vixml_jax.run import Run
from vixml_jax.search import Searcher
from vixml_jax.train_state import Tables
from vixml_jax.types import Predictions


def define_flags() -> None:
    """Registers --config (that of the run unless given) and --workdir."""
    config_lib.define_config_flag()
    flags.DEFINE_bool(
        "modalities",
        False,
        "Evaluate queries by text, pictures and both, and labels with and without pictures",
    )


def main() -> int:
    """Runs the command."""
    if not flags.FLAGS.workdir:
        raise UserError("eval needs --workdir", fix="give the directory that `vixml train` filled")
    workdir, config = Path(flags.FLAGS.workdir), flags.FLAGS.config
    if config is not None and not config.train.epochs:
        from vixml_jax.train import train  # which evaluates by this module, and so cannot be imported above

        train(config, workdir)  # of no epochs: it makes what there is to evaluate, where it is not there yet
        if not flags.FLAGS.modalities:
            return 0
    files.check_run(workdir, "config.json")
    distributed.initialize()
    if config is None:
        config = config_lib.load(workdir / "config.json")
    else:
        run_lib.begin(config, workdir)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with sharding.use(mesh):
        run, model = run_lib.load(config, workdir, mesh)
        vectors_LD = classifier_stage.load(config, workdir, model.spec, model.step, mesh)
        if flags.FLAGS.modalities:
            write_modalities(run, modality_matrix(run, model.params, model.tables, vectors_LD))
        else:
            write(run, evaluate(run, model.params, model.tables, vectors_LD), model.step)
    return 0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation gives.

    Attributes:
      figures: metric name -> percent.
      predictions: the retrieved labels of every test query, filter pairs still in.
      queries: L2-normalised float32 [N, D] test query embeddings.
      labels: L2-normalised float32 [L, D] label embeddings.
      searcher: the indexes.
    """

    figures: dict[str, float]
    predictions: Predictions
    queries: np.ndarray
    labels: np.ndarray
    searcher: Searcher


def searches_here(run: Run) -> bool:
    """Whether this process searches: the lead, or all where the index lies on their devices."""
    return distributed.is_lead() or run.config.retrieval.kind == "mesh"


def embed_queries(run: Run, params: nnx.State, bank: ItemBank, title: str) -> np.ndarray:
    """Embeds queries as `config.retrieval.modalities` says, float32 [N, D].

    All processes must call it; those that do not search get no rows.
    """
    return run.embedder.queries(
        params,
        run.frozen,
        bank,
        title,
        modalities=run.config.retrieval.modalities,
        here=searches_here(run),
    )


def embed_labels(
    run: Run, params: nnx.State, tables: Tables, bank: ItemBank | None = None, title: str = "embed labels"
) -> np.ndarray:
    """Embeds labels as they are searched, float32 [L, D]; those of `bank` where they come in another guise.

    All processes must call it; those that do not search get no rows.
    """
    bank = run.banks.labels if bank is None else bank
    return run.embedder.labels(params, run.frozen, bank, tables, title, here=searches_here(run))


def embed_train_queries(run: Run, params: nnx.State, tables: Tables) -> np.ndarray:
    """Embeds training queries as an index wants them, float32 [N, D].

    Where they are searched too they are embedded; else they are as the steps gathered them, some steps old:
    good enough to tune an index on. Of a run that has been stopped in its first epoch there may be fewer.
    All processes must call it; those that do not search get no rows.
    """
    if run.config.retrieval.query_weight:
        return embed_queries(run, params, run.banks.train, "embed train queries")
    queries_ND = sharding.fetch(tables.query_embeddings, len(run.dataset.train), here=searches_here(run))
    embedded_N = queries_ND.any(axis=1)
    return queries_ND if embedded_N.all() else queries_ND[embedded_N]  # zeros: no step has embedded it yet


def make_searcher(
    run: Run, labels_LD: np.ndarray, train_queries_ND: np.ndarray, label_vectors_LD: np.ndarray | None
) -> Searcher | None:
    """Builds the indexes, which takes a while: what devices do together is best done before.

    Args:
      run: its config says which.
      labels_LD, train_queries_ND: embeddings.
      label_vectors_LD: classifiers; their scores are mixed with those of the label embeddings.

    Returns:
      The indexes; None in a process that does not search.
    """
    if not searches_here(run):
        return None
    settings, targets = run.config.retrieval, run.dataset.train_targets
    searched_LD = classifiers.mixed(labels_LD, label_vectors_LD, settings.classifier_weight)
    return Searcher.build(searched_LD, train_queries_ND, targets, settings)


def evaluate(
    run: Run, params: nnx.State, tables: Tables, label_vectors_LD: np.ndarray | None = None
) -> Evaluation | None:
    """Embeds, retrieves and scores the test split, with the classifiers' scores where they are given.

    All processes must call it, and leave it together; one that does not search returns None.
    """
    labels_LD = embed_labels(run, params, tables)
    train_queries_ND = embed_train_queries(run, params, tables)
    queries_ND = embed_queries(run, params, run.banks.test, "embed test queries")
    searcher = make_searcher(run, labels_LD, train_queries_ND, label_vectors_LD)
    result = None
    if searcher is not None:
        figures, predictions = retrieve_and_score(run, searcher, queries_ND, len(labels_LD))
        result = Evaluation(figures, predictions, queries_ND, labels_LD, searcher)
    distributed.wait_for_all()
    return result


def modality_matrix(
    run: Run, params: nnx.State, tables: Tables, label_vectors_LD: np.ndarray | None = None
) -> dict[str, dict[str, float]]:
    """Evaluates {text, image, text+image} queries against {text, text+image} labels.

    Queries of text and pictures are as `config.retrieval.modalities` says; so are training queries, where
    they are searched too: they are known beforehand.

    Returns:
      "QUERIES/LABELS" -> metric name -> percent; nothing in a process that does not search.

    Raises:
      UserError: if the run has no pictures.
    """
    if run.banks.test.images is None:
        raise UserError("the run has no pictures", file=run.workdir, fix="leave --modalities out")
    queries = {
        name: embed_queries(run, params, run.banks.test.seen_as(name), f"embed test queries, {name}")
        for name in config_rules.MODALITIES
    }
    labels = {
        name: embed_labels(run, params, tables, run.banks.labels.seen_as(name), f"embed labels, {name}")
        for name in ("text", "text+image")
    }
    train_queries_ND = embed_train_queries(run, params, tables)
    matrix = {}
    for label_name, labels_LD in labels.items():
        searcher = make_searcher(run, labels_LD, train_queries_ND, label_vectors_LD)
        if searcher is None:
            continue
        for query_name, queries_ND in queries.items():
            figures, _ = retrieve_and_score(run, searcher, queries_ND, len(labels_LD))
            matrix[f"{query_name}/{label_name}"] = figures
    distributed.wait_for_all()
    return matrix


def retrieve_and_score(
    run: Run, searcher: Searcher, queries_ND: np.ndarray, num_labels: int
) -> tuple[dict[str, float], Predictions]:
    """Returns the figures of the test queries' embeddings, and what was retrieved for them."""
    predictions = searcher.search(queries_ND, labels_needed(run, num_labels), "search labels")
    return scored(run, predictions), predictions


def labels_needed(run: Run, num_labels: int) -> int:
    """How many labels a test query must be given, for the config and for the metrics."""
    pairs = run.dataset.filter_pairs_test
    # A row's filter pairs are cut out of what is retrieved, so that many more are needed.
    extra = int(np.bincount(pairs[:, 0]).max()) if len(pairs) else 0
    k = max(run.config.retrieval.k, *run.config.eval.ks, *metrics.RECALL_CUTS)
    return min(k + extra, num_labels)


def scored(run: Run, predictions: Predictions) -> dict[str, float]:
    """Returns the figures of what was retrieved for the test queries, filter pairs still in."""
    config, dataset = run.config, run.dataset
    return metrics.evaluate(
        predictions,
        dataset.test_targets,
        dataset.train_targets,
        ks=tuple(config.eval.ks),
        A=config.dataset.A,
        B=config.dataset.B,
        filter_pairs=dataset.filter_pairs_test,
    )


def write_modalities(run: Run, matrix: dict[str, dict[str, float]]) -> None:
    """Writes `modalities.json` and prints P@1 and R@100 of every pair."""
    if not distributed.is_lead():
        return
    files.write_json(run.workdir / "modalities.json", matrix)
    print(f"{'queries':<12}{'labels':<12}{'P@1':>8}{'R@100':>8}")
    for pair, figures in matrix.items():
        query, label = pair.split("/")
        print(f"{query:<12}{label:<12}{figures['P@1']:>8.2f}{figures['R@100']:>8.2f}")
    print(f"modalities.json is in {run.workdir}")


def write(run: Run, result: Evaluation | None, step: int) -> dict[str, float]:
    """Writes an evaluation of the checkpoint of `step` into the workdir; prints and returns its figures."""

    def by_lead() -> dict[str, float]:
        assert result is not None  # the lead always searches
        save_array(run.workdir / "embeddings" / "test.npy", result.queries)
        save_array(run.workdir / "embeddings" / "labels.npy", result.labels)
        result.searcher.save(run.workdir, step)
        with files.atomic_file(run.workdir / "predictions.npz") as file:
            scipy.sparse.save_npz(file, to_csr(result.predictions, len(result.labels)))
        files.write_json(run.workdir / "metrics.json", result.figures)
        print(score.table(result.figures))
        print(f"metrics.json, predictions.npz, embeddings/ and index/ are in {run.workdir}")
        return result.figures

    return distributed.on_lead(by_lead)


def to_csr(predictions: Predictions, num_labels: int) -> scipy.sparse.csr_matrix:
    """Returns predictions as a matrix of scores [N, L]."""
    found = predictions.ids >= 0
    indptr = np.concatenate([[0], np.cumsum(found.sum(1))])
    matrix = scipy.sparse.csr_matrix(
        (predictions.scores[found], predictions.ids[found], indptr), shape=(len(found), num_labels)
    )
    matrix.sort_indices()
    return matrix


def save_array(path: Path, values: np.ndarray) -> None:
    """Writes a .npy file, atomically."""
    with files.atomic_file(path) as file:
        np.save(file, values)
