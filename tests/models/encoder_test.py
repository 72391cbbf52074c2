"""Encoders against PyTorch, and what must not change an embedding: packing, company, mesh, remat."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from comparison import relative_error
from flax import nnx

from vixml_jax import sharding
from vixml_jax.models import hf_names, hub
from vixml_jax.models.encoder import Encoder


def _batch(seed: int, rows: int = 8, slots: int = 11) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    # PyTorch gives the padding token 0 no gradient; it stands nowhere but in padding.
    token_ids = rng.integers(1, 99, (rows, slots)).astype(np.int32)
    mask = np.arange(slots) < rng.integers(1, slots + 1, (rows, 1))
    mask[0] = True
    return token_ids, mask


def _hidden(model, token_ids, mask):
    encoder = getattr(model, "bert", model)
    return encoder(torch.tensor(token_ids).long(), attention_mask=torch.tensor(mask).long()).last_hidden_state


@pytest.mark.parametrize("name", ["bert", "bert_masked_lm", "distilbert"])
def test_hidden_states_and_gradients_equal_pytorch(name, torch_model, seed, single_mesh):
    model, directory = torch_model(name)
    token_ids, mask = _batch(seed)
    tower = hub.load_text_tower(str(directory))
    weights = np.random.default_rng(seed).normal(size=(*mask.shape, tower.dim)).astype(np.float32)
    weights *= mask[..., None]

    hidden = _hidden(model, token_ids, mask)
    (hidden * torch.tensor(weights)).sum().backward()
    expected = hidden.detach().numpy()

    got = np.asarray(tower(token_ids, mask))
    assert got.shape == expected.shape
    assert relative_error(got[mask], expected[mask]) < 1e-5

    gradients = jax.jit(jax.grad(lambda tower: jnp.sum(tower(token_ids, mask) * weights)))(tower)
    by_path = {".".join(map(str, p)): leaf[...] for p, leaf in nnx.to_flat_state(nnx.state(gradients))}
    named = {name.removeprefix("bert."): p.grad for name, p in model.named_parameters()}
    largest = max(float(g.norm()) for g in named.values() if g is not None)
    family = hf_names.TEXT_FAMILIES[name.split("_")[0]]
    for entry in family.entries(tower.config):
        stack = np.asarray(by_path[entry.path])
        parts = list(enumerate(stack)) if entry.stacked else [(0, stack)]
        for i, part in parts:
            wanted = named[entry.hf.format(i=i)].numpy()
            error = np.linalg.norm(entry.layout.write(part) - wanted)
            # A key's bias moves no attention weight: its gradient is rounding noise in both.
            assert error < 1e-4 * max(np.linalg.norm(wanted), 1e-3 * largest), entry.hf


@pytest.mark.parametrize("name", ["bert", "bert_masked_lm", "distilbert"])
def test_bfloat16_stays_close_to_pytorch_in_float32(name, torch_model, seed, single_mesh):
    model, directory = torch_model(name)
    token_ids, mask = _batch(seed)
    with torch.no_grad():
        expected = _hidden(model, token_ids, mask).numpy()
    tower = hub.load_text_tower(str(directory), "bfloat16", param_dtype="bfloat16")
    got = tower(token_ids, mask)
    assert got.dtype == jnp.bfloat16
    assert relative_error(np.asarray(got, np.float32)[mask], expected[mask]) < 2e-2


def test_packed_rows_equal_one_sequence_a_row(single_mesh, seed):
    tower = hub.load_text_tower("random:bert-tiny", vocab_size=99, seed=seed)
    rng = np.random.default_rng(seed)
    items = [rng.integers(0, 99, n) for n in (5, 3, 7, 1, 4)]
    places = [(0, 0), (0, 5), (1, 0), (1, 7), (0, 8)]  # row and first slot of each item
    token_ids, segments, positions = np.zeros((3, 2, 13), np.int32)
    for number, (item, (row, start)) in enumerate(zip(items, places, strict=True)):
        stop = start + len(item)
        token_ids[row, start:stop] = item
        segments[row, start:stop] = number + 1
        positions[row, start:stop] = np.arange(len(item))
    packed = np.asarray(tower.encode(tower.embed_tokens(token_ids), segments, positions))
    for item, (row, start) in zip(items, places, strict=True):
        alone = np.asarray(tower(item[None].astype(np.int32), np.ones((1, len(item)), bool)))[0]
        np.testing.assert_allclose(packed[row, start : start + len(item)], alone, atol=1e-5)


def test_embedding_does_not_depend_on_batch_mates_or_padding(single_mesh, seed):
    tower = hub.load_text_tower("random:bert-tiny", vocab_size=99, seed=seed)
    token_ids, mask = _batch(seed)
    together = np.asarray(tower(token_ids, mask))
    for row in (0, 3):
        length = int(mask[row].sum())
        alone = np.asarray(tower(token_ids[row : row + 1, :length], mask[row : row + 1, :length]))[0]
        np.testing.assert_allclose(together[row, :length], alone, atol=1e-5)
    padded = np.where(mask, token_ids, 7)  # what stands in the padding is of no account
    np.testing.assert_allclose(np.asarray(tower(padded, mask))[mask], together[mask], atol=1e-6)
    assert np.isfinite(np.asarray(tower(token_ids, np.zeros_like(mask)))).all()


@functools.cache
def _on_one_device():
    token_ids, mask = _batch(3)
    with sharding.use(sharding.make_mesh(devices=jax.devices()[:1])):
        value, gradient = _loss(
            hub.load_text_tower("random:bert-tiny", vocab_size=99, seed=3), token_ids, mask
        )
        return jax.device_get((value, jax.tree.leaves(gradient)))


@jax.jit
@jax.value_and_grad
def _loss(tower, token_ids, mask):
    return jnp.sum(jnp.sin(tower(token_ids, mask)) * mask[..., None])


def test_meshes_agree_and_place_parameters_as_the_table_says(mesh):
    token_ids, mask = _batch(3)
    tower = hub.load_text_tower("random:bert-tiny", vocab_size=99, seed=3)
    value, gradient = _loss(tower, token_ids, mask)
    wanted, wanted_gradient = _on_one_device()
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for got, expected in zip(jax.tree.leaves(gradient), wanted_gradient, strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=1e-4, atol=1e-4)

    def spec(*axes):
        return jax.sharding.NamedSharding(mesh, sharding.spec(*axes))

    for parameter, axes in [
        (tower.word_embeddings.embedding, ("vocab", "embed")),
        (tower.position_embeddings, ("position", "embed")),
        (tower.embedding_norm.scale, ("norm",)),
        (tower.layers.attention.q_proj.kernel, ("layers", "embed", "heads")),
        (tower.layers.attention.q_proj.bias, ("layers", "heads")),
        (tower.layers.attention.o_proj.kernel, ("layers", "heads", "embed")),
        (tower.layers.mlp.up_proj.kernel, ("layers", "embed", "mlp")),
        (tower.layers.mlp.down_proj.kernel, ("layers", "mlp", "embed")),
        (tower.layers.mlp_norm.bias, ("layers", "norm")),
    ]:
        value = parameter.get_value()
        assert value.sharding.is_equivalent_to(spec(*axes), value.ndim), axes
        assert tuple(parameter.get_metadata()["out_sharding"]) == axes


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_gradient(remat):
    token_ids, mask = _batch(3)
    with sharding.use(sharding.make_mesh(devices=jax.devices()[:1])):
        tower = hub.load_text_tower("random:bert-tiny", vocab_size=99, seed=3, remat=remat)
        _, gradient = _loss(tower, token_ids, mask)
    for got, expected in zip(jax.tree.leaves(gradient), _on_one_device()[1], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_close_and_keeps_float32_parameters(single_mesh, seed):
    token_ids, mask = _batch(seed)
    exact = np.asarray(hub.load_text_tower("random:bert-tiny", vocab_size=99)(token_ids, mask))
    tower = hub.load_text_tower("random:bert-tiny", "bfloat16", vocab_size=99)
    got = tower(token_ids, mask)
    assert got.dtype == jnp.bfloat16
    assert tower.layers.mlp.up_proj.kernel.get_value().dtype == jnp.float32
    assert relative_error(np.asarray(got, np.float32)[mask], exact[mask]) < 0.02


def test_every_parameter_names_each_of_its_axes(single_mesh):
    tower = Encoder(hub.text_config("random:bert-tiny", vocab_size=99), rngs=nnx.Rngs(0))
    axes = {len(leaf.get_metadata()["out_sharding"]) - leaf.get_value().ndim for leaf in _variables(tower)}
    assert axes == {0}


def _variables(module):
    return jax.tree.leaves(module, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
