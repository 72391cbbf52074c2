"""Decoders against PyTorch, and what must not change an embedding: packing, company, padding, mesh, remat."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from comparison import relative_error
from flax import nnx
from safetensors.numpy import save_file

from vixml_jax import sharding
from vixml_jax.models import hf_names, hub, presets
from vixml_jax.models.decoder import Decoder, DecoderConfig

CHECKPOINTS = ["qwen2", "qwen2_untied", "qwen3", "llama", "gemma3_text", "gemma3"]
TINY = ["qwen2-tiny", "qwen3-tiny", "llama-tiny", "gemma3-tiny"]
WINDOW = presets.TEXT["gemma3-tiny"].window


def _batch(seed: int, rows: int = 8, slots: int = 11) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    token_ids = rng.integers(1, 98, (rows, slots)).astype(np.int32)  # 98 stands for an image in Gemma
    mask = np.arange(slots) < rng.integers(1, slots + 1, (rows, 1))
    mask[0] = True
    return token_ids, mask


def _text_part(model: torch.nn.Module) -> torch.nn.Module:
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def _family(directory: Path):
    return hf_names.TEXT_FAMILIES[json.loads((directory / "config.json").read_text())["model_type"]]


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
def _weighted(tower, shift, token_ids, mask, weights):
    positions = jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)
    hidden = tower.encode(tower.embed_tokens(token_ids) + shift, mask.astype(jnp.int32), positions)
    return jnp.sum(hidden * weights), hidden


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_hidden_states_and_gradients_equal_pytorch(name, torch_model, seed, single_mesh):
    whole, directory = torch_model(name)
    model = _text_part(whole)
    token_ids, mask = _batch(seed)
    tower = hub.load_text_tower(str(directory))
    weights = np.random.default_rng(seed).normal(size=(*mask.shape, tower.dim)).astype(np.float32)
    weights *= mask[..., None]

    inputs = model.get_input_embeddings()(torch.tensor(token_ids).long())
    inputs.retain_grad()
    hidden = model(inputs_embeds=inputs, attention_mask=torch.tensor(mask).long()).last_hidden_state
    (hidden * torch.tensor(weights)).sum().backward()
    expected = hidden.detach().numpy()

    shift = np.zeros_like(weights)
    (_, got), (gradients, input_gradient) = _weighted(tower, shift, token_ids, mask, weights)
    assert got.shape == expected.shape
    assert relative_error(np.asarray(got)[mask], expected[mask]) < 1e-5
    assert relative_error(np.asarray(input_gradient)[mask], inputs.grad.numpy()[mask]) < 1e-4

    by_path = {".".join(map(str, p)): leaf[...] for p, leaf in nnx.to_flat_state(nnx.state(gradients))}
    named = {key: parameter.grad for key, parameter in model.named_parameters()}
    if name.startswith("gemma3"):  # PyTorch gives the padding token none
        named["embed_tokens.weight"][0] = 0
    largest = max(float(gradient.norm()) for gradient in named.values())
    entries = _family(directory).entries(tower.config)
    assert {entry.path for entry in entries} == set(by_path)
    for entry in entries:
        stack = np.asarray(by_path[entry.path])
        for i, part in enumerate(stack if entry.stacked else [stack]):
            wanted = named[entry.hf.format(i=i)].numpy()
            error = np.linalg.norm(entry.layout.write(part) - wanted)
            assert error < 1e-4 * max(np.linalg.norm(wanted), 1e-3 * largest), entry.hf


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama", "gemma3_text"])
def test_bfloat16_stays_close_to_pytorch_in_float32(name, torch_model, seed, single_mesh):
    whole, directory = torch_model(name)
    token_ids, mask = _batch(seed)
    with torch.no_grad():
        hidden = _text_part(whole)(torch.tensor(token_ids), attention_mask=torch.tensor(mask).long())
    tower = hub.load_text_tower(str(directory), "bfloat16", param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(tower)} == {jnp.dtype("bfloat16")}
    got = tower(token_ids, mask)
    assert got.dtype == jnp.bfloat16
    expected = hidden.last_hidden_state.numpy()[mask]
    assert relative_error(np.asarray(got, np.float32)[mask], expected) < 0.02


def _write(directory: Path, tower: Decoder, family: hf_names.Family, shards: int = 1) -> None:
    """Writes a tower as a Hugging Face directory, with the tables that read it."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(family.write_config(tower.config)))
    flat = {".".join(map(str, p)): np.asarray(leaf[...]) for p, leaf in nnx.to_flat_state(nnx.state(tower))}
    tensors = {}
    for entry in family.entries(tower.config):
        for i, part in enumerate(flat[entry.path] if entry.stacked else [flat[entry.path]]):
            tensors[entry.hf.format(i=i)] = np.ascontiguousarray(entry.layout.write(part))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = {key: f"model-{1 + i * shards // len(tensors):05}.safetensors" for i, key in enumerate(tensors)}
    for name in set(names.values()):
        save_file({k: v for k, v in tensors.items() if names[k] == name}, directory / name)
    index = {"weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_is_written_is_the_same_model_to_transformers_and_to_us(
    name, torch_model, tmp_path, single_mesh
):
    whole, directory = torch_model(name)
    tower = hub.load_text_tower(str(directory))
    _write(tmp_path / "written", tower, _family(directory))
    again = transformers.AutoModel.from_pretrained(tmp_path / "written").eval()
    ours = _text_part(whole)
    assert again.state_dict().keys() == ours.state_dict().keys()
    for key, value in again.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key
    token_ids = torch.tensor(_batch(5)[0])
    with torch.no_grad():
        assert torch.equal(again(token_ids).last_hidden_state, ours(token_ids).last_hidden_state)

    back = hub.load_text_tower(str(tmp_path / "written"))
    assert back.config == tower.config
    for got, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(tower), strict=True):
        np.testing.assert_array_equal(got, wanted)


