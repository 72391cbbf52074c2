"""The config of a run: every field with its default, its unit and where it comes from.

Dataset files in `configs/` start from `base()` and state their differences. Inside the library functions
take values, not the config; only jobs and training parts read it.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_flags

from vixml_jax import files
from vixml_jax.errors import UserError

# What may differ when a run is continued: nothing of it changes what is computed.
FREE_TO_CHANGE = (
    "train.chunk_rows",
    "train.log_every",
    "train.wandb",
    "checkpoint",
    "eval",
    "retrieval",
    "classifier",
    "mesh",
    "dataset.dir",
    "dataset.cache_dir",
)


def base() -> ConfigDict:
    """Returns the defaults: the ViXML paper's recipe for encoders, on a small random tower."""
    config = ConfigDict()

    config.dataset = dataset = ConfigDict()
    dataset.dir = ""  # what `vixml prepare --out` made
    dataset.fields = ("title",)  # of "title", "content": joined by a space they are an item's text
    dataset.A = 0.55  # propensity model (Jain et al. 2016): 0.6 for the Amazon family
    dataset.B = 1.5  # 2.6 for the Amazon family
    dataset.holdout = 0.0  # share of the training queries set aside and used as the test split, for choices
    dataset.holdout_by = "row"  # what is drawn: "row", "title" or "first_word" (see data.holdout)
    dataset.max_train = 0  # use only the first n training queries; 0 = all
    dataset.max_test = 0  # the same for test queries
    dataset.demo_queries = 0  # training queries of the embedded catalogue, drawn where `dir` is not there
    dataset.cache_dir = ""  # where token and image banks go; "" = beside the dataset

    config.text = text = ConfigDict()
    text.checkpoint = "random:minilm-tiny"  # hub name, local directory, or "random:<preset>"
    text.layers = 0  # keep only the first n layers; 0 = all
    text.max_tokens = 32  # special tokens counted in; 128 on LF-Amazon-131K
    text.pooling = "mean"  # over all unmasked positions, or "last"
    text.dtype = "float32"  # of the computation: "float32" or "bfloat16"
    text.remat = "none"  # what the backward pass recomputes: "none", "dots" (keeps matmuls), "full"
    text.train = "full"  # what of the tower trains: "full", "lora" (adapters; decoders) or "none"
    text.lora_rank = 256  # ViXML
    text.lora_alpha = 256.0  # the adapters' addition is multiplied by alpha / sqrt(rank)
    text.lora_rank_stabilised = True  # False: by alpha / rank
    text.lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    text.adapter = ""  # directory of a PEFT adapter: LoRA starts from it; else it is merged into the tower
    text.prompt = (
        "auto"  # what stands around an item's text and pictures, see data/prompt.py; the family's own
    )
    text.query_prompt = ""  # of queries alone; "" = the same
    text.dims = ()  # Matryoshka: the loss is the mean over these first dimensions, (64, 128, 384); () = off
    text.vocab_size = 8192  # of the tokenizer trained on the dataset; random presets only

    config.vision = vision = ConfigDict()
    vision.checkpoint = "random:vit-tiny"  # hub name, local directory, or "random:<preset>"
    vision.train = (
        "none"  # what of the tower trains: "none" (its embeddings are computed once), "lora", "full"
    )
    vision.lora_rank = 16
    vision.lora_alpha = 16.0  # the adapters' addition is multiplied by alpha / sqrt(rank)
    vision.images = 0  # pictures used of each item; 0 = text only
    vision.tokens = (
        1  # slots of a picture: 1 = the tower's own pooling; 4, 9, ... = means over a grid of patches
    )
    vision.fusion = "early"  # pictures are slots of the text tower's input, or "late": they join its output
    vision.drop_images = (
        0.0  # chance that a training item comes without its pictures: serves items without any
    )
    vision.drop_text = (
        0.0  # chance that one with pictures comes without its text: they are then learned from sooner
    )
    vision.augment = (
        0.0  # how far pictures are stretched and moved at random while the tower trains, as a share of them
    )
    vision.batch_size = 64  # pictures a device call while the image bank is filled
    vision.precomputed = False  # take embeddings that came with the raw files; the tower embeds new pictures
    vision.dtype = "float32"  # of the tower's weights and computation: or "bfloat16", for accelerators

    config.prototype = prototype = ConfigDict()
    prototype.kind = (
        "prime"  # "prime", "dexa" (adds the free vector to the label), "none" (the label's text alone)
    )
    prototype.free_vectors = 65_536  # shared by all labels; PRIME
    prototype.init = (
        "xavier"  # of the free vectors: "xavier" (encoders) or "labels" (mean of the cluster; decoders)
    )
    prototype.heads = 8
    prototype.feed_forward = 1024
    prototype.dropout = 0.1
    prototype.centroid_decay = 0.0  # 0 = last epoch's mean (ViXML); 0.95 = PRIME's moving average

    config.loss = loss = ConfigDict()
    loss.name = "prime"  # "prime", "triplet", "info_nce", "decoupled_softmax", "sigmoid"
    loss.negatives = 10  # hardest of the batch, a query; triplet and prime
    loss.margin_min = 0.1  # dynamic margin: clip(|S_p - S_n|, min, max); equal = fixed (NGAME: 0.3)
    loss.margin_max = 0.3
    loss.temperature = (
        0.1  # of the weights over violators in the triplet; 0.05 is usual for the softmax losses
    )
    loss.reg_weight = 0.1  # of PRIME's regulariser
    loss.reg_margin = 0.1
    loss.positives = "inverse_propensity"  # how a query's positive is drawn; or "uniform"

    config.mining = mining = ConfigDict()
    mining.start = 10  # first epoch (0-based) in clustered order; decoders 4. NGAME
    mining.every = 5  # epochs between clusterings; decoders 2
    mining.size = 16  # queries a cluster
    mining.double_at = (20, 40, 60, 80, 100, 120)  # epochs at whose end `size` doubles

    config.optimizer = optimizer = ConfigDict()
    optimizer.lr = 2e-4  # of the text tower, peak
    optimizer.vision_lr = 1e-4  # of the vision tower, where it trains, peak
    optimizer.head_lr = 5e-4  # of the image projection, free vectors and prototype net, peak
    optimizer.weight_decay = 0.01  # none on biases, norms and free vectors
    optimizer.warmup_steps = 100  # linear, then linear to 0; at most a tenth of the run
    optimizer.clip_norm = 0.0  # global gradient norm; 1.0 for decoders; 0 = off
    optimizer.eps = 1e-6

    config.train = train = ConfigDict()
    train.epochs = 300
    train.batch_size = 2048  # queries; as many label slots
    train.seed = 0
    train.row_length = 64  # slots of a packed row; at least the longest item
    train.chunk_rows = 0  # rows of a device that the tower computes at a time, again on the way back; 0 = all
    train.log_every = 10  # steps
    train.wandb = ""  # project at Weights & Biases that figures go to as well (extra `wandb`); "" = none

    config.classifier = classifier = ConfigDict()
    classifier.epochs = 0  # of a second stage on the finished tower: a vector a label; 0 = none. NGAME: 100
    classifier.lr = 1e-3  # Adam, peak; warm-up and decay as the optimizer's. NGAME
    classifier.batch_size = 2048  # queries; NGAME
    classifier.shortlist = 100  # labels near a training query, found once by the index; NGAME 300
    classifier.negatives = 5  # of them drawn into a batch, a query
    classifier.hardest = 3  # negatives of a query in the triplet; NGAME
    classifier.margin = 0.2  # of the triplet, fixed; NGAME

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # -1 = all devices that are left
    mesh.fsdp = 1
    mesh.tensor = 1

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 500  # and at the end of every epoch
    checkpoint.keep = 2  # newest ones kept: where one is damaged, the one before is taken
    checkpoint.keep_every = 0  # those of steps that are multiples of it stay for good; 0 = none

    config.retrieval = retrieval = ConfigDict()
    retrieval.kind = "scann"  # or "exact" (on the CPU), or "mesh" (exact, labels split over all devices)
    retrieval.dtype = "float32"  # of the embeddings searched: or "bfloat16", "int8"; exact and mesh only
    retrieval.dims = 0  # search by the first n dimensions of embeddings, see text.dims; 0 = all
    retrieval.k = 100  # labels retrieved a query (filter pairs come on top)
    retrieval.target_recall = 0.98  # of ScaNN against exact search, at k
    # A query that has text and pictures searches by the mean of its embeddings as each of these, of "text",
    # "image" and "text+image".
    retrieval.modalities = ("text+image",)
    retrieval.query_weight = 0.0  # of near training queries, which hand their labels on; 0 = off, ViXML 0.1
    retrieval.temperature = 0.05  # of the softmax over labels and training queries found together
    retrieval.neighbours = 100  # training queries found a query
    retrieval.prior_weight = 0.0  # of log(1 + a label's training queries), added to its cosine when found
    retrieval.classifier_weight = 0.5  # of the classifiers' score in a label's score, where there are any

    config.eval = evaluation = ConfigDict()
    evaluation.every = 0  # epochs between evaluations while training; 0 = only at the end
    evaluation.ks = (1, 3, 5)
    evaluation.items_per_call = 1024  # items encoded a device call

    return config


