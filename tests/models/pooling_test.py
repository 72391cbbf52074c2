"""Pooling against a slow loop, the start of the image projection, and packed items with pictures."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vixml_jax import sharding
from vixml_jax.data import packing
from vixml_jax.models import chunks, hub
from vixml_jax.models.pooling import pool
from vixml_jax.models.two_tower import (
    TwoTower,
    image_projection,
    into_slots,
    l2_normalize,
    standardised_projection,
)

ROWS, SLOTS, DIM, IMAGE_DIM = 8, 13, 5, 12


def _layout(rng: np.random.Generator, num_items: int) -> np.ndarray:
    """Item numbers of slots: runs of one item, some touching, padding between others; half have no slots."""
    index = np.full((ROWS, SLOTS), num_items, np.int32)
    waiting = rng.permutation(num_items)[: num_items // 2].tolist()
    for row in range(ROWS):
        column = int(rng.integers(0, 3))
        while waiting and column < SLOTS:
            length = int(rng.integers(1, 6))
            index[row, column : column + length] = waiting.pop()
            column += length + int(rng.integers(0, 2))
    return index


def slow_pool(hidden, index, num_items: int, pooling: str) -> np.ndarray:
    out = np.zeros((num_items, hidden.shape[-1]))
    for item in range(num_items):
        found = [
            hidden[row, slot] for row in range(ROWS) for slot in range(SLOTS) if index[row, slot] == item
        ]
        if found:
            out[item] = found[-1] if pooling == "last" else np.mean(found, axis=0)
    return out


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("num_items", [32, 29])  # the odd number does not split over devices
def test_pool_equals_slow_loop_on_every_mesh(mesh, pooling, num_items, seed):
    rng = np.random.default_rng(seed)
    index = _layout(rng, num_items)
    hidden = rng.normal(size=(ROWS, SLOTS, DIM)).astype(np.float32)
    weights = rng.normal(size=(num_items, DIM)).astype(np.float32)

    @jax.jit
    def gradient_and_value(hidden, index):
        def weighted(hidden):
            pooled = pool(hidden, index, num_items, pooling)
            return jnp.sum(pooled * weights), pooled

        return jax.grad(weighted, has_aux=True)(hidden)

    split = NamedSharding(mesh, P(sharding.ROWS))
    gradient, pooled = gradient_and_value(jax.device_put(hidden, split), jax.device_put(index, split))
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled, slow_pool(hidden, index, num_items, pooling), atol=1e-5)

    expected = np.zeros_like(hidden)
    for item in range(num_items):
        slots = np.argwhere(index == item)
        slots = slots[-1:] if pooling == "last" else slots
        for row, slot in slots:
            expected[row, slot] = weights[item] / len(slots)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_pool_sums_in_float32(single_mesh):
    hidden = jnp.ones((1, 1000, 1), jnp.bfloat16)  # a bfloat16 sum of ones stops at 256
    pooled = jax.jit(pool, static_argnums=(2, 3))(hidden, jnp.zeros((1, 1000), jnp.int32), 1, "mean")
    assert pooled.dtype == jnp.float32
    assert float(pooled[0, 0]) == 1


def test_l2_normalize():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-8, 0.0]])

    @jax.jit
    @jax.grad
    def gradient(x):
        return l2_normalize(x).sum()

    np.testing.assert_allclose(jax.jit(l2_normalize)(x), [[0.6, 0.8], [0, 0], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(gradient(x), [[0.032, -0.024], [0, 0], [0, 0]], atol=1e-6)


def _projected(sample, kernel, bias):
    return sample.astype(np.float32) @ kernel + bias


def test_standardised_projection(seed):
    rng = np.random.default_rng(seed)
    spread, mean = rng.uniform(0.01, 2.0, IMAGE_DIM), 5 * rng.normal(size=IMAGE_DIM)
    sample = (mean + spread * rng.normal(size=(50, IMAGE_DIM))).astype(np.float32)
    kernel, bias = standardised_projection(sample, 32, jax.random.key(seed), 0.02)
    assert kernel.shape == (IMAGE_DIM, 32)
    assert bias.shape == (32,)
    assert kernel.dtype == bias.dtype == np.float32
    projected = _projected(sample, kernel, bias)
    np.testing.assert_allclose(projected.mean(0), 0, atol=0.02 * 1e-3)
    assert projected.std() == pytest.approx(0.02, rel=1e-3)
    # Every feature has a say, not only those that vary most.
    share = np.abs(kernel * sample.std(0)[:, None]).mean(1)
    assert share.max() < 4 * share.min()
    same = standardised_projection(sample, 32, jax.random.key(seed), 0.02)
    np.testing.assert_array_equal(kernel, same[0])


def test_constant_features_do_not_blow_up(seed):
    rng = np.random.default_rng(seed)
    sample = rng.normal(size=(50, IMAGE_DIM)).astype(np.float32)
    sample[:, 2], sample[:, 7] = 3.3, 0
    kernel, bias = standardised_projection(sample, 32, jax.random.key(seed), 0.02)
    projected = _projected(sample, kernel, bias)
    np.testing.assert_allclose(projected.mean(0), 0, atol=0.02 * 1e-3)
    assert projected.std() == pytest.approx(0.02, rel=1e-3)
    other = rng.normal(size=(50, IMAGE_DIM)).astype(np.float32)  # here both features vary
    other[:, 2] += 3.3
    assert _projected(other, kernel, bias).std() < 0.1


def test_a_sample_of_equal_images_gives_finite_numbers():
    kernel, bias = standardised_projection(np.ones((4, IMAGE_DIM)), 8, jax.random.key(0), 0.02)
    assert np.isfinite(kernel).all()
    assert np.isfinite(bias).all()


def _items(rng: np.random.Generator):
    """Tokens of seven items and up to two pictures for each."""
    tokens = [rng.integers(1, 99, length).astype(np.int32) for length in (3, 1, 6, 4, 2, 5, 3)]
    present = np.array([[1, 1], [1, 0], [0, 0], [1, 0], [0, 0], [1, 1], [0, 1]], bool)
    images = rng.normal(size=(len(tokens), 2, IMAGE_DIM)).astype(np.float32)
    return tokens, images, present


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_packed_items_with_images_equal_one_at_a_time(single_mesh, pooling, seed):
    rng = np.random.default_rng(seed)
    text = hub.load_text_tower("random:bert-tiny", vocab_size=99, seed=seed)
    tower = TwoTower(text, image_projection(IMAGE_DIM, text.dim, rngs=nnx.Rngs(seed)), pooling)
    tokens, images, present = _items(rng)
    suffix = packing.Part(np.array([2], np.int32))
    template = packing.Template((*packing.Template().parts, suffix))
    embed = jax.jit(lambda tower, packed, num_items: tower(packed, num_items), static_argnums=2)

    def assembled(chosen, images):
        lengths = np.array([len(tokens[item]) for item in chosen])
        values = np.concatenate([tokens[item] for item in chosen])
        return packing.assemble(values, lengths, template, images[chosen], present[chosen])

    everything = np.arange(len(tokens))
    packed = packing.pack(assembled(everything, images), 16, row_multiple=4)
    together = np.asarray(embed(tower, packed, len(tokens)))
    assert together.shape == (len(tokens), text.dim)
    for item in everything:
        alone = packing.pack(assembled(everything[item : item + 1], images), 16, image_multiple=2)
        np.testing.assert_allclose(embed(tower, alone, 1)[0], together[item], atol=1e-5)

    other = images.copy()
    other[3] += 3
    packed = packing.pack(assembled(everything, other), 16, row_multiple=4)
    moved = np.abs(np.asarray(embed(tower, packed, len(tokens))) - together).max(1)
    assert moved[3] > 1e-4
    assert np.delete(moved, 3).max() < 1e-5


def test_what_cannot_be(single_mesh):
    text = hub.load_text_tower("random:bert-tiny", vocab_size=99)
    with pytest.raises(ValueError, match="'mean' or 'last'"):
        TwoTower(text, pooling="max")
    sequences = packing.assemble(
        np.array([5, 6], np.int32),
        np.array([2]),
        packing.Template(),
        np.ones((1, 1, IMAGE_DIM), np.float32),
        np.ones((1, 1), bool),
    )
    with pytest.raises(ValueError, match="no image projection"):
        TwoTower(text)(packing.pack(sequences, 8), 1)


def test_images_of_a_shard_fill_its_slots_on_every_mesh(mesh, seed):
    shards, rng = sharding.num_row_shards(mesh), np.random.default_rng(seed)
    images = rng.normal(size=(3 * shards, DIM)).astype(np.float32)
    index = rng.integers(0, 3, (2 * shards, SLOTS)) + np.repeat(3 * np.arange(shards), 2)[:, None]
    weights = rng.normal(size=(*index.shape, DIM)).astype(np.float32)
    split = NamedSharding(mesh, P(sharding.ROWS))
    found, gradient = jax.jit(
        lambda images, index: (
            into_slots(images, index, shards),
            jax.grad(lambda images: jnp.sum(into_slots(images, index, shards) * weights))(images),
        )
    )(jax.device_put(images, split), jax.device_put(index.astype(np.int32), split))
    np.testing.assert_array_equal(found, images[index])
    expected = np.zeros_like(images)
    np.add.at(expected, index, weights)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_chunks_of_rows_change_nothing(mesh, seed):
    check_chunks(mesh, False, seed)


def test_chunks_of_pixels_change_nothing(single_mesh, seed):
    check_chunks(single_mesh, True, seed)


def check_chunks(mesh, pixels, seed):
    """Embeddings and gradients, with pictures, be these embedded or the pixels of a tower that trains."""
    rng = np.random.default_rng(seed)
    shards, size = sharding.num_row_shards(mesh), 32
    vision = hub.random_tower(hub.presets.VISION["siglip-tiny"]) if pixels else None
    width = size * size * 3 if pixels else IMAGE_DIM
    text = hub.random_tower(hub.presets.TEXT["bert-tiny"])
    projection = image_projection(32 if pixels else IMAGE_DIM, text.dim, rngs=nnx.Rngs(1))
    tower = TwoTower(text, projection, vision=vision)
    counts = rng.integers(0, 3, 64)
    lengths = rng.integers(1, 8, 64)
    sequences = packing.assemble(
        rng.integers(5, 60, lengths.sum()).astype(np.int32),
        lengths,
        packing.Template(),
        rng.normal(size=(64, 2, width)).astype(np.float32),
        np.arange(2) < counts[:, None],
    )
    multiples = {"shards": shards, "row_multiple": 4, "image_multiple": 4}
    tokens = jax.tree.map(
        lambda x: jax.device_put(x, sharding.rows(mesh)), packing.pack(sequences, 16, **multiples)
    )
    weights = rng.normal(size=(64, text.dim)).astype(np.float32)
    graphdef, params = nnx.split(tower)

    @functools.partial(jax.jit, static_argnums=1)
    def gradients_and_value(params, chunk_rows):
        def weighted(params):
            embedded = nnx.merge(graphdef, params)(tokens, 64, chunk_rows)
            return jnp.sum(embedded * weights), embedded

        return jax.grad(weighted, has_aux=True)(params)

    expected_gradients, expected = gradients_and_value(params, 0)
    gradients, found = gradients_and_value(params, 4)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    # Some gradients, as of a key's bias, are 0 but for rounding.
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected_gradients))
    for gradient, reference in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        np.testing.assert_allclose(gradient, reference, atol=1e-5 * scale)


def test_rows_that_chunks_do_not_divide_are_refused(single_mesh):
    with pytest.raises(ValueError, match="6 rows on 1 devices are no multiple of 4 each"):
        chunks.cut(jnp.zeros((6, 2)), 4)
    assert chunks.cut(jnp.zeros((4, 2)), 4) is None
    parts = chunks.cut(jnp.arange(12).reshape(6, 2), 2)
    np.testing.assert_array_equal(chunks.join(parts), np.arange(12).reshape(6, 2))
