"""How vision towers lie in Hugging Face directories: ViT, the vision side of SigLIP, SigLIP 2 and CLIP.

A two-tower checkpoint gives its vision side, and is written as that side alone. The fixed-resolution
checkpoints of SigLIP 2 say "siglip"; "siglip2" is NaFlex, which is read here at its native square.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from vixml_jax.errors import UserError
from vixml_jax.models.hf_layouts import (
    Entry,
    Family,
    Layout,
    Part,
    Patch,
    Same,
    Transposed,
    activation,
    hf_activation,
    joined,
    layer_norm,
    linear,
)
from vixml_jax.models.own_vision import OWN_VISION
from vixml_jax.models.vision import RESAMPLING, VisionConfig

_HALF = (0.5, 0.5, 0.5)
_BASE: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
}
_SIGLIP: dict[str, Any] = {
    **_BASE,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}
# What a file may leave out, because it is transformers' default; two-tower files leave nearly all out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": {**_BASE, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True},
    "siglip_vision_model": _SIGLIP,
    "siglip2_vision_model": {**_SIGLIP, "num_patches": 256},
    "clip_vision_model": {**_BASE, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}
_ARCHITECTURES = {
    "vit": "ViTModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
    "clip_vision_model": "CLIPVisionModel",
}
# Mean, spread and resampling of the pixels, where there is no preprocessor_config.json.
_PROCESSORS: dict[str, tuple[tuple[float, ...], tuple[float, ...], str]] = {
    "vit": (_HALF, _HALF, "bilinear"),
    "siglip_vision_model": (_HALF, _HALF, "bicubic"),
    "siglip2_vision_model": (_HALF, _HALF, "bilinear"),
    "clip_vision_model": (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
        "bicubic",
    ),
}
# Pillow's numbers of the ways to resize.
_RESAMPLING_NUMBERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def _read(family: str, raw: dict[str, Any]) -> VisionConfig:
    processor = raw.get("preprocessor", {})
    raw = {**_DEFAULTS[family], **{key: value for key, value in raw.items() if value is not None}}
    if raw["num_channels"] != 3:
        raise UserError(f"num_channels {raw['num_channels']} is not supported", fix="pictures have 3")
    patch = _side(raw, "patch_size")
    if family == "siglip2_vision_model":
        grid = math.isqrt(raw["num_patches"])
        if grid * grid != raw["num_patches"]:
            raise UserError(f"num_patches {raw['num_patches']} is no square")
        size = grid * patch
    else:
        size = _side(raw, "image_size")
    if patch > size:
        raise UserError(f"patch_size {patch} is larger than the image's {size}")
    if raw["hidden_size"] % raw["num_attention_heads"]:
        raise UserError(
            f"{raw['num_attention_heads']} attention heads do not divide hidden_size {raw['hidden_size']}"
        )
    is_siglip = family.startswith("siglip")
    if is_siglip and not raw["vision_use_head"]:
        raise UserError(
            "vision_use_head is false: without its pooling head the tower gives no embedding of a picture",
            fix="give the checkpoint of a whole SigLIP",
        )
    return VisionConfig(
        image_size=size,
        patch_size=patch,
        dim=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        mlp_dim=raw["intermediate_size"],
        pool="map" if is_siglip else "cls",
        norm_eps=raw["layer_norm_eps"],
        activation=activation(raw["hidden_act"]),
        qkv_bias=raw.get("qkv_bias", True),
        patch_bias=family != "clip_vision_model",
        class_token=not is_siglip,
        first_norm=family == "clip_vision_model",
        family=family,
        **_read_processor(family, processor),
    )


def _side(raw: dict[str, Any], key: str) -> int:
    """A side in pixels, which a file gives once or as two equal ones."""
    value = raw[key]
    sides = set(value) if isinstance(value, list) else {value}
    if len(sides) != 1:
        raise UserError(f"{key} {value} is not square", fix="only square ones are supported")
    return sides.pop()


def _read_processor(family: str, raw: dict[str, Any]) -> dict[str, Any]:
    mean, std, resampling = _PROCESSORS[family]
    mean, std = raw.get("image_mean") or mean, raw.get("image_std") or std
    if raw.get("do_normalize") is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    for name, values in (("image_mean", mean), ("image_std", std)):
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise UserError(f"the preprocessor's {name} {values!r} is not three numbers")
    if raw.get("do_rescale") is False or abs(raw.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise UserError("the preprocessor rescales otherwise than by 1/255", fix="only that is supported")
    number = raw.get("resample")
    if number is not None:
        resampling = _RESAMPLING_NUMBERS.get(number)
    if resampling not in RESAMPLING:
        raise UserError(f"the preprocessor's resample {number!r} is not supported")
    return {"mean": tuple(map(float, mean)), "std": tuple(map(float, std)), "resampling": resampling}


def _write(config: VisionConfig) -> dict[str, Any]:
    raw = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "patch_size": config.patch_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": hf_activation(config.activation),
    }
    if config.family == "siglip2_vision_model":
        return {**raw, "num_patches": config.num_patches}
    raw["image_size"] = config.image_size
    return {**raw, "qkv_bias": config.qkv_bias} if config.family == "vit" else raw


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


def _two_tower_entries(config: VisionConfig) -> list[Entry]:
    """SigLIP and CLIP name all they share alike, PyTorch's misspelling included."""
    layer = "encoder.layers.{i}."
    attention = layer + "self_attn."
    patch = "embeddings.patch_embedding"
    # NaFlex takes patches that are cut already.
    patch_layout = Transposed() if config.family == "siglip2_vision_model" else Patch(config.patch_size)
    return joined(
        [Entry("patch_embedding.kernel", f"{patch}.weight", patch_layout)],
        [Entry("patch_embedding.bias", f"{patch}.bias", Same())] if config.patch_bias else [],
        [Entry("class_token", "embeddings.class_embedding", Same())] if config.class_token else [],
        [Entry("position_embeddings", "embeddings.position_embedding.weight", Same())],
        layer_norm("first_norm", "pre_layrnorm") if config.first_norm else [],
        layer_norm("layers.attention_norm", layer + "layer_norm1"),
        linear("layers.attention.q_proj", attention + "q_proj"),
        linear("layers.attention.k_proj", attention + "k_proj"),
        linear("layers.attention.v_proj", attention + "v_proj"),
        linear("layers.attention.o_proj", attention + "out_proj"),
        layer_norm("layers.mlp_norm", layer + "layer_norm2"),
        linear("layers.mlp.up_proj", layer + "mlp.fc1"),
        linear("layers.mlp.down_proj", layer + "mlp.fc2"),
        layer_norm("final_norm", "post_layernorm"),
        _head_entries(config) if config.pool == "map" else [],
    )


