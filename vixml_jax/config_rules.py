"""What a config must keep to: the values of its fields, and which of them go together."""

from __future__ import annotations

import math

from ml_collections import ConfigDict

from vixml_jax import config as config_lib
from vixml_jax.errors import UserError

# What a query may be searched as.
MODALITIES = ("text", "image", "text+image")


def validate(config: ConfigDict) -> None:
    """Checks what can be known without data.

    Raises:
      UserError: naming the field and what would be right.
    """
    _check_values(config)
    choices = {
        "dataset.holdout_by": ("row", "title", "first_word"),
        "text.pooling": ("mean", "last"),
        "text.dtype": ("float32", "bfloat16"),
        "text.remat": ("none", "dots", "full"),
        "text.train": ("full", "lora", "none"),
        "vision.fusion": ("early", "late"),
        "vision.train": ("none", "lora", "full"),
        "vision.dtype": ("float32", "bfloat16"),
        "prototype.kind": ("prime", "dexa", "none"),
        "prototype.init": ("xavier", "labels"),
        "loss.name": ("prime", "triplet", "info_nce", "decoupled_softmax", "sigmoid"),
        "loss.positives": ("inverse_propensity", "uniform"),
        "retrieval.kind": ("scann", "exact", "mesh"),
        "retrieval.dtype": ("float32", "bfloat16", "int8"),
    }
    for key, allowed in choices.items():
        value = config_lib.get(config, key)
        if value not in allowed:
            raise UserError(f"config.{key}={value!r}", fix="give one of " + ", ".join(allowed))
    for key in ("train.batch_size", "train.row_length", "text.max_tokens", "text.lora_rank",
                "vision.lora_rank", "mining.size", "mining.every", "train.log_every", "retrieval.k",
                "retrieval.neighbours",
                "loss.negatives", "prototype.free_vectors", "eval.items_per_call", "vision.batch_size",
                "checkpoint.keep", "classifier.batch_size", "classifier.shortlist",
                "classifier.negatives", "classifier.hardest"):  # fmt: skip
        if (value := config_lib.get(config, key)) < 1:
            raise UserError(f"config.{key}={value}", fix="give at least 1")
    for key in ("train.epochs", "train.chunk_rows", "vision.images", "text.layers", "checkpoint.every_steps",
                "checkpoint.keep_every", "eval.every",
                "train.seed", "dataset.max_train", "dataset.max_test", "optimizer.warmup_steps",
                "optimizer.weight_decay", "optimizer.clip_norm", "retrieval.dims", "retrieval.prior_weight",
                "classifier.epochs", "classifier.margin"):  # fmt: skip
        if (value := config_lib.get(config, key)) < 0:
            raise UserError(f"config.{key}={value}", fix="give 0 or more")
    for key in ("loss.temperature", "retrieval.temperature", "optimizer.lr", "optimizer.head_lr",
                "classifier.lr", "optimizer.eps", "dataset.B"):  # fmt: skip
        if not 0 < (value := config_lib.get(config, key)) < math.inf:
            raise UserError(f"config.{key}={value}", fix="give a number above 0")
    for key in ("prototype.dropout", "vision.augment", "vision.drop_images", "vision.drop_text",
                "dataset.holdout", "retrieval.query_weight"):  # fmt: skip
        if not 0 <= (share := config_lib.get(config, key)) < 1:
            raise UserError(f"config.{key}={share}", fix="give a share from 0 up to below 1")
    if not 0 < config.retrieval.target_recall <= 1:
        raise UserError(
            f"config.retrieval.target_recall={config.retrieval.target_recall}",
            fix="give a share above 0 and up to 1",
        )
    if config.retrieval.dtype != "float32" and config.retrieval.kind == "scann":
        raise UserError(
            f"config.retrieval.dtype={config.retrieval.dtype!r} with config.retrieval.kind='scann'",
            fix="ScaNN has codes of its own: give float32, or kind='exact' or 'mesh'",
        )
    if any(width < 1 for width in config.text.dims):
        raise UserError(f"config.text.dims={tuple(config.text.dims)}", fix="give numbers of dimensions")
    if not config.eval.ks or min(config.eval.ks) < 1:
        raise UserError(f"config.eval.ks={tuple(config.eval.ks)}", fix="give cuts of at least 1")
    longest = config_lib.longest_item(config)
    if longest > config.train.row_length:
        raise UserError(
            f"items of up to {longest} slots (config.text.max_tokens and config.vision.images) do not fit "
            f"config.train.row_length={config.train.row_length}",
            fix=f"give --config.train.row_length={-(-longest // 32) * 32}",
        )
    if config.vision.precomputed and config.vision.train != "none":
        raise UserError(
            f"config.vision.precomputed with config.vision.train={config.vision.train!r}",
            fix="a tower can only be trained on pictures: give one or the other",
        )
    tokens = config.vision.tokens
    if tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
        raise UserError(f"config.vision.tokens={tokens}", fix="give a square number: 1, 4, 9, ...")
    if tokens > 1 and (config.vision.precomputed or config.vision.train != "none"):
        other = "precomputed" if config.vision.precomputed else f"train={config.vision.train!r}"
        raise UserError(
            f"config.vision.tokens={tokens} with config.vision.{other}",
            fix="several tokens of a picture come from a frozen tower's patches: give tokens=1",
        )
    if config.vision.augment and config.vision.train == "none":
        raise UserError(
            f"config.vision.augment={config.vision.augment} with config.vision.train='none'",
            fix="a frozen tower embeds every picture once: train it (lora, full), or give augment=0",
        )
    if not 0 <= config.retrieval.classifier_weight <= 1:
        raise UserError(
            f"config.retrieval.classifier_weight={config.retrieval.classifier_weight}",
            fix="give a share from 0 to 1",
        )
    if not config.dataset.dir:
        raise UserError(
            "config.dataset.dir is empty", fix="give --config.dataset.dir=DIR as made by `vixml prepare`"
        )
    if unknown := set(config.dataset.fields) - {"title", "content"}:
        raise UserError(
            f"config.dataset.fields names {', '.join(sorted(unknown))}", fix="give title, content or both"
        )
    if not config.retrieval.modalities or set(config.retrieval.modalities) - set(MODALITIES):
        raise UserError(
            f"config.retrieval.modalities={tuple(config.retrieval.modalities)}",
            fix="give some of " + ", ".join(MODALITIES),
        )
    if config.loss.name == "prime" and config.prototype.kind != "prime":
        raise UserError(
            f"config.loss.name='prime' with config.prototype.kind={config.prototype.kind!r}",
            fix="the PRIME loss needs config.prototype.kind='prime'",
        )


def _check_values(config: ConfigDict) -> None:
    """Checks what holds for every field of a kind: finite, of a size that JAX takes, lists of one kind."""
    for key, value in config_lib.flat(config).items():
        if value is None:
            raise UserError(f"config.{key} is None", fix="give a value")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{key}={value}", fix="give a finite number")
        if isinstance(value, int) and not -(2**31) <= value < (2**32 if key == "train.seed" else 2**31):
            raise UserError(f"config.{key}={value}", fix="give a number below 2^31")
        if isinstance(value, tuple):
            kind = str if key in ("dataset.fields", "text.lora_targets", "retrieval.modalities") else int
            if not all(type(item) is kind for item in value):
                fix = "give texts" if kind is str else "give whole numbers"
                raise UserError(f"config.{key}={value}", fix=fix)
