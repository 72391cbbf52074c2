"""Vision towers against PyTorch, and what a random one must let through."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from comparison import relative_error
from flax import nnx
from safetensors.numpy import load_file, save_file

from vixml_jax.errors import UserError
from vixml_jax.models import hub, presets
from vixml_jax.models.hf_vision import VISION_FAMILIES
from vixml_jax.models.vision import VisionTower, patches

TOWERS = ["vit", "vit_classifier", "siglip", "siglip_alone", "siglip2", "siglip2_alone", "clip", "clip_alone"]
ONE_OF_A_FAMILY = ["vit", "siglip_alone", "siglip2_alone", "clip_alone"]  # compiling gradients takes seconds


def _pictures(seed: int, tower, count: int = 4) -> np.ndarray:
    size = tower.config.image_size
    return np.random.default_rng(seed).normal(size=(count, size, size, 3)).astype(np.float32)


def _embed_in_pytorch(model: torch.nn.Module, pixels_BHWC: torch.Tensor) -> torch.Tensor:
    """The embedding that the checkpoint's own class calls its pooled output; of a ViT, the class token."""
    pixels_BCHW = pixels_BHWC.permute(0, 3, 1, 2)
    model = getattr(model, "vision_model", getattr(model, "vit", model))
    if isinstance(model, transformers.ViTModel):
        return model(pixels_BCHW).last_hidden_state[:, 0]  # after the final norm
    if isinstance(model, transformers.Siglip2VisionModel):
        # Its processor cuts the patches.
        patch, (batch, size) = model.config.patch_size, pixels_BHWC.shape[:2]
        grid = pixels_BHWC.reshape(batch, size // patch, patch, size // patch, patch, 3)
        cut = grid.permute(0, 1, 3, 2, 4, 5).reshape(batch, (size // patch) ** 2, patch * patch * 3)
        shapes = torch.full((batch, 2), size // patch)
        mask = torch.ones(cut.shape[:2], dtype=torch.int32)
        return model(cut, pixel_attention_mask=mask, spatial_shapes=shapes).pooler_output
    return model(pixels_BCHW).pooler_output


def _gradients_on_disk(model: torch.nn.Module, directory: Path) -> dict[str, np.ndarray]:
    """Gradients of all parameters by the names that they have in a file; in memory they may have others."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("name", TOWERS)
def test_embeddings_equal_pytorch(name, torch_model, seed, single_mesh):
    model, directory = torch_model(name)
    tower = hub.load_vision_tower(str(directory))
    pixels = _pictures(seed, tower)
    with torch.no_grad():
        expected = _embed_in_pytorch(model, torch.tensor(pixels)).numpy()
    got = tower(pixels)
    assert got.dtype == np.float32
    assert got.shape == expected.shape == (len(pixels), tower.dim)
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("name", ONE_OF_A_FAMILY)
def test_gradients_equal_pytorch(name, torch_model, seed, single_mesh, tmp_path):
    model, directory = torch_model(name)
    tower = hub.load_vision_tower(str(directory))
    pixels = _pictures(seed, tower)
    weights = np.random.default_rng(seed + 1).normal(size=(len(pixels), tower.dim)).astype(np.float32)
    inputs = torch.tensor(pixels, requires_grad=True)
    (_embed_in_pytorch(model, inputs) * torch.tensor(weights)).sum().backward()
    assert inputs.grad is not None

    gradients, pixel_gradient = jax.jit(
        jax.grad(lambda tower, pixels: jnp.sum(tower.embed(pixels) * weights), argnums=(0, 1))
    )(tower, pixels)
    assert relative_error(pixel_gradient, inputs.grad.numpy()) < 1e-4
    family = VISION_FAMILIES[json.loads((directory / "config.json").read_text())["model_type"]]
    wanted = {
        family.plain_name(key): value
        for key, value in _gradients_on_disk(model, tmp_path / "gradients").items()
        if not family.is_ignored(family.plain_name(key))
    }
    written = _tensors(family, tower.config, gradients)
    assert written.keys() == wanted.keys()
    largest = max(np.linalg.norm(value) for value in wanted.values())
    for key, value in wanted.items():
        # A key's bias moves no attention weight: its gradient is rounding noise in both.
        assert np.linalg.norm(written[key] - value) < 1e-4 * max(np.linalg.norm(value), 1e-3 * largest), key


def _tensors(family, config, tower) -> dict[str, np.ndarray]:
    """A tower's parameters as a file has them; several may lie in one tensor."""
    flat = {".".join(map(str, p)): np.asarray(leaf[...]) for p, leaf in nnx.to_flat_state(nnx.state(tower))}
    tensors: dict[str, np.ndarray] = {}
    for entry in family.entries(config):
        parts = flat.pop(entry.path)
        for i, part in enumerate(parts if entry.stacked else [parts]):
            name = entry.hf.format(i=i)
            tensors[name] = tensors.get(name, 0) + np.ascontiguousarray(entry.layout.write(part))
    assert not flat
    return tensors


@pytest.mark.parametrize("name", ["vit", "siglip", "clip"])
def test_bfloat16_stays_close_to_pytorch_in_float32(name, torch_model, seed, single_mesh):
    model, directory = torch_model(name)
    tower = hub.load_vision_tower(str(directory), "bfloat16", param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(tower)} == {jnp.dtype("bfloat16")}
    pixels = _pictures(seed, tower, 8)
    with torch.no_grad():
        expected = _embed_in_pytorch(model, torch.tensor(pixels)).numpy()
    assert relative_error(tower(pixels), expected) < 0.02


def test_meshes_agree_with_pytorch(mesh, torch_model, seed):
    model, directory = torch_model("siglip")
    tower = hub.load_vision_tower(str(directory))
    pixels = _pictures(seed, tower, 8)
    with torch.no_grad():
        expected = _embed_in_pytorch(model, torch.tensor(pixels)).numpy()
    assert relative_error(tower(pixels), expected) < 1e-5


@pytest.mark.parametrize("name", TOWERS)
def test_what_is_written_is_the_same_tower_to_transformers_and_to_us(
    name, torch_model, tmp_path, single_mesh, seed
):
    """Also the side of a two-tower checkpoint, which is written alone."""
    model, directory = torch_model(name)
    tower = hub.load_vision_tower(str(directory))
    written = tmp_path / "written"
    written.mkdir()
    raw = VISION_FAMILIES[tower.config.family].write_config(tower.config)
    (written / "config.json").write_text(json.dumps(raw))
    tensors = _tensors(VISION_FAMILIES[tower.config.family], tower.config, tower)
    save_file(tensors, written / "model.safetensors", metadata={"format": "pt"})

    again = transformers.AutoModel.from_pretrained(written).eval()
    pixels = torch.tensor(_pictures(seed, tower))
    with torch.no_grad():
        assert torch.equal(_embed_in_pytorch(again, pixels), _embed_in_pytorch(model, pixels))
    back = hub.load_vision_tower(str(written))
    assert back.config == tower.config
    for got, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(tower), strict=True):
        np.testing.assert_array_equal(got, wanted)


_SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 32, "num_attention_heads": 2,
           "intermediate_size": 48, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}  # fmt: skip


def test_a_file_may_leave_out_what_is_usual_in_its_family(tmp_path):
    def read(raw: dict, processor: dict | None = None, file: str = "preprocessor_config.json"):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        if processor is not None:
            (tmp_path / file).write_text(json.dumps(processor))
        config = hub.vision_config(str(tmp_path))
        for written in tmp_path.glob("*processor_config.json"):
            written.unlink()
        return config

    for model_type, theirs in [
        ("siglip", transformers.SiglipVisionConfig()),
        ("siglip2", transformers.Siglip2VisionConfig()),
        ("clip", transformers.CLIPVisionConfig()),
    ]:
        config = read({"model_type": model_type, "vision_config": {"model_type": "any"}})
        written = VISION_FAMILIES[config.family].write_config(config)
        assert len(written) >= 9
        for key, value in written.items():
            assert key == "architectures" or value == getattr(theirs, key), key
    clip = read({"model_type": "clip", "vision_config": {"image_size": [336, 336], "patch_size": 14}})
    assert (clip.image_size, clip.num_patches) == (336, 576)
    assert clip.mean == (0.48145466, 0.4578275, 0.40821073)
    mine = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 1}
    for file, processor in (
        ("preprocessor_config.json", mine),
        ("processor_config.json", {"image_processor": mine, "processor_class": "SiglipProcessor"}),
    ):
        config = read(_SIGLIP, processor, file)
        assert config.preprocessing == {
            "size": 16, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "resampling": "lanczos",
        }  # fmt: skip
    assert read(_SIGLIP, {"do_normalize": False}).std == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "processor", "message"),
    [
        ({"model_type": "swin"}, {}, "'swin'.*vit, siglip, siglip_vision_model, siglip2,.*clip"),
        ({"vision_use_head": False}, {}, "pooling head"),
        ({"num_channels": 1}, {}, "num_channels 1"),
        ({"image_size": [16, 24]}, {}, "not square"),
        ({"patch_size": 32}, {}, "patch_size 32 is larger than the image's 16"),
        ({"num_attention_heads": 3}, {}, "3 attention heads"),
        ({"model_type": "siglip2_vision_model", "num_patches": 10}, {}, "num_patches 10 is no square"),
        ({}, {"image_mean": [0.5]}, "image_mean"),
        ({}, {"rescale_factor": 1.0}, "1/255"),
        ({}, {"resample": 0}, "resample 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_is_not_supported_is_said(changes, processor, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**_SIGLIP, **changes}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(UserError, match=message):
        hub.vision_config(str(tmp_path))


def test_a_head_that_is_missing_is_named_once(torch_model, single_mesh):
    _, directory = torch_model("siglip")
    tensors = load_file(directory / "model.safetensors")
    del tensors["vision_model.head.attention.in_proj_weight"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError) as raised:
        hub.load_vision_tower(str(directory))
    assert str(raised.value).count("head.attention.in_proj_weight") == 1
    assert "unexpected" not in str(raised.value)


# Parameters of the published towers, as PyTorch counts them.
PUBLISHED = {
    "google/siglip2-so400m-patch14-384": (
        lambda raw: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**raw["vision_config"])),
        1152,
    ),
    "google/vit-base-patch16-224-in21k": (
        lambda raw: transformers.ViTModel(transformers.ViTConfig(**raw), add_pooling_layer=False),
        768,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_towers_have_as_many_parameters_as_in_pytorch(name, single_mesh):
    make, dim = PUBLISHED[name]
    raw = json.loads(Path(presets.__file__).with_name("published_vision.json").read_text())[name]
    with torch.device("meta"):
        theirs = sum(parameter.numel() for parameter in make(raw).parameters())
    config = hub.vision_config(f"random:{name}")
    assert config == presets.published_vision()[name]
    tower = nnx.eval_shape(lambda: hub.make_tower(config, rngs=nnx.Rngs(0), param_dtype="bfloat16"))
    ours = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tower))
    print(f"{name}: {ours:,}")
    assert ours == theirs
    pixels = jax.ShapeDtypeStruct((2, config.image_size, config.image_size, 3), jnp.float32)
    assert jax.eval_shape(lambda tower, x: tower.embed(x), tower, pixels).shape == (2, dim)


