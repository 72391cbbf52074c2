"""Our own files of a vision tower that was trained here, of whatever shape: safetensors and config.json.

A family like those of Hugging Face, but with our names and layouts, so that `hub.load_vision_tower` reads a
directory that `vixml export --vision` wrote.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from vixml_jax.errors import UserError
from vixml_jax.models.hf_layouts import Entry, Family, Same
from vixml_jax.models.vision import VisionConfig, VisionTower

MODEL_TYPE = "vixml_vision"
_TUPLES = ("mean", "std")


def _read(raw: dict[str, Any]) -> VisionConfig:
    fields: dict[str, Any] = {k: tuple(v) if k in _TUPLES else v for k, v in raw["tower"].items()}
    try:
        return VisionConfig(**fields)
    except TypeError as error:
        raise UserError(f"was written by another version: {error}") from None


def _write(config: VisionConfig) -> dict[str, Any]:
    return {"model_type": MODEL_TYPE, "tower": dataclasses.asdict(config)}


def _entries(config: VisionConfig) -> list[Entry]:
    abstract = nnx.eval_shape(lambda: VisionTower(config, rngs=nnx.Rngs(0)))
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.split(abstract)[1])]
    return [Entry(name, name.replace("layers.", "layers.{i}.", 1), Same()) for name in names]


OWN_VISION: dict[str, Family] = {MODEL_TYPE: Family(_read, _write, _entries)}
