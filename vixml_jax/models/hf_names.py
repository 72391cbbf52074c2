"""How text towers lie in Hugging Face directories: per family, which tensor is which parameter.

Encoders are described here, decoders in `hf_decoders`. Vision towers are in `hf_vision`.
"""

from __future__ import annotations

from typing import Any

from vixml_jax.errors import UserError
from vixml_jax.models.encoder import EncoderConfig
from vixml_jax.models.hf_decoders import DECODERS
from vixml_jax.models.hf_layouts import (
    Entry,
    Family,
    Same,
    Table,
    activation,
    hf_activation,
    joined,
    layer_norm,
    linear,
)


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
