"""How decoders lie in Hugging Face directories: one table of tensors, and a config in old and new spelling.

Old is what transformers wrote before version 5: `rope_theta`, `rope_scaling`, `rope_local_base_freq`,
`sliding_window_pattern`. New is `rope_parameters` and `layer_types`. Both are read, the new one is written.
"""

from __future__ import annotations

from typing import Any

from vixml_jax.errors import UserError
from vixml_jax.models import config_checks
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.models.hf_layouts import Entry, Family, Table, activation, hf_activation, joined, linear, scale
from vixml_jax.models.rope import Rope

_ROPE_TYPES = ("default", "linear", "llama3")
_FULL, _SLIDING = "full_attention", "sliding_attention"

# What a file may leave out, because it is transformers' default; Gemma's files leave nearly all out.
_COMMON: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10_000.0,
}
_QWEN: dict[str, Any] = {
    **_COMMON,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "llama": {**_COMMON, "max_position_embeddings": 2048},
    "gemma3_text": {
        **_COMMON,
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
}
_ARCHITECTURES = {
    "qwen2": "Qwen2Model",
    "qwen3": "Qwen3Model",
    "llama": "LlamaModel",
    "gemma3_text": "Gemma3TextModel",
}


def _complete(family: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Adds what the file leaves out; null says something of its own for three fields only."""
    speaking = ("head_dim", "num_key_value_heads", "sliding_window")
    given = {key: value for key, value in raw.items() if value is not None or key in speaking}
    return {**_DEFAULTS[family], **given}


def _shape(family: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Fields that all families read in the same way; `raw` is complete."""
    config_checks.check_layers(raw["num_hidden_layers"])
    heads = raw["num_attention_heads"]
    fields = {
        "vocab_size": raw["vocab_size"],
        "dim": raw["hidden_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": raw["num_key_value_heads"] or heads,
        "head_dim": raw["head_dim"] or raw["hidden_size"] // heads,
        "mlp_dim": raw["intermediate_size"],
        "max_positions": raw["max_position_embeddings"],
        "norm_eps": raw["rms_norm_eps"],
        "qkv_bias": raw["attention_bias"],
        "out_bias": raw["attention_bias"],
        "mlp_bias": raw["mlp_bias"],
        "tied": raw["tie_word_embeddings"],
        "family": family,
    }
    if heads % fields["num_kv_heads"]:
        raise UserError(f"{heads} attention heads cannot share {fields['num_kv_heads']} key and value heads")
    if fields["head_dim"] % 2:
        raise UserError(f"head_dim {fields['head_dim']} is odd and cannot be rotated")
    return fields


def _rope(parameters: dict[str, Any], theta: float, raw: dict[str, Any]) -> Rope:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in _ROPE_TYPES:
        raise UserError(f"rope_type {kind!r} is not supported", fix="supported are " + ", ".join(_ROPE_TYPES))
    for part in (parameters, raw):
        if part.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise UserError("a partial_rotary_factor is not supported", fix="only whole heads are rotated")
    theta = parameters.get("rope_theta") or theta
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, parameters["factor"])
    positions = (
        raw.get("original_max_position_embeddings")
        or parameters.get("original_max_position_embeddings")
        or raw["max_position_embeddings"]
    )
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    return Rope(theta, parameters["factor"], low, high, positions)


def _write_rope(rope: Rope) -> dict[str, Any]:
    if rope.low_freq_factor is not None:
        return {
            "rope_type": "llama3",
            "rope_theta": rope.theta,
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_positions,
        }
    if rope.factor != 1:
        return {"rope_type": "linear", "rope_theta": rope.theta, "factor": rope.factor}
    return {"rope_type": "default", "rope_theta": rope.theta}


def _windows(types: list[str], window: int | None) -> dict[str, Any]:
    """Fields about sliding windows, from each layer's type."""
    unknown = sorted(set(types) - {_FULL, _SLIDING})
    if unknown:
        raise UserError(
            f"layer type {unknown[0]!r} is not supported", fix=f"supported are {_FULL}, {_SLIDING}"
        )
    layers = tuple(i for i, kind in enumerate(types) if kind == _SLIDING)
    if layers and not window:
        raise UserError("layers have sliding windows, but no sliding_window says how long")
    return {"window": window if layers else None, "window_layers": layers}


def _layer_types(raw: dict[str, Any], is_sliding: list[bool]) -> list[str]:
    """What the file says of each layer, else `is_sliding`."""
    types = raw.get("layer_types") or [_SLIDING if sliding else _FULL for sliding in is_sliding]
    if len(types) != raw["num_hidden_layers"]:
        raise UserError(f"there are {len(types)} layer_types for {raw['num_hidden_layers']} layers")
    return types


def _read_llama_like(family: str, raw: dict[str, Any]) -> DecoderConfig:
    raw = _complete(family, raw)
    fields = _shape(family, raw)
    if family == "qwen2":
        fields["qkv_bias"] = True
    if family != "llama":
        window = raw["sliding_window"] if raw["use_sliding_window"] else None
        first = raw["max_window_layers"] if window else raw["num_hidden_layers"]
        fields |= _windows(_layer_types(raw, [i >= first for i in range(raw["num_hidden_layers"])]), window)
    rope = _rope(raw.get("rope_scaling") or raw.get("rope_parameters") or {}, raw["rope_theta"], raw)
    return DecoderConfig(
        **fields,
        activation=activation(raw["hidden_act"]),
        qk_norm=family == "qwen3",
        rope=rope,
        window_rope=rope,
    )


def _read_gemma(raw: dict[str, Any]) -> DecoderConfig:
    raw = _complete("gemma3_text", raw)
    for key in ("use_bidirectional_attention", "attn_logit_softcapping"):
        if raw.get(key):
            raise UserError(f"{key} is not supported", fix="only plain causal attention is")
    shape = _shape("gemma3_text", raw)
    pattern = raw["sliding_window_pattern"]
    types = _layer_types(raw, [(i + 1) % pattern > 0 for i in range(raw["num_hidden_layers"])])
    ropes = raw.get("rope_parameters") or {}
    whole = {**(ropes.get(_FULL) or {}), **(raw.get("rope_scaling") or {})}
    return DecoderConfig(
        **shape,
        **_windows(types, raw["sliding_window"]),
        activation=activation(raw["hidden_activation"]),
        qk_norm=True,
        post_norms=True,
        norm_offset=1.0,
        scale_embeddings=True,
        query_scalar=raw["query_pre_attn_scalar"],
        rope=_rope(whole, raw["rope_theta"], raw),
        window_rope=_rope(ropes.get(_SLIDING) or {}, raw["rope_local_base_freq"], raw),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    is_gemma = config.family == "gemma3_text"
    raw = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_activation" if is_gemma else "hidden_act": hf_activation(config.activation),
        "tie_word_embeddings": config.tied,
        "rope_parameters": _write_rope(config.rope),
    }
    if config.family != "qwen2":
        raw["attention_bias"] = config.out_bias
    if config.family == "llama":
        return {**raw, "mlp_bias": config.mlp_bias}
    sliding = set(config.window_layers)
    raw["layer_types"] = [_SLIDING if i in sliding else _FULL for i in range(config.num_layers)]
    raw["sliding_window"] = config.window
    if not is_gemma:
        return {**raw, "use_sliding_window": bool(sliding)}
    raw["query_pre_attn_scalar"] = config.query_scalar
    raw["rope_parameters"] = {_FULL: raw["rope_parameters"], _SLIDING: _write_rope(config.window_rope)}
    return raw


def _entries(config: DecoderConfig) -> list[Entry]:
    layer, attention, mlp = "layers.{i}.", "layers.{i}.self_attn.", "layers.{i}.mlp."
    qk_norms = joined(
        scale("layers.q_norm", attention + "q_norm"), scale("layers.k_norm", attention + "k_norm")
    )
    norms = scale("layers.mlp_norm", layer + "post_attention_layernorm")
    if config.post_norms:
        norms = joined(
            scale("layers.attention_post_norm", layer + "post_attention_layernorm"),
            scale("layers.mlp_norm", layer + "pre_feedforward_layernorm"),
            scale("layers.mlp_post_norm", layer + "post_feedforward_layernorm"),
        )
    return joined(
        [Entry("word_embeddings.embedding", "embed_tokens.weight", Table(config.vocab_size))],
        scale("layers.attention_norm", layer + "input_layernorm"),
        linear("layers.attention.q_proj", attention + "q_proj", config.qkv_bias),
        linear("layers.attention.k_proj", attention + "k_proj", config.qkv_bias),
        linear("layers.attention.v_proj", attention + "v_proj", config.qkv_bias),
        linear("layers.attention.o_proj", attention + "o_proj", config.out_bias),
        qk_norms if config.qk_norm else [],
        norms,
        linear("layers.mlp.gate_proj", mlp + "gate_proj", config.mlp_bias),
        linear("layers.mlp.up_proj", mlp + "up_proj", config.mlp_bias),
        linear("layers.mlp.down_proj", mlp + "down_proj", config.mlp_bias),
        scale("final_norm", "norm"),
    )


# The LM head makes words of hidden states; whether it is the token table or not, nothing here makes words.
_IGNORED = (r"lm_head\..*", r"score\..*", r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


# METHOD (ViXML): Qwen's prompt ends in <|endoftext|>, also where a chat model's own end is <|im_end|>; others
# accordingly.
_END_TOKENS = {
    "qwen2": "<|endoftext|>",
    "qwen3": "<|endoftext|>",
    "llama": "<|end_of_text|>",
    "gemma3_text": "<eos>",
}


def _family(name: str) -> Family:
    read = _read_gemma if name == "gemma3_text" else lambda raw: _read_llama_like(name, raw)
    end = _END_TOKENS[name]
    return Family(read, _write, _entries, prefixes=("model.",), ignored=_IGNORED, end_token=end)


# config.json's model_type -> family. The text part of a multimodal Gemma is written as a model of its own.
DECODERS: dict[str, Family] = {
    **{name: _family(name) for name in _ARCHITECTURES},
    "gemma3": Family(
        lambda raw: _read_gemma(raw["text_config"]),
        _write,
        _entries,
        prefixes=("language_model.model.", "model.language_model.", "language_model.", "model."),
        ignored=(*_IGNORED, r"vision_tower\..*", r"multi_modal_projector\..*"),
        end_token=_END_TOKENS["gemma3_text"],
    ),
}
