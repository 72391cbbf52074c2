"""How towers lie in Hugging Face directories: per family, which tensor is which parameter, in what layout."""

from __future__ import annotations

from typing import Any

from vixml_jax.errors import UserError
from vixml_jax.models.encoder import EncoderConfig
from vixml_jax.models.hf_decoders import DECODERS
from vixml_jax.models.hf_layouts import (
    Entry,
    Family,
    Patch,
    Same,
    Table,
    activation,
    hf_activation,
    joined,
    layer_norm,
    linear,
)
from vixml_jax.models.vision import VisionConfig


def _read_bert(raw: dict[str, Any]) -> EncoderConfig:
    kind = raw.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise UserError(f"position_embedding_type {kind!r} is not supported", fix="only 'absolute' is")
    return EncoderConfig(
        vocab_size=raw["vocab_size"],
        dim=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        mlp_dim=raw["intermediate_size"],
        max_positions=raw["max_position_embeddings"],
        token_types=raw.get("type_vocab_size", 2),
        norm_eps=raw.get("layer_norm_eps", 1e-12),
        activation=activation(raw.get("hidden_act", "gelu")),
        family="bert",
    )


def _write_bert(config: EncoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": hf_activation(config.activation),
        "pad_token_id": 0,
    }


def _bert_entries(config: EncoderConfig) -> list[Entry]:
    types = [Entry("token_type_embeddings", "embeddings.token_type_embeddings.weight", Same())]
    layer = "encoder.layer.{i}."
    return joined(
        [Entry("word_embeddings.embedding", "embeddings.word_embeddings.weight", Table(config.vocab_size))],
        [Entry("position_embeddings", "embeddings.position_embeddings.weight", Same())],
        types if config.token_types else [],
        layer_norm("embedding_norm", "embeddings.LayerNorm"),
        linear("layers.attention.q_proj", layer + "attention.self.query"),
        linear("layers.attention.k_proj", layer + "attention.self.key"),
        linear("layers.attention.v_proj", layer + "attention.self.value"),
        linear("layers.attention.o_proj", layer + "attention.output.dense"),
        layer_norm("layers.attention_norm", layer + "attention.output.LayerNorm"),
        linear("layers.mlp.up_proj", layer + "intermediate.dense"),
        linear("layers.mlp.down_proj", layer + "output.dense"),
        layer_norm("layers.mlp_norm", layer + "output.LayerNorm"),
    )


def _read_distilbert(raw: dict[str, Any]) -> EncoderConfig:
    return EncoderConfig(
        vocab_size=raw["vocab_size"],
        dim=raw["dim"],
        num_layers=raw["n_layers"],
        num_heads=raw["n_heads"],
        mlp_dim=raw["hidden_dim"],
        max_positions=raw["max_position_embeddings"],
        token_types=0,
        norm_eps=1e-12,  # written into the PyTorch model, not its config
        activation=activation(raw.get("activation", "gelu")),
        family="distilbert",
    )


def _write_distilbert(config: EncoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["DistilBertModel"],
        "model_type": "distilbert",
        "vocab_size": config.vocab_size,
        "dim": config.dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "hidden_dim": config.mlp_dim,
        "max_position_embeddings": config.max_positions,
        "activation": hf_activation(config.activation),
        "pad_token_id": 0,
    }


def _distilbert_entries(config: EncoderConfig) -> list[Entry]:
    layer = "transformer.layer.{i}."
    return joined(
        [Entry("word_embeddings.embedding", "embeddings.word_embeddings.weight", Table(config.vocab_size))],
        [Entry("position_embeddings", "embeddings.position_embeddings.weight", Same())],
        layer_norm("embedding_norm", "embeddings.LayerNorm"),
        linear("layers.attention.q_proj", layer + "attention.q_lin"),
        linear("layers.attention.k_proj", layer + "attention.k_lin"),
        linear("layers.attention.v_proj", layer + "attention.v_lin"),
        linear("layers.attention.o_proj", layer + "attention.out_lin"),
        layer_norm("layers.attention_norm", layer + "sa_layer_norm"),
        linear("layers.mlp.up_proj", layer + "ffn.lin1"),
        linear("layers.mlp.down_proj", layer + "ffn.lin2"),
        layer_norm("layers.mlp_norm", layer + "output_layer_norm"),
    )


# config.json's model_type -> family.
TEXT_FAMILIES: dict[str, Family] = {
    "bert": Family(
        _read_bert,
        _write_bert,
        _bert_entries,
        prefixes=("", "bert."),
        ignored=(
            r"pooler\..*",
            r"cls\..*",
            r"classifier\..*",
            r"qa_outputs\..*",
            r"embeddings\.position_ids",
        ),
    ),
    "distilbert": Family(
        _read_distilbert,
        _write_distilbert,
        _distilbert_entries,
        prefixes=("", "distilbert."),
        ignored=(
            r"vocab_(transform|layer_norm|projector)\..*",
            r"(pre_)?classifier\..*",
            r"qa_outputs\..*",
            r"embeddings\.position_ids",
        ),
    ),
    **DECODERS,
}


def _read_vit(raw: dict[str, Any]) -> VisionConfig:
    processor = raw.get("preprocessor", {})
    return VisionConfig(
        image_size=raw["image_size"],
        patch_size=raw["patch_size"],
        dim=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        mlp_dim=raw["intermediate_size"],
        norm_eps=raw.get("layer_norm_eps", 1e-12),
        activation=activation(raw.get("hidden_act", "gelu")),
        qkv_bias=raw.get("qkv_bias", True),
        mean=tuple(processor.get("image_mean", (0.5, 0.5, 0.5))),
        std=tuple(processor.get("image_std", (0.5, 0.5, 0.5))),
    )


def _write_vit(config: VisionConfig) -> dict[str, Any]:
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": hf_activation(config.activation),
        "qkv_bias": config.qkv_bias,
    }


def _vit_entries(config: VisionConfig) -> list[Entry]:
    layer = "encoder.layer.{i}."
    patch = "embeddings.patch_embeddings.projection"
    return joined(
        [Entry("patch_embedding.kernel", f"{patch}.weight", Patch(config.patch_size))],
        [Entry("patch_embedding.bias", f"{patch}.bias", Same())],
        [Entry("class_token", "embeddings.cls_token", Same(leading=2))],
        [Entry("position_embeddings", "embeddings.position_embeddings", Same(leading=1))],
        layer_norm("layers.attention_norm", layer + "layernorm_before"),
        linear("layers.attention.q_proj", layer + "attention.attention.query", config.qkv_bias),
        linear("layers.attention.k_proj", layer + "attention.attention.key", config.qkv_bias),
        linear("layers.attention.v_proj", layer + "attention.attention.value", config.qkv_bias),
        linear("layers.attention.o_proj", layer + "attention.output.dense"),
        layer_norm("layers.mlp_norm", layer + "layernorm_after"),
        linear("layers.mlp.up_proj", layer + "intermediate.dense"),
        linear("layers.mlp.down_proj", layer + "output.dense"),
        layer_norm("final_norm", "layernorm"),
    )


VISION_FAMILIES: dict[str, Family] = {
    "vit": Family(
        _read_vit,
        _write_vit,
        _vit_entries,
        prefixes=("", "vit."),
        ignored=(r"pooler\..*", r"classifier\..*", r"embeddings\.mask_token"),
    ),
}