def _head_entries(config: VisionConfig) -> list[Entry]:
    def fused(suffix: str, layout: Layout) -> list[Entry]:
        """q, k and v lie in one tensor, as PyTorch's MultiheadAttention has them."""
        name = {"kernel": "head.attention.in_proj_weight", "bias": "head.attention.in_proj_bias"}[suffix]
        return [
            Entry(f"head.attention.{which}_proj.{suffix}", name, Part(number, 3, config.dim, layout))
            for number, which in enumerate("qkv")
        ]

    return joined(
        [Entry("head.probe", "head.probe", Same(leading=1))],
        fused("kernel", Transposed()),
        fused("bias", Same()),
        linear("head.attention.o_proj", "head.attention.out_proj"),
        layer_norm("head.norm", "head.layernorm"),
        linear("head.mlp.up_proj", "head.mlp.fc1"),
        linear("head.mlp.down_proj", "head.mlp.fc2"),
    )


def _side_of_two(name: str) -> tuple[Family, Family]:
    """The families of a vision side saved alone, and within its two-tower checkpoint."""

    def family(read: Callable[[dict[str, Any]], VisionConfig]) -> Family:
        return Family(
            read,
            _write,
            _two_tower_entries,
            # Old files have the prefix of the two-tower model also where the side stands alone.
            prefixes=("", "vision_model."),
            ignored=(
                r"text_model\..*",
                r"(text|visual)_projection\..*",
                r"logit_(scale|bias)",
                r"classifier\..*",
                r"embeddings\.position_ids",
            ),
        )

    def read_within(raw: dict[str, Any]) -> VisionConfig:
        # Very old files have null beside `vision_config_dict`, or nothing: all is as the defaults say.
        side = raw.get("vision_config") or {}
        return _read(name, {**side, "preprocessor": raw.get("preprocessor", {})})

    return family(lambda raw: _read(name, raw)), family(read_within)


_siglip, _siglip_within = _side_of_two("siglip_vision_model")
_siglip2, _siglip2_within = _side_of_two("siglip2_vision_model")
_clip, _clip_within = _side_of_two("clip_vision_model")

# config.json's model_type -> family.
VISION_FAMILIES: dict[str, Family] = {
    "vit": Family(
        lambda raw: _read("vit", raw),
        _write,
        _vit_entries,
        prefixes=("", "vit."),
        ignored=(r"pooler\..*", r"classifier\..*", r"embeddings\.mask_token", r"decoder\..*"),
    ),
    "siglip": _siglip_within,
    "siglip_vision_model": _siglip,
    "siglip2": _siglip2_within,
    "siglip2_vision_model": _siglip2,
    "clip": _clip_within,
    "clip_vision_model": _clip,
    **OWN_VISION,
}
