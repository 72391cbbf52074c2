"""A run: its dataset, banks, tokenizer and model, as they lie in a workdir."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vixml_jax import banks as banks_lib
from vixml_jax import config as config_lib
from vixml_jax import config_rules, data, distributed, files, model_factory, sharding
from vixml_jax.banks import Banks, Layout
from vixml_jax.checkpoint import MODEL_PARTS, Checkpointer
from vixml_jax.data.dataset import XmcDataset, holdout, subset
from vixml_jax.data.image_bank import ImageBank
from vixml_jax.data.tokenizer import Tokenizer
from vixml_jax.embedding import Embedder
from vixml_jax.errors import UserError
from vixml_jax.model_factory import ModelSpec
from vixml_jax.models.dual_encoder import DualEncoder
from vixml_jax.train_state import Tables, abstract_tables

# File of a workdir that says what its model is; it is there once training can begin.
MODEL = "model.json"
# About so many pictures the image projection's start is fitted to.
PROJECTION_SAMPLE = 4096


@dataclasses.dataclass(frozen=True)
class Run:
    """What the jobs share, all but the weights.

    Attributes:
      config: the run's config.
      workdir: where its files lie.
      mesh: where it runs.
      dataset: the prepared dataset, held-out queries set aside when the config says so.
      banks: its splits as the tower reads them.
      spec: what the model is.
      graphdef: the model's structure.
      frozen: what of the model never trains.
      embedder: embeds whole banks.
    """

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    dataset: XmcDataset
    banks: Banks
    spec: ModelSpec
    graphdef: nnx.GraphDef[DualEncoder]
    frozen: nnx.State
    embedder: Embedder


def begin(config: ConfigDict, workdir: Path) -> None:
    """Checks a config and makes it the workdir's `config.json`.

    Raises:
      UserError: if the config is wrong, or one that computes something else began the run in `workdir`.
    """
    config_rules.validate(config)
    # The run may be opened from elsewhere.
    config.dataset.dir = os.path.abspath(config.dataset.dir)
    for section, field in (("text", "checkpoint"), ("text", "adapter"), ("vision", "checkpoint")):
        if os.path.isdir(config[section][field]):
            config[section][field] = os.path.abspath(config[section][field])
    path = workdir / "config.json"

    def write() -> None:
        if (workdir / MODEL).exists():
            config_lib.check_resumable(config_lib.load(path), config, workdir)
        elif (workdir / "tokenizer").exists():
            # What a run that never started has left, perhaps by a mistaken config.
            shutil.rmtree(workdir / "tokenizer")
        workdir.mkdir(parents=True, exist_ok=True)
        config_lib.save(config, path)

    distributed.on_lead(write)


def open_dataset(config: ConfigDict) -> XmcDataset:
    """Loads the config's dataset; with `dataset.holdout` its test split is a share of the training queries.

    Raises:
      UserError: if it is not there, or a split is empty.
    """
    dataset = data.load(config.dataset.dir)
    if config.dataset.holdout:
        dataset = holdout(dataset, config.dataset.holdout, seed=0, by=config.dataset.holdout_by)
    firsts = {}
    for split in ("train", "test"):
        size, most = len(getattr(dataset, split)), config.dataset[f"max_{split}"]
        if not size:
            raise UserError(
                f"has no {split} queries",
                file=config.dataset.dir,
                fix="set training queries aside with --config.dataset.holdout=0.1",
            )
        firsts[f"{split}_rows"] = np.arange(most) if 0 < most < size else None
    return subset(dataset, **firsts)


def start(config: ConfigDict, dataset: XmcDataset, workdir: Path, mesh: Mesh) -> tuple[Run, nnx.State]:
    """Makes the banks and a model with its starting weights; writes `tokenizer/` and `model.json`.

    Must be called inside the mesh.

    Returns:
      The run and the parameters that train.
    """
    if (workdir / MODEL).exists():
        spec = _read_spec(workdir)
        check_dataset(dataset, spec, config)
        check_bases(spec)
    tokenizer = distributed.lead_first(lambda: banks_lib.tokenizer_for(config, dataset, workdir))
    layout = banks_lib.layout_for(config, tokenizer)
    banks = _banks(config, dataset, tokenizer, layout)
    features = None
    if banks.train.images is not None and banks.labels.images is not None:
        features = _feature_sample([banks.train.images, banks.labels.images], config.train.seed)
        features = features.reshape(-1, features.shape[1] // config.vision.tokens)
        if len(features) < 2:
            raise UserError(
                f"config.vision.images={config.vision.images}, but the dataset has no pictures",
                file=config.dataset.dir,
                fix="give --config.vision.images=0",
            )
    model, spec = model_factory.create(
        config,
        vocab_size=tokenizer.vocab_size,
        num_labels=len(dataset.labels),
        num_queries=len(dataset.train),
        dataset=dataset.fingerprint,
        # Only of what is read again when the run is opened: hashing a large checkpoint takes a while.
        base_fingerprint=_base_fingerprint(config.text) if config.text.train != "full" else "",
        vision_fingerprint=(
            banks_lib.tower_fingerprint(config.vision.checkpoint) if config.vision.train == "lora" else ""
        ),
        layout=layout.to_json(),
        longest=layout.longest(config),
        image_features=features,
    )
    distributed.on_lead(lambda: files.write_json(workdir / MODEL, dataclasses.asdict(spec)))
    graphdef, params, frozen = model_factory.split(model, spec.train, spec.vision_train)
    return Run(
        config, workdir, mesh, dataset, banks, spec, graphdef, frozen, make_embedder(config, graphdef, mesh)
    ), params


def resume(config: ConfigDict, dataset: XmcDataset, workdir: Path, mesh: Mesh) -> tuple[Run, nnx.State]:
    """Makes the run that `start` has begun in `workdir`, to continue it from a checkpoint.

    Of its starting weights only those are read that never train. Must be called inside the mesh.

    Returns:
      The run, and the shapes of the parameters that train.
    """
    spec = _read_spec(workdir)
    check_dataset(dataset, spec, config)
    check_bases(spec)
    banks = _banks(config, dataset, Tokenizer.load(workdir / "tokenizer"), Layout.from_json(spec.layout))
    graphdef, params, frozen = model_factory.skeleton(spec)
    return Run(
        config, workdir, mesh, dataset, banks, spec, graphdef, frozen, make_embedder(config, graphdef, mesh)
    ), params


def load(config: ConfigDict, workdir: Path, mesh: Mesh) -> tuple[Run, TrainedModel]:
    """Opens a finished or interrupted run: its newest checkpoint and the banks of its dataset.

    Must be called inside the mesh.
    """
    model = load_model(workdir, mesh)
    dataset = open_dataset(config)
    check_dataset(dataset, model.spec, config)
    return with_banks(model, config, dataset, workdir, mesh), model


def with_banks(
    model: TrainedModel, config: ConfigDict, dataset: XmcDataset, workdir: Path, mesh: Mesh
) -> Run:
    """Makes a run of a model that is loaded already, and the banks of its dataset."""
    banks = _banks(config, dataset, model.tokenizer, model.layout)
    embedder = make_embedder(config, model.graphdef, mesh)
    return Run(config, workdir, mesh, dataset, banks, model.spec, model.graphdef, model.frozen, embedder)


def check_dataset(dataset: XmcDataset, spec: ModelSpec, config: ConfigDict) -> None:
    """Refuses a dataset that is not the one a run was trained on: its tables go by row number."""
    if dataset.fingerprint != spec.dataset:
        raise UserError(
            "not the dataset that the run was trained on, or not the same rows of it",
            file=config.dataset.dir,
            fix="give that one, or another --workdir",
        )


def check_bases(spec: ModelSpec) -> None:
    """Refuses weights that never trained, and are in no checkpoint, when they are not those of the run."""
    text, vision = spec.base, spec.vision and spec.vision["base"]
    found = {}
    if text:
        adapter = text["adapter"] if spec.train != "lora" else ""  # LoRA's own are in the checkpoint
        found[text["checkpoint"]] = (text["fingerprint"], _fingerprint(text["checkpoint"], adapter))
    if vision:
        found[vision["checkpoint"]] = (vision["fingerprint"], _fingerprint(vision["checkpoint"]))
    for checkpoint, (then, now) in found.items():
        if then != now:
            raise UserError(
                "the weights under what the run trained have changed since",
                file=checkpoint,
                fix="bring back the files of that time",
            )


def _base_fingerprint(text: ConfigDict) -> str:
    return _fingerprint(text.checkpoint, text.adapter if text.train != "lora" else "")


def _fingerprint(checkpoint: str, adapter: str = "") -> str:
    """Names the content of a checkpoint, and of the adapter that is merged into it."""
    names = filter(None, (checkpoint, adapter))
    return "-".join(banks_lib.tower_fingerprint(name) for name in names)


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """The newest checkpoint of a workdir, without its dataset.

    Attributes:
      config, spec, tokenizer: as the run wrote them.
      graphdef, params, frozen: the model.
      tables: free-vector map, centroids, last query embeddings.
      step: of the checkpoint.
    """

    config: ConfigDict
    spec: ModelSpec
    tokenizer: Tokenizer
    graphdef: nnx.GraphDef[DualEncoder]
    params: nnx.State
    frozen: nnx.State
    tables: Tables
    step: int

    @property
    def layout(self) -> Layout:
        """How texts become the sequences that the tower reads."""
        return Layout.from_json(self.spec.layout)


def load_model(workdir: Path, mesh: Mesh) -> TrainedModel:
    """Restores the newest checkpoint of `workdir`. Must be called inside the mesh."""
    files.check_run(workdir, MODEL)
    config = config_lib.load(workdir / "config.json")
    spec = _read_spec(workdir)
    check_bases(spec)
    graphdef, params, frozen = model_factory.skeleton(spec)
    with Checkpointer(workdir, only=MODEL_PARTS) as checkpointer:
        params, tables = checkpointer.restore_model(params, tables_of(spec, mesh))
        step = checkpointer.latest_step()
    assert step is not None  # something was restored
    tokenizer = Tokenizer.load(workdir / "tokenizer")
    return TrainedModel(config, spec, tokenizer, graphdef, params, frozen, tables, step)


def _read_spec(workdir: Path) -> ModelSpec:
    try:
        return ModelSpec(**files.read_json(workdir / MODEL))
    except TypeError as error:
        raise UserError(f"written by another version ({error})", file=workdir / MODEL) from None


def tables_of(spec: ModelSpec, mesh: Mesh) -> Tables:
    """Returns the shapes of the run's tables, to be restored into."""
    return abstract_tables(spec.num_labels, spec.num_queries, spec.dim, mesh)


