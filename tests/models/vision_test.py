"""Vision towers against PyTorch, and what a random one must let through."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import torch
from comparison import relative_error
from flax import nnx

from vixml_jax.models import hub, presets
from vixml_jax.models.vision import VisionTower, patches


def test_embeddings_equal_pytorch_on_every_mesh(mesh, torch_model, seed):
    model, directory = torch_model("vit")
    pixels = np.random.default_rng(seed).normal(size=(8, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        hidden = model(torch.tensor(pixels).permute(0, 3, 1, 2)).last_hidden_state  # after the final norm
    tower = hub.load_vision_tower(str(directory))
    got = np.asarray(tower(pixels))
    assert got.dtype == np.float32
    assert tower.dim == got.shape[1] == 64
    assert relative_error(got, hidden[:, 0].numpy()) < 1e-5


def test_patches_are_cut_row_by_row():
    pixels = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    got = np.asarray(patches(jax.numpy.asarray(pixels), 2))
    expected = [pixels[:, y : y + 2, x : x + 2].reshape(2, -1) for y in (0, 2) for x in (0, 2, 4)]
    np.testing.assert_array_equal(got, np.stack(expected, axis=1))


def test_random_vit_lets_differences_through(single_mesh, seed):
    tower = hub.load_vision_tower("random:vit-tiny", seed=seed)
    rng = np.random.default_rng(seed)
    flat = rng.uniform(-1, 1, (6, 1, 1, 3)) * np.ones((1, 64, 64, 1))  # of one colour each
    busy = rng.uniform(-1, 1, (6, 64, 64, 3))
    embeddings = np.asarray(tower(np.concatenate([flat, busy]).astype(np.float32)))
    assert embeddings.shape == (12, 192)
    assert np.isfinite(embeddings).all()
    size = np.linalg.norm(embeddings, axis=1).mean() / np.sqrt(192)
    assert embeddings[:6].std(0).mean() > 0.3 * size
    assert embeddings.std(0).mean() > 0.3 * size
    distances = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=-1)
    assert distances[~np.eye(12, dtype=bool)].min() > size


@pytest.mark.parametrize("shape", [(1, 32, 32, 3), (1, 64, 64, 1), (1, 3, 64, 64), (64, 64, 3)], ids=str)
def test_images_of_another_size_are_refused(single_mesh, shape):
    tower = hub.load_vision_tower("random:vit-tiny")
    with pytest.raises(ValueError, match=r"takes \[B, 64, 64, 3\]"):
        tower(np.zeros(shape, np.float32))


def test_a_class_pool_needs_a_class_token(single_mesh):
    config = dataclasses.replace(presets.vision_preset("vit-tiny"), pool="cls")
    with pytest.raises(ValueError, match="class_token=False"):
        VisionTower(config, rngs=nnx.Rngs(0))
