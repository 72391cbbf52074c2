"""Late fusion: against PyTorch, packed against one at a time, and the text tower kept from the pictures."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from vixml_jax import sharding
from vixml_jax.data import packing, prompt
from vixml_jax.models import hub
from vixml_jax.models.late_fusion import LateFusion, LateFusionTower, image_places
from vixml_jax.models.two_tower import TwoTower, image_projection

IMAGE_DIM, MAX_IMAGES = 12, 3
LENGTHS = (3, 1, 6, 4, 2, 5, 3, 4)
PRESENT = np.array(
    [[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0], [1, 1, 1]], bool
)
TEXT_THEN_PICTURES = packing.Template((packing.Part(packing.TEXT), packing.Part(packing.IMAGES)))


def lively(module: nnx.Module, rng: np.random.Generator) -> None:
    """Moves every parameter away from its start, zeros above all."""
    for parameter in jax.tree.leaves(module, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        value = np.asarray(parameter.get_value())
        moved = value + 0.1 * rng.normal(size=value.shape).astype(np.float32)
        parameter[...] = jax.device_put(moved, parameter.get_value().sharding)


def tower_of(seed: int) -> LateFusionTower:
    rng = np.random.default_rng(seed)
    text = hub.load_text_tower("random:bert-tiny", vocab_size=99, seed=seed)
    projection = image_projection(IMAGE_DIM, text.dim, rngs=nnx.Rngs(seed))
    fusion = LateFusion(text.dim, heads=4, feed_forward=32, rngs=nnx.Rngs(seed + 1))
    lively(fusion, rng)
    return LateFusionTower(text, projection, "mean", fusion=fusion, max_images=MAX_IMAGES)


def items(seed: int):
    """Token ids and pictures of eight items; the sixth's picture stands in its second place."""
    rng = np.random.default_rng(seed + 1)
    tokens = [rng.integers(1, 99, length).astype(np.int32) for length in LENGTHS]
    return tokens, rng.normal(size=(len(LENGTHS), MAX_IMAGES, IMAGE_DIM)).astype(np.float32)


def packed(tokens, images, present=PRESENT, row_multiple=8):
    lengths = np.array([len(item) for item in tokens])
    sequences = packing.assemble(np.concatenate(tokens), lengths, TEXT_THEN_PICTURES, images, present)
    return packing.pack(sequences, 16, row_multiple=row_multiple)


embed = jax.jit(lambda tower, tokens, num_items: tower(tokens, num_items), static_argnums=2)


def torch_fusion(fusion: LateFusion, text, images) -> np.ndarray:
    """One item: its set through PyTorch's layer, then the mean."""
    layer = torch.nn.TransformerEncoderLayer(
        fusion.dim, fusion.heads, 32, dropout=0.0, batch_first=True, activation="gelu"
    )
    host = lambda x: torch.tensor(np.asarray(x[...]))  # noqa: E731
    projections = (fusion.q_proj, fusion.k_proj, fusion.v_proj)
    values = {
        "self_attn.in_proj_weight": torch.cat([host(p.kernel).T for p in projections]),
        "self_attn.in_proj_bias": torch.cat([host(p.bias) for p in projections]),
    }
    for name, linear in (
        ("self_attn.out_proj", fusion.o_proj),
        ("linear1", fusion.mlp.up_proj),
        ("linear2", fusion.mlp.down_proj),
    ):
        values |= {f"{name}.weight": host(linear.kernel).T, f"{name}.bias": host(linear.bias)}
    for name, norm in (("norm1", fusion.attention_norm), ("norm2", fusion.mlp_norm)):
        values |= {f"{name}.weight": host(norm.scale), f"{name}.bias": host(norm.bias)}
    layer.load_state_dict(values)
    with torch.no_grad():
        return layer(torch.tensor(np.stack([text, *images]))[None])[0].mean(0).numpy()


def test_items_equal_pytorch_one_at_a_time(single_mesh, seed):
    tower, (tokens, images) = tower_of(seed), items(seed)
    together = np.asarray(embed(tower, packed(tokens, images), len(tokens)))
    texts = TwoTower(tower.text, None, "mean")
    alone = packing.assemble(np.concatenate(tokens), np.array(LENGTHS), packing.Template())
    text_ND = np.asarray(embed(texts, packing.pack(alone, 16), len(tokens)))
    kernel, bias = (np.asarray(x[...]) for x in (tower.image_projection.kernel, tower.image_projection.bias))
    for item, there in enumerate(PRESENT):
        expected = torch_fusion(tower.fusion, text_ND[item], images[item][there] @ kernel + bias)
        np.testing.assert_allclose(together[item], expected, atol=2e-5)
    # An item has the same embedding in a batch that has no pictures at all.
    without = np.asarray(embed(tower, packing.pack(alone, 16), len(tokens)))
    np.testing.assert_allclose(without[~PRESENT.any(1)], together[~PRESENT.any(1)], atol=2e-5)


def test_a_mesh_gives_the_same(seed):
    tokens, images = items(seed)
    results = []
    for sizes, devices in (((1, 1, 1), jax.devices()[:1]), ((2, 2, 2), None)):
        with sharding.use(sharding.make_mesh(*sizes, devices=devices)):
            results.append(np.asarray(embed(tower_of(seed), packed(tokens, images), len(tokens))))
    np.testing.assert_allclose(*results, atol=1e-5)


def test_it_starts_as_the_mean_of_what_there_is(single_mesh, seed):
    rng = np.random.default_rng(seed)
    fusion = LateFusion(8, heads=2, feed_forward=16, rngs=nnx.Rngs(seed))
    text, images = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 8), (2, 3, 8)))
    present = np.array([[True, False, True], [False, False, False]])

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)

    out = np.asarray(jax.jit(lambda *args: fusion(*args))(text, images, present))
    there = np.stack([text[0], images[0, 0], images[0, 2]])
    np.testing.assert_allclose(out, [norm(there).mean(0), norm(text[1])], atol=1e-3)


def test_places_of_pictures(seed):
    rng = np.random.default_rng(seed)
    rows = [[], []]
    expected = [[], []]
    for item in rng.permutation(8).tolist():
        row, pictures = int(rng.integers(2)), int(rng.integers(0, 4))
        text = int(rng.integers(0, 3))  # also items of pictures alone, touching each other
        rows[row] += [(item, -1)] * text + [(item, 7)] * pictures
        expected[row] += [32] * text + [item * 4 + place for place in range(pictures)]
    width = max(map(len, rows)) + 1
    item_index = np.array([[i for i, _ in row] + [8] * (width - len(row)) for row in rows], np.int32)
    image_index = np.array([[p for _, p in row] + [-1] * (width - len(row)) for row in rows], np.int32)
    places = image_places(image_index, item_index, 8, 4)
    np.testing.assert_array_equal(places, [row + [32] * (width - len(row)) for row in expected])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (prompt.ENCODER, "{text}{images}"),
        (prompt.DECODER, "{bos}This product text {text}{eos}{images}"),
        ("[This product image {images} and its text ]{text}{eos}", "{text}{eos}{images}"),
        ("{text}", "{text}{images}"),
    ],
)
def test_pictures_come_last_in_a_prompt(given, expected):
    assert prompt.pictures_last(given) == expected
