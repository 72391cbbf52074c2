"""The ViXML paper's recipes, stated once: how each backbone is trained on each dataset, by each method.

The configs of the paper's datasets (`configs/lf_amazontitles_131k.py` and its like) are `get_config` of one
DATASETS entry. Whatever departs from the paper is said beside it.

Source: ViXML (arXiv 2511.13189, AAAI 2026); NGAME (WSDM 2023), DEXA (KDD 2023), PRIME (NAACL 2025) and DEXML
(ICLR 2024) for the losses of those names.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from vixml_jax import config as config_lib
from vixml_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A text tower of the paper, and how it is trained on titles.

    Attributes:
      checkpoint: name on the hub.
      decoder: trained through LoRA on frozen weights; encoders are trained whole.
      lr: of the tower (of its adapters), peak.
      batch_size: queries.
      full_text: (batch_size, lr) on titles with descriptions, where items are four times as long.
      smoke: the random preset of the same family that a smoke test trains.
    """

    checkpoint: str
    decoder: bool
    lr: float
    batch_size: int = 2048
    full_text: tuple[int, float] | None = None
    smoke: str = "random:bert-tiny"


def _decoder(checkpoint: str, family: str, batch_size: int = 2048) -> Backbone:
    return Backbone(checkpoint, True, 5e-5, batch_size, (512, 2e-5), f"random:{family}-tiny")


BACKBONES = {
    "minilm-l3": Backbone("sentence-transformers/paraphrase-MiniLM-L3-v2", False, 5e-4),
    "distilbert": Backbone(
        *("sentence-transformers/msmarco-distilbert-base-v4", False, 2e-4),
        full_text=(1024, 1e-4),
    ),
    "bert": Backbone("intfloat/e5-base-v2", False, 1e-4, full_text=(512, 5e-5)),
    "qwen2.5-0.5b": _decoder("Qwen/Qwen2.5-0.5B-Instruct", "qwen2"),
    "qwen2.5-3b": _decoder("Qwen/Qwen2.5-3B-Instruct", "qwen2"),
    "qwen2.5-7b": _decoder("Qwen/Qwen2.5-7B-Instruct", "qwen2", batch_size=1024),
    "llama-3.2-3b": _decoder("meta-llama/Llama-3.2-3B-Instruct", "llama"),
    "qwen3-4b": _decoder("Qwen/Qwen3-4B", "qwen3"),
    "qwen3-embedding-4b": _decoder("Qwen/Qwen3-Embedding-4B", "qwen3"),
    "gemma-3-4b": _decoder("google/gemma-3-4b-it", "gemma3"),
}

# Frozen. The paper has one embedding a picture from each.
VISION = {
    "siglip2": "google/siglip2-so400m-patch14-384",
    "vit": "google/vit-base-patch16-224-in21k",
}

# The prompts of Tables 6 and 11; a part in brackets is for items with pictures only.
PROMPTS = {
    "auto": "auto",
    # Table 6: E text, V pictures, T1 and I1 what announces them, T2 and I2 the same in second place.
    "e": "{text}",
    "t1+e": "This product text {text}",
    "t1+e+eos": "This product text {text}{eos}",
    "v+e+eos": "{images}{text}{eos}",
    "e+v+eos": "{text}{images}{eos}",
    "i1+v+t2+e+eos": "[This product image {images} and its text ]{text}{eos}",
    "t1+e+i2+v+eos": "This product text {text}[ and its image {images}]{eos}",
    # Table 11.
    "sentence": "This sentence text {text}{eos}",
    "one-word": "This product text {text} means in one word:{eos}",
    "description": "The description of a product is: {text}{eos}",
    # Table 2: an embedding model as it was published.
    "bare": "{text}{eos}",
}