def test_patches_are_cut_row_by_row():
    pixels = np.arange(2 * 5 * 7 * 3).reshape(2, 5, 7, 3)  # a pixel is left over each way
    got = np.asarray(patches(jnp.asarray(pixels), 2))
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


@pytest.mark.parametrize("pool", ["mean", "cls", "map"])
def test_tokens_are_means_over_cells_of_patches(single_mesh, seed, pool):
    """Held against a loop over cells; 8 x 8 patches do not divide by 3, so that cells overlap by a row."""
    config = dataclasses.replace(
        presets.vision_preset("vit-tiny"), dim=16, num_heads=2, mlp_dim=16, num_layers=1, pool=pool,
        class_token=pool == "cls",
    )  # fmt: skip
    tower = hub.random_tower(config, seed=seed)
    pixels = np.random.default_rng(seed).normal(size=(2, 64, 64, 3)).astype(np.float32)
    finest = np.asarray(jax.jit(lambda x: tower.embed_tokens(x, 64))(pixels)).reshape(2, 8, 8, 16)
    tokens = np.asarray(jax.jit(lambda x: tower.embed_tokens(x, 9))(pixels))
    for row, (top, bottom) in enumerate([(0, 3), (2, 6), (5, 8)]):
        for column, (left, right) in enumerate([(0, 3), (2, 6), (5, 8)]):
            expected = finest[:, top:bottom, left:right].mean(axis=(1, 2))
            np.testing.assert_allclose(tokens[:, 3 * row + column], expected, atol=1e-5)
    one = np.asarray(jax.jit(lambda x: tower.embed_tokens(x, 1))(pixels))
    np.testing.assert_allclose(one[:, 0], tower(pixels), atol=1e-6)
    if pool == "mean":
        np.testing.assert_allclose(finest.mean(axis=(1, 2)), one[:, 0], atol=1e-5)
