"""Towers by name: `"random:<preset>"` is one of these shapes with random weights."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from vixml_jax import files
from vixml_jax.errors import UserError
from vixml_jax.models import hf_names
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.models.encoder import EncoderConfig
from vixml_jax.models.hf_vision import VISION_FAMILIES
from vixml_jax.models.rope import Rope
from vixml_jax.models.vision import VisionConfig

RANDOM = "random:"

TextConfig = EncoderConfig | DecoderConfig

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


def _tiny_decoder(family: str, **fields: object) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=_BERT_VOCAB,
        dim=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=128,
        family=family,
        **fields,  # pyright: ignore[reportArgumentType]
    )


TEXT: dict[str, TextConfig] = {
    "bert-tiny": _encoder(2, 64, 2, 128),  # for tests
    "minilm-tiny": _encoder(2, 128, 4, 512),  # for a demo on two CPU cores
    "minilm-l3": _encoder(3, 384, 12, 1536),
    "minilm-l6": _encoder(6, 384, 12, 1536),
    "distilbert": _encoder(6, 768, 12, 3072, token_types=0, family="distilbert"),
    "bert-base": _encoder(12, 768, 12, 3072),
    # For tests: one of each family, with all that is special to it.
    "qwen2-tiny": _tiny_decoder("qwen2", qkv_bias=True),
    "qwen3-tiny": _tiny_decoder("qwen3", qk_norm=True),
    "llama-tiny": _tiny_decoder("llama", rope=Rope(500_000.0, 32.0, 1.0, 4.0, 8192)),
    "gemma3-tiny": _tiny_decoder(
        "gemma3_text",
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        norm_offset=1.0,
        scale_embeddings=True,
        query_scalar=16,
        rope=Rope(1_000_000.0, 8.0),
        window=8,
        window_layers=(0, 1),
    ),
}


@functools.cache
def published() -> dict[str, TextConfig]:
    """The paper's text towers by their names on the hub: the sizes that their config.json states."""
    facts = files.read_json(Path(__file__).with_name("published.json"))
    return {name: hf_names.TEXT_FAMILIES[raw["model_type"]].read_config(raw) for name, raw in facts.items()}


def text_preset(name: str, vocab_size: int | None = None) -> TextConfig:
    """Returns the shape that `random:<name>` stands for.

    Args:
      name: of TEXT or `published`, with or without the "random:" in front.
      vocab_size: tokens of the tokenizer in use; None keeps the published size.

    Raises:
      UserError: if there is no such preset.
    """
    config = _find({**TEXT, **published()}, name, "text.checkpoint")
    return config if vocab_size is None else dataclasses.replace(config, vocab_size=vocab_size)


# A random tower is only useful with a pooling that sees every patch: its class token says little.
VISION: dict[str, VisionConfig] = {
    "vit-tiny": VisionConfig(64, 8, 192, 4, 3, 768, pool="mean", class_token=False),  # the demo's pictures
    "vit-b-16": VisionConfig(224, 16, 768, 12, 12, 3072),
    # For tests: SigLIP's shape, head and all.
    "siglip-tiny": VisionConfig(
        32, 8, 32, 2, 2, 64,
        pool="map",
        norm_eps=1e-6,
        activation="gelu_tanh",
        class_token=False,
        family="siglip_vision_model",
    ),
}  # fmt: skip


@functools.cache
def published_vision() -> dict[str, VisionConfig]:
    """The paper's vision towers by their names on the hub: the sizes that their config.json states."""
    facts = files.read_json(Path(__file__).with_name("published_vision.json"))
    return {name: VISION_FAMILIES[raw["model_type"]].read_config(raw) for name, raw in facts.items()}


def vision_preset(name: str) -> VisionConfig:
    """Returns the shape that `random:<name>` stands for.

    Args:
      name: of VISION or `published_vision`, with or without the "random:" in front.

    Raises:
      UserError: if there is no such preset.
    """
    return _find({**VISION, **published_vision()}, name, "vision.checkpoint")


def _find(table: dict, name: str, key: str):
    short = name.removeprefix(RANDOM)
    if short not in table:
        raise UserError(f"config.{key}={name!r}: no such preset", fix="there are " + ", ".join(sorted(table)))
    return table[short]