# The query instructions of Table 2; labels stay bare.
QUERY_PROMPTS = {
    "same": "",
    "instruct": "Instruct: Retrieve a semantically related product.\nQuery: {text}{eos}",
}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset of the paper.

    Attributes:
      title: its name in the tables.
      train, test, labels: rows of each split.
      full_text: titles with descriptions, up to 128 tokens; else titles, up to 32.
      decoder_epochs: of decoders.
    """

    title: str
    train: int
    test: int
    labels: int
    full_text: bool = False
    decoder_epochs: int = 30


# By the name of the config and of the directory that `vixml prepare` is asked for.
DATASETS = {
    "lf_amazontitles_131k": Dataset("LF-AmazonTitles-131K", 294_805, 134_835, 131_073),
    "lf_amazon_131k": Dataset("LF-Amazon-131K", 294_805, 134_835, 131_073, full_text=True),
    "mm_amazontitles_300k": Dataset("MM-AmazonTitles-300K", 586_781, 260_536, 303_296),
    "lf_amazontitles_1p3m": Dataset("LF-AmazonTitles-1.3M", 2_248_619, 970_237, 1_305_265, decoder_epochs=40),
}


def get_config(dataset_name: str, arg: str = "") -> ConfigDict:
    """Returns the config of one row of the paper's tables.

    Args:
      dataset_name: of DATASETS.
      arg: as in "backbone=qwen2.5-3b,images=3":
        backbone: of BACKBONES.
        images: pictures used of an item; 0 = text only. The paper has 0, 1, 2, 3 and 5.
        loss: "ngame", "dexa", "prime", "info_nce", "decoupled_softmax" or "sigmoid".
        vision: of VISION.
        fusion: "early", or "late" for MUFIN's.
        prompt: of PROMPTS; "auto" is the backbone's own.
        query_prompt: of QUERY_PROMPTS, for queries only.
        pooling: "mean" or "last".
        rae: retrieval-augmented inference.
        epochs: instead of the recipe's; 0 takes the backbone off the shelf, -1 is the recipe's.
        seed: of everything random.
        smoke: a tiny tower of the same family on the embedded catalogue, under a minute on 2 cores.

    Raises:
      UserError: if an argument is unknown, or has a value that is.
    """
    args = config_lib.parse_arg(
        arg,
        backbone="distilbert",
        images=0,
        loss="prime",
        vision="siglip2",
        fusion="early",
        prompt="auto",
        query_prompt="same",
        pooling="mean",
        rae=False,
        epochs=-1,
        seed=0,
        smoke=False,
    )
    dataset = DATASETS[dataset_name]
    backbone = _pick(BACKBONES, args.backbone, "backbone")
    config = config_lib.base()

    config.dataset.dir = f"data/{dataset_name}"
    config.dataset.fields = ("title", "content") if dataset.full_text else ("title",)
    config.dataset.A, config.dataset.B = 0.6, 2.6  # all four are of the Amazon family

    config.text.checkpoint = backbone.checkpoint
    config.text.max_tokens = 128 if dataset.full_text else 32
    config.text.pooling = args.pooling
    config.text.prompt = _pick(PROMPTS, args.prompt, "prompt")
    config.text.query_prompt = _pick(QUERY_PROMPTS, args.query_prompt, "query_prompt")
    config.text.dtype = "bfloat16"

    config.vision.checkpoint = _pick(VISION, args.vision, "vision")
    config.vision.images = args.images
    config.vision.fusion = args.fusion

    config.train.seed = args.seed
    # A row of the packed batch holds several titles, or one long text and then some. Ours: the paper pads.
    config.train.row_length = 256 if dataset.full_text else 64

    config.optimizer.warmup_steps = 100
    (_decoder_recipe if backbone.decoder else _encoder_recipe)(config, dataset)
    config.train.batch_size, config.optimizer.lr = backbone.batch_size, backbone.lr
    if dataset.full_text and backbone.full_text is not None:
        config.train.batch_size, config.optimizer.lr = backbone.full_text
    set_loss(config, args.loss)

    if args.epochs >= 0:
        config.train.epochs = args.epochs
    if args.rae:
        config.retrieval.query_weight = 0.1
        config.retrieval.neighbours = 100  # as in the paper; its reference's default is one search of 500
        config.retrieval.k = 100
        config.retrieval.temperature = 0.05
    if args.smoke:
        _shrink(config, backbone)
    return config


def set_loss(config: ConfigDict, name: str) -> None:
    """Sets the loss and the label prototypes that go with it, as the paper compares methods (Table 5).

    Raises:
      UserError: if `name` is not of LOSSES.
    """
    _pick(LOSSES, name, "loss")(config)


def _encoder_recipe(config: ConfigDict, dataset: Dataset) -> None:
    del dataset  # the same on all of them
    config.train.epochs = 150 if config.vision.images else 300
    config.text.train = "full"
    config.optimizer.head_lr = 5e-4
    config.prototype.init = "xavier"
    config.mining.start, config.mining.every, config.mining.size = 10, 5, 16
    # Given for 150 epochs. The 300 of text alone run on with the last size: no other curriculum is stated.
    config.mining.double_at = (20, 40, 60, 80, 100, 120)


def _decoder_recipe(config: ConfigDict, dataset: Dataset) -> None:
    config.train.epochs = dataset.decoder_epochs
    config.text.train = "lora"
    config.text.lora_rank = 256
    config.text.lora_alpha = 256.0
    config.text.lora_rank_stabilised = True  # a factor of 256 / sqrt(256) = 16
    config.text.remat = "full"
    config.optimizer.head_lr = 1e-4  # as in the paper; its reference's script has 5e-4
    config.optimizer.clip_norm = 1.0
    config.prototype.init = "labels"
    config.mining.start, config.mining.every, config.mining.size = 4, 2, 16
    config.mining.double_at = (8, 12, 16, 20, 24)


def _prime(config: ConfigDict) -> None:
    config.loss.name = "prime"
    config.prototype.kind = "prime"
    config.prototype.free_vectors = 65_536
    config.prototype.centroid_decay = 0.0  # last epoch's means (ViXML); PRIME itself averages them at 0.95
    config.loss.negatives = 10
    config.loss.margin_min, config.loss.margin_max = 0.1, 0.3
    config.loss.temperature = 0.1
    config.loss.reg_weight = config.loss.reg_margin = 0.1


def _ngame(config: ConfigDict) -> None:
    """The triplet on label texts; the rest of the recipe stays, as the paper's Table 5 compares them."""
    config.loss.name = "triplet"
    config.prototype.kind = "none"
    config.loss.negatives = 10
    config.loss.margin_min = config.loss.margin_max = 0.3
    config.loss.temperature = 0.1


