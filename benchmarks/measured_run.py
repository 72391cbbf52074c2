"""The run that `train_step.py`, `encode.py` and `input_pipeline.py` measure."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import timing
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vixml_jax import centroids, config_rules, host_memory, metrics
from vixml_jax import config as config_lib
from vixml_jax import run as run_lib
from vixml_jax.data.pipeline import TrainingData
from vixml_jax.prepare import prepare_demo
from vixml_jax.run import Run
from vixml_jax.train_state import Tables, row_table

DEMO_QUERIES = 12_000


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Makes a parser of the flags that the scripts have in common; `doc` is the help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="prepared dataset; without one the demo's catalogue is drawn")
    parser.add_argument("--fields", default="title", help="of a text: title, or title,content")
    parser.add_argument("--checkpoint", default="random:minilm-l3", help="as config.text.checkpoint")
    parser.add_argument("--layers", type=int, default=0, help="keep the checkpoint's first so many; 0: all")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=256, help="queries of a batch")
    parser.add_argument("--row_length", type=int, default=64, help="slots of a packed row")
    parser.add_argument("--max_tokens", type=int, default=32)
    parser.add_argument("--images", type=int, default=0, help="pictures of an item, by a frozen random tower")
    parser.add_argument("--lora_rank", type=int, default=0, help="LoRA of this rank; 0: all weights train")
    parser.add_argument("--remat", default="none", choices=["none", "dots", "full"])
    parser.add_argument("--threads", type=int, default=0, help="cores for both sides; 0: all")
    parser.add_argument("--rounds", type=int, default=5, help="runs of which the median counts")
    parser.add_argument("--json", help="JSON file for the figures")
    parser.add_argument("--quick", action="store_true", help="a size that takes seconds, to see that it runs")
    return parser


def begin(options: argparse.Namespace) -> int:
    """Shrinks the options if they shall be quick, and keeps the process to its cores; returns their number.

    To be called before anything starts threads. Both sides keep what they free, as `vixml train` does.
    """
    host_memory.keep_freed()
    if options.quick:
        options.checkpoint, options.layers = "random:bert-tiny", 0
        options.batch, options.row_length, options.rounds = 32, 32, min(options.rounds, 2)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[: options.threads or len(cores)])
    return len(os.sched_getaffinity(0))


def config_of(options: argparse.Namespace, workdir: Path) -> ConfigDict:
    """A PRIME head, the loss of the real datasets' configs; no dropout, so that both sides compute alike."""
    config = config_lib.base()
    config.dataset.dir = options.dataset or str(workdir / "demo")
    config.dataset.fields = tuple(options.fields.split(","))
    config.dataset.demo_queries = 0 if options.dataset else 300 if options.quick else DEMO_QUERIES
    config.text.checkpoint, config.text.layers = options.checkpoint, options.layers
    config.text.dtype, config.text.max_tokens = options.dtype, options.max_tokens
    config.text.remat = options.remat
    if options.lora_rank:
        config.text.train, config.text.lora_rank = "lora", options.lora_rank
        config.text.lora_alpha = float(options.lora_rank)
    config.vision.images = options.images
    config.prototype.dropout = 0.0
    config.loss.name, config.loss.temperature = "decoupled_softmax", 0.05
    config.loss.positives = "uniform"
    config.train.batch_size, config.train.row_length = options.batch, options.row_length
    config.eval.items_per_call = options.batch
    if config.dataset.demo_queries and not Path(config.dataset.dir).exists():
        prepare_demo(config.dataset.dir, config.dataset.demo_queries)
    config_rules.validate(config)
    return config


def start(config: ConfigDict, workdir: Path, mesh: Mesh) -> tuple[Run, nnx.State, Tables, TrainingData]:
    """Starts a run in the mesh that is set; the first embeddings and clusters are drawn, not computed."""
    dataset = run_lib.open_dataset(config)
    run, params = run_lib.start(config, dataset, workdir, mesh)
    rng = np.random.default_rng(0)
    queries_ND = rng.standard_normal((run.spec.num_queries, run.spec.dim), np.float32)
    queries_ND /= np.linalg.norm(queries_ND, axis=1, keepdims=True)
    clusters_L = np.arange(run.spec.num_labels) % min(config.prototype.free_vectors, run.spec.num_labels)
    training = TrainingData(
        queries=run.banks.train,
        labels=run.banks.labels,
        targets=dataset.train_targets,
        propensities=metrics.inverse_propensity(dataset.train_targets, config.dataset.A, config.dataset.B),
        positives=config.loss.positives,
        row_length=config.train.row_length,
    )
    queries = row_table(queries_ND, mesh)
    tables = Tables(
        label_clusters=row_table(clusters_L.astype(np.int32), mesh),
        centroids=centroids.label_centroids(queries, dataset.train_targets),
        query_embeddings=queries,
        query_clusters=row_table(np.full(run.spec.num_queries, -1, np.int32), mesh, fill=-1),
    )
    return run, params, tables, training


def conditions(options: argparse.Namespace, cores: int) -> dict[str, Any]:
    """What figures of all scripts depend on."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": cores,
        "dtype": options.dtype,
        "batch": options.batch,
    }


def report(
    measure: Callable[[argparse.Namespace, int, Path], dict[str, Any]],
    options: argparse.Namespace,
    cores: int,
) -> None:
    """Measures in a folder that goes away, and shows and keeps the figures."""
    with tempfile.TemporaryDirectory() as folder:
        timing.report(measure(options, cores, Path(folder)), options.json)