def _old_spelling(raw: dict) -> dict:
    """A config.json as transformers 4 wrote it."""
    if "text_config" in raw:
        return {**raw, "text_config": _old_spelling(raw["text_config"])}
    raw = dict(raw)
    ropes = raw.pop("rope_parameters")
    types = raw.pop("layer_types", None)
    if "full_attention" in ropes:
        raw["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
        raw["sliding_window_pattern"] = types.index("full_attention") + 1
        ropes = ropes["full_attention"]
    raw["rope_theta"] = ropes["rope_theta"]
    scaling = {key: value for key, value in ropes.items() if key != "rope_theta"}
    raw["rope_scaling"] = scaling if scaling["rope_type"] != "default" else None
    return raw


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_old_and_new_spelling_of_a_config_mean_the_same(name, torch_model):
    _, directory = torch_model(name)
    raw = json.loads((directory / "config.json").read_text())
    old = _old_spelling(raw)
    assert "rope_parameters" not in json.dumps(old)
    read = hf_names.TEXT_FAMILIES[raw["model_type"]].read_config
    assert read(raw) == read(old)
    assert bool(read(raw).window_layers) == (name in ("qwen2_untied", "gemma3_text", "gemma3"))


_PUBLISHED = [name for name, config in presets.published().items() if isinstance(config, DecoderConfig)]


@pytest.mark.parametrize("name", _PUBLISHED)
def test_published_configs_mean_to_transformers_what_they_mean_to_us(name):
    facts = json.loads(Path(presets.__file__).with_name("published.json").read_text())[name]
    config = presets.published()[name]
    theirs = transformers.AutoConfig.for_model(**facts).get_text_config()
    written = hf_names.TEXT_FAMILIES[config.family].write_config(config)
    for key, value in written.items():
        if key != "architectures" and not (key == "head_dim" and config.family == "qwen2"):
            assert value == getattr(theirs, key), key


def test_rope_frequencies_equal_those_of_transformers():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = presets.published()["meta-llama/Llama-3.2-3B-Instruct"]
    theirs = transformers.LlamaConfig(**hf_names.TEXT_FAMILIES["llama"].write_config(config))
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    np.testing.assert_allclose(config.rope.frequencies(128), wanted.numpy(), rtol=2e-6)


@jax.jit
def _encode(tower, token_ids, segments, positions):
    return tower.encode(tower.embed_tokens(token_ids), segments, positions)


@pytest.mark.parametrize("preset", TINY)
def test_packing_company_and_padding_change_nothing(preset, single_mesh, seed):
    tower = hub.load_text_tower(f"random:{preset}", vocab_size=99, seed=seed)
    rng = np.random.default_rng(seed)
    items = [rng.integers(0, 99, n) for n in (WINDOW + 3, 3, 7, 1, 4)]
    places = [(1, 0), (1, 11), (2, 0), (1, 14), (2, 8)]  # row and first slot of each item; rows 0, 3, 4 empty
    token_ids, segments, positions = rng.integers(0, 99, (3, 5, 16)).astype(np.int32)  # the padding is junk
    segments[:] = 0
    alone = np.zeros((3, 5, 16), np.int32)
    for number, (item, (row, start)) in enumerate(zip(items, places, strict=True)):
        stop = start + len(item)
        token_ids[row, start:stop] = item
        segments[row, start:stop] = number + 1
        positions[row, start:stop] = np.arange(len(item))
        alone[:, number, : len(item)] = item, np.ones(len(item)), np.arange(len(item))
    packed = np.asarray(_encode(tower, token_ids, segments, positions))
    assert np.isfinite(packed).all()
    expected = np.asarray(_encode(tower, *alone))
    for number, (item, (row, start)) in enumerate(zip(items, places, strict=True)):
        np.testing.assert_allclose(
            packed[row, start : start + len(item)], expected[number, : len(item)], atol=1e-5
        )
    # What comes later changes nothing either: the tower is causal.
    changed = alone.copy()
    changed[0, 0, 6] = (changed[0, 0, 6] + 1) % 99
    got = np.asarray(_encode(tower, *changed))
    np.testing.assert_array_equal(got[0, :6], expected[0, :6])
    assert relative_error(got[0, 6:11], expected[0, 6:11]) > 1e-3


def test_a_window_shuts_out_what_is_far(single_mesh):
    config = dataclasses.replace(
        presets.TEXT["gemma3-tiny"], vocab_size=99, num_layers=1, window=4, window_layers=(0,)
    )
    tower = hub.random_tower(config, seed=3)
    token_ids, mask = _batch(3, rows=1)
    changed = token_ids.copy()
    changed[0, 2] += 1
    difference = np.abs(np.asarray(tower(changed, mask)) - np.asarray(tower(token_ids, mask)))[0].max(axis=1)
    assert (difference[:2] == 0).all()
    assert (difference[2:6] > 0).all()
    assert (difference[6:] == 0).all()


# What any family has, at once.
EVERYTHING = dataclasses.replace(presets.TEXT["gemma3-tiny"], vocab_size=99, qkv_bias=True)


@functools.cache
def _on_one_device():
    with sharding.use(sharding.make_mesh(devices=jax.devices()[:1])):
        return jax.device_get(_loss(hub.random_tower(EVERYTHING, seed=3), *_batch(3)))


@jax.jit
@jax.value_and_grad
def _loss(tower, token_ids, mask):
    return jnp.sum(jnp.sin(tower(token_ids, mask)) * mask[..., None])


def _assert_same(got, wanted):
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(wanted[1]), strict=True):
        assert relative_error(a, b) < 1e-5