def _banks(config: ConfigDict, dataset: XmcDataset, tokenizer: Tokenizer, layout: Layout) -> Banks:
    """Makes or opens the run's banks; of several processes the lead makes them, with its own devices."""

    def build() -> Banks:
        return banks_lib.build(config, dataset, tokenizer, layout)

    if jax.process_count() == 1:
        return build()
    with sharding.use(sharding.make_mesh(devices=jax.local_devices())):
        return distributed.lead_first(build)


def _feature_sample(banks: list[ImageBank], seed: int) -> np.ndarray:
    """Returns the embeddings of some pictures, float32 [n, V], each bank giving in proportion to its size."""
    rng = np.random.default_rng(seed)
    used = [bank.used_rows() for bank in banks]
    share = min(1.0, PROJECTION_SAMPLE / max(sum(map(len, used)), 1))
    parts = []
    for bank, rows in zip(banks, used, strict=True):
        chosen = rng.choice(len(rows), math.ceil(share * len(rows)), replace=False)
        parts.append(np.asarray(bank.rows[rows[np.sort(chosen)]], np.float32))
    return np.concatenate(parts)


def make_embedder(config: ConfigDict, graphdef: nnx.GraphDef[DualEncoder], mesh: Mesh) -> Embedder:
    """Makes the embedder of a run; calls and rows are as long as its config says."""
    return Embedder(
        graphdef, mesh, items_per_call=config.eval.items_per_call, row_length=config.train.row_length
    )