def _dexa(config: ConfigDict) -> None:
    _ngame(config)
    config.prototype.kind = "dexa"
    config.prototype.free_vectors = 65_536  # as many as PRIME's, so that the two differ in the head alone


def _softmax(name: str):
    """Losses that are not in the paper's tables: DEXML's temperature, on label texts."""

    def recipe(config: ConfigDict) -> None:
        config.loss.name = name
        config.prototype.kind = "none"
        config.loss.temperature = 0.05

    return recipe


# DEXML itself has all labels in every step, batches of 3000, lr 3e-4, 100 epochs and 10 % of warm-up.
LOSSES = {
    "prime": _prime,
    "ngame": _ngame,
    "dexa": _dexa,
    "info_nce": _softmax("info_nce"),
    "decoupled_softmax": _softmax("decoupled_softmax"),
    "sigmoid": _softmax("sigmoid"),  # its temperature and bias are learned
}


def _shrink(config: ConfigDict, backbone: Backbone) -> None:
    """Makes a smoke test that needs neither the dataset nor the weights."""
    config_lib.shrink(config)
    config.dataset.dir = "runs/smoke/dataset"
    config.dataset.demo_queries = 200
    config.text.checkpoint = backbone.smoke
    config.text.lora_rank = min(config.text.lora_rank, 8)
    config.text.lora_alpha = float(config.text.lora_rank)
    config.vision.checkpoint = "random:vit-tiny"


def _pick(table: dict, name: str, argument: str):
    if name not in table:
        raise UserError(f"config argument {argument}={name!r}", fix="give one of " + ", ".join(table))
    return table[name]