def shrink(config: ConfigDict) -> None:
    """Makes a config a smoke test of under a minute on 2 cores: few queries, a tiny tower, two epochs."""
    config.dataset.max_train = 256
    config.dataset.max_test = 64
    config.text.checkpoint = "random:bert-tiny"
    config.text.layers = 0
    config.vision.images = min(config.vision.images, 1)
    config.prototype.free_vectors = 128
    config.train.epochs = min(config.train.epochs, 2)
    config.train.batch_size = 64
    config.train.log_every = 1
    config.mining.start = 1
    config.mining.every = 1
    config.classifier.epochs = min(config.classifier.epochs, 2)
    config.classifier.batch_size = 64
    config.retrieval.kind = "exact"


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """Reads a config argument such as "backbone=distilbert,images=3,smoke" into the types of `defaults`.

    A bare name stands for True.

    Raises:
      UserError: if a name is not in `defaults` or a value has another type.
    """
    values = ConfigDict(defaults)
    for part in filter(None, arg.split(",")):
        name, separator, raw = part.partition("=")
        if name not in defaults:
            raise UserError(
                f"unknown config argument {name!r}", fix="known are " + ", ".join(sorted(defaults))
            )
        default = defaults[name]
        try:
            if isinstance(default, bool):
                values[name] = {"": True, "true": True, "1": True, "false": False, "0": False}[raw.lower()]
            elif isinstance(default, str):
                values[name] = raw
            else:
                values[name] = type(default)(ast.literal_eval(raw))
        except (KeyError, ValueError, SyntaxError, TypeError):
            raise UserError(
                f"config argument {name}={raw!r} is not a {type(default).__name__}",
                fix=f"as in {name}={default}" if separator else f"give {name}=VALUE",
            ) from None
    return values