def test_meshes_agree_and_place_parameters_as_the_table_says(mesh):
    tower = hub.random_tower(EVERYTHING, seed=3)
    _assert_same(_loss(tower, *_batch(3)), _on_one_device())
    for parameter, axes in [
        (tower.word_embeddings.embedding, ("vocab", "embed")),
        (tower.final_norm.scale, ("norm",)),
        (tower.layers.attention.q_proj.kernel, ("layers", "embed", "heads")),
        (tower.layers.attention.k_proj.kernel, ("layers", "embed", "kv_heads")),
        (tower.layers.attention.v_proj.bias, ("layers", "kv_heads")),
        (tower.layers.attention.o_proj.kernel, ("layers", "heads", "embed")),
        (tower.layers.q_norm.scale, ("layers", "norm")),
        (tower.layers.mlp.gate_proj.kernel, ("layers", "embed", "mlp")),
        (tower.layers.mlp.down_proj.kernel, ("layers", "mlp", "embed")),
        (tower.layers.mlp_norm.scale, ("layers", "norm")),
    ]:
        value = parameter.get_value()
        wanted = jax.sharding.NamedSharding(mesh, sharding.spec(*axes))
        assert value.sharding.is_equivalent_to(wanted, value.ndim), axes
        assert tuple(parameter.get_metadata()["out_sharding"]) == axes


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_gradient(remat):
    with sharding.use(sharding.make_mesh(devices=jax.devices()[:1])):
        got = _loss(hub.random_tower(EVERYTHING, seed=3, remat=remat), *_batch(3))
    _assert_same(got, _on_one_device())


@pytest.mark.parametrize("preset", TINY)
def test_every_parameter_names_each_of_its_axes(preset, single_mesh):
    tower = Decoder(hub.text_config(f"random:{preset}", vocab_size=99), rngs=nnx.Rngs(0))
    variables = jax.tree.leaves(tower, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    axes = {len(leaf.get_metadata()["out_sharding"]) - leaf.get_value().ndim for leaf in variables}
    assert axes == {0}


@pytest.mark.parametrize("preset", TINY)
def test_configs_survive_json(preset):
    config = presets.TEXT[preset]
    assert hub.tower_config_from_json(json.loads(json.dumps(hub.tower_config_to_json(config)))) == config
