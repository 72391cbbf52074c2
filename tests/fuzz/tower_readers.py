"""Readers of checkpoints that others have trained: configs, tensors, tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from reader import Reader, Seeds

TINY = {
    "vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 32,
}  # fmt: skip
HF_CONFIGS = [
    {"model_type": "bert", **TINY, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    {"model_type": "distilbert", "vocab_size": 40, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16,
     "max_position_embeddings": 32, "activation": "gelu"},
    {"model_type": "qwen2", **TINY, "num_key_value_heads": 1, "rope_theta": 1e6, "sliding_window": 8,
     "use_sliding_window": True, "max_window_layers": 1},
    {"model_type": "qwen3", **TINY, "num_key_value_heads": 2, "head_dim": 4,
     "layer_types": ["full_attention", "sliding_attention"],
     "sliding_window": 4, "use_sliding_window": True},
    {"model_type": "llama", **TINY, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
     "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    {"model_type": "gemma3", "text_config": {**TINY, "model_type": "gemma3_text", "head_dim": 4,
     "num_key_value_heads": 1,
     "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}},
]  # fmt: skip
VISION_CONFIGS = [
    {"model_type": "vit", "hidden_size": 8, "num_attention_heads": 2, "image_size": 32, "patch_size": 16},
    {"model_type": "siglip", "vision_config": {"hidden_size": 8, "num_attention_heads": 2,
     "image_size": [32, 32], "patch_size": 16, "hidden_act": "gelu_pytorch_tanh"}},
    {"model_type": "siglip2_vision_model", "hidden_size": 8, "num_attention_heads": 2, "num_patches": 4},
    {"model_type": "clip_vision_model", "hidden_size": 8, "num_attention_heads": 2, "projection_dim": 4},
]  # fmt: skip
PROCESSOR = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3, "do_rescale": True,
             "rescale_factor": 1 / 255}  # fmt: skip


def _hf_config_seeds() -> Seeds:
    return {"config.json": [json.dumps(value).encode() for value in [*HF_CONFIGS, *VISION_CONFIGS]]}


def _read_hf_config(folder: Path, name: str) -> None:
    from vixml_jax.errors import UserError
    from vixml_jax.models import hub

    hub.is_multimodal(str(folder))
    errors = []
    for read in (hub.text_config, hub.vision_config):
        try:
            config = read(str(folder))
            again = json.loads(json.dumps(hub.tower_config_to_json(config)))
            assert hub.tower_config_from_json(again) == config
            return
        except UserError as error:
            errors.append(error)
    raise errors[0]


def _processor_seeds() -> Seeds:
    whole = json.dumps(PROCESSOR).encode()
    nested = json.dumps({"image_processor": PROCESSOR}).encode()
    return {"preprocessor_config.json": [whole], "processor_config.json": [nested]}


def _prepare_vision(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(VISION_CONFIGS[0]))


def _read_processor(folder: Path, name: str) -> None:
    from vixml_jax.models import hub

    assert hub.vision_config(str(folder)).preprocessing["size"] == 32


def _tower_config_seeds() -> Seeds:
    from vixml_jax.models import hub, presets

    names = ("random:bert-tiny", "random:qwen2-tiny")
    found = [hub.tower_config_to_json(presets.text_preset(name, 64)) for name in names]
    found.append(hub.tower_config_to_json(presets.vision_preset("random:vit-tiny")))
    return {"tower.json": [json.dumps(value).encode() for value in found]}


def _read_tower_config(folder: Path, name: str) -> None:
    from vixml_jax import files
    from vixml_jax.models import hub

    hub.tower_config_from_json(files.read_json(folder / name))


def _tensors() -> dict[str, np.ndarray]:
    """Of the first of HF_CONFIGS, one layer."""
    shapes = {
        "embeddings.word_embeddings.weight": (40, 8),
        "embeddings.position_embeddings.weight": (32, 8),
        "embeddings.token_type_embeddings.weight": (2, 8),
        **{f"embeddings.LayerNorm.{kind}": (8,) for kind in ("weight", "bias")},
    }
    layer = "encoder.layer.0."
    for name, shape in {
        "attention.self.query": (8, 8), "attention.self.key": (8, 8), "attention.self.value": (8, 8),
        "attention.output.dense": (8, 8), "intermediate.dense": (16, 8), "output.dense": (8, 16),
    }.items():  # fmt: skip
        shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
        shapes |= {f"{layer}{name}.{kind}": (8,) for kind in ("weight", "bias")}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def _safetensors_seeds() -> Seeds:
    from safetensors.numpy import save

    return {"model.safetensors": [save(_tensors()), save({"bert." + k: v for k, v in _tensors().items()})]}


def _prepare_bert(folder: Path) -> None:
    config = {**HF_CONFIGS[0], "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))


def _read_tower(folder: Path, name: str) -> None:
    from vixml_jax.models import hub

    hub.load_text_tower(str(folder))


def _read_safetensors(folder: Path, name: str) -> None:
    """Names, shapes and values of all tensors, as loading a tower reads them."""
    from vixml_jax.models import hf_names, hub

    tensors = hub.Tensors(folder, hf_names.TEXT_FAMILIES["bert"])
    for tensor in tensors:
        assert tensors.shape(tensor) == tensors.array(tensor).shape


def _index_seeds() -> Seeds:
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    return {"model.safetensors.index.json": [json.dumps({"metadata": {}, "weight_map": weight_map}).encode()]}


def _prepare_shards(folder: Path) -> None:
    from safetensors.numpy import save_file

    for number, name in enumerate("ab", 1):
        tensors = {name: np.zeros(2, np.float32)}
        save_file(tensors, folder / f"model-{number:05d}-of-00002.safetensors")
    (folder / "sub").mkdir(exist_ok=True)


def _tokenizer_seeds() -> Seeds:
    from vixml_jax.data.tokenizer import Tokenizer

    return {"tokenizer.json": [Tokenizer.train(["red shoe", "blue kettle"] * 3, 60).to_json().encode()]}


def _read_tokenizer(folder: Path, name: str) -> None:
    from vixml_jax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    tokenizer.encode_batch(["red kettle", "", "日本"], 8)


READERS = [
    Reader("hf_config", _hf_config_seeds, _read_hf_config),
    Reader("hf_processor", _processor_seeds, _read_processor, _prepare_vision),
    Reader("hf_safetensors", _safetensors_seeds, _read_safetensors, _prepare_bert),
    Reader("hf_shard_index", _index_seeds, _read_safetensors, _prepare_shards),
    Reader("hf_tower", _safetensors_seeds, _read_tower, _prepare_bert, cheap=False),
    Reader("tower_json", _tower_config_seeds, _read_tower_config),
    Reader("tokenizer", _tokenizer_seeds, _read_tokenizer),
]