def longest_item(config: ConfigDict) -> int:
    """Returns how many slots an item has at most, its prompt left out."""
    return config.text.max_tokens + config.vision.images * config.vision.tokens


def get(config: ConfigDict, dotted: str) -> Any:
    """Returns the field at `section.name`."""
    value: Any = config
    for name in dotted.split("."):
        value = value[name]
    return value


def flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns every field by its dotted name, lists as tuples."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = tuple(value) if isinstance(value, (list, tuple)) else value
    return fields


def save(config: ConfigDict, path: Path) -> None:
    """Writes the resolved config as JSON."""
    files.write_json(path, json.loads(config.to_json()))


def load(path: Path) -> ConfigDict:
    """Reads what `save` wrote; an unknown field is an error, one that is missing gets its default."""
    config = base()
    _update(config, files.read_json(path), path)
    return config


def check_resumable(old: ConfigDict, new: ConfigDict, workdir: Path) -> None:
    """Refuses to continue a run under another config.

    Raises:
      UserError: naming the fields that differ, unless all of them are FREE_TO_CHANGE.
    """
    before, after = flat(old), flat(new)
    differing = [key for key in after if before.get(key) != after[key] and not key.startswith(FREE_TO_CHANGE)]
    if differing:
        shown = ", ".join(f"{key} was {before.get(key)!r}, is {after[key]!r}" for key in differing[:4])
        raise UserError(
            f"another config began this run: {shown}",
            file=workdir / "config.json",
            fix="give the old values to continue, or another --workdir",
        )


def define_config_flag(*, workdir: bool = True) -> None:
    """Registers --config=FILE[:arg], with --config.section.field=VALUE overrides, and --workdir."""
    from absl import flags

    config_flags.DEFINE_config_file(
        "config", None, "Config file, as in configs/demo.py[:arg]", lock_config=True
    )
    if workdir:
        flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, predictions")


def _update(config: ConfigDict, values: Any, path: Path, prefix: str = "") -> None:
    if not isinstance(values, dict):
        raise UserError(
            f"{prefix.removesuffix('.') or 'it'} is no object of fields",
            file=path,
            fix="bring back the file as it was written",
        )
    for name, value in values.items():
        if name not in config:
            raise UserError(
                f"unknown field {prefix}{name}", file=path, fix="it was written by another version"
            )
        if isinstance(config[name], ConfigDict):
            _update(config[name], value, path, f"{prefix}{name}.")
            continue
        try:
            if value is None:
                raise TypeError
            config[name] = tuple(value) if isinstance(value, list) else value
        except (TypeError, OverflowError):  # whole numbers may be longer than any float
            kind = type(config[name]).__name__
            raise UserError(f"{prefix}{name} is no {kind}", file=path, fix="give it as it was") from None
