"""Towers by name: `"random:<preset>"` is one of these shapes with random weights."""

from __future__ import annotations

import dataclasses

from vixml_jax.errors import UserError
from vixml_jax.models.encoder import EncoderConfig
from vixml_jax.models.vision import VisionConfig

RANDOM = "random:"

# The vocabulary of a published tower; a tokenizer trained on a dataset brings its own size.
_BERT_VOCAB = 30_522


def _encoder(num_layers: int, dim: int, num_heads: int, mlp_dim: int, **fields: int | str) -> EncoderConfig:
    return EncoderConfig(
        vocab_size=_BERT_VOCAB,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        **fields,  # pyright: ignore[reportArgumentType]
    )


TEXT: dict[str, EncoderConfig] = {
    "bert-tiny": _encoder(2, 64, 2, 128),  # for tests
    "minilm-tiny": _encoder(2, 128, 4, 512),  # for a demo on two CPU cores
    "minilm-l3": _encoder(3, 384, 12, 1536),
    "minilm-l6": _encoder(6, 384, 12, 1536),
    "distilbert": _encoder(6, 768, 12, 3072, token_types=0, family="distilbert"),
    "bert-base": _encoder(12, 768, 12, 3072),
}


def text_preset(name: str, vocab_size: int | None = None) -> EncoderConfig:
    """Returns the shape that `random:<name>` stands for.

    Args:
      name: with or without the "random:" in front.
      vocab_size: tokens of the tokenizer in use; None keeps the published size.

    Raises:
      UserError: if there is no such preset.
    """
    config = _find(TEXT, name, "text.checkpoint")
    return config if vocab_size is None else dataclasses.replace(config, vocab_size=vocab_size)


# A random tower is only useful with a pooling that sees every patch: its class token says little.
VISION: dict[str, VisionConfig] = {
    "vit-tiny": VisionConfig(64, 8, 192, 4, 3, 768, pool="mean", class_token=False),  # the demo's pictures
    "vit-b-16": VisionConfig(224, 16, 768, 12, 12, 3072),
}


def vision_preset(name: str) -> VisionConfig:
    """Returns the shape that `random:<name>` stands for.

    Args:
      name: with or without the "random:" in front.

    Raises:
      UserError: if there is no such preset.
    """
    return _find(VISION, name, "vision.checkpoint")


def _find(table: dict, name: str, key: str):
    short = name.removeprefix(RANDOM)
    if short not in table:
        raise UserError(f"config.{key}={name!r}: no such preset", fix="there are " + ", ".join(sorted(table)))
    return table[short]
