import io
import zlib

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from vixml_jax.data import image_bank, pictures
from vixml_jax.data.image_bank import FrozenTower, ImageBank

PREPROCESSING = {"size": 8, "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)}
DIM = 5


def picture(colour, size=(8, 8), form="PNG", mode="RGB", **options):
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, form, **options)
    return buffer.getvalue()


def embed(pixels):
    """A stand-in for a tower: five numbers that tell pictures apart."""
    return np.stack([pixels[..., 0].mean((1, 2)), pixels[..., 1].mean((1, 2)), pixels[..., 2].mean((1, 2)),
                     pixels[:, 0].mean((1, 2)), pixels.std((1, 2, 3))], axis=1)  # fmt: skip


@pytest.fixture
def items():
    """Items with none to four pictures, some of them missing or no pictures."""
    rng = np.random.default_rng(0)
    rows = []
    for count in (0, 1, 3, 0, 2, 4, 1, 1, 3):
        rows.append([picture(tuple(map(int, rng.integers(0, 255, 3)))) for _ in range(count)])
    rows[2][1] = b""
    rows[4][0] = b"<html>not found</html>"
    rows[6] = [b""]
    return rows


def slow_embeddings(items):
    """One picture at a time, in the plainest way."""
    rows = []
    for item in items:
        found = []
        for data in item:
            try:
                image = Image.open(io.BytesIO(data)).convert("RGB")
            except Exception:
                continue
            values = np.asarray(image.resize((8, 8)), np.float64) / 255
            values = (values - PREPROCESSING["mean"]) / PREPROCESSING["std"]
            found.append(embed(values[None].astype(np.float32))[0].astype(ml_dtypes.bfloat16))
        rows.append(found)
    return rows


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
@pytest.mark.parametrize("max_images", [1, 3, 9])
def test_the_bank_holds_every_readable_picture(items, tmp_path, batch_size, max_images):
    tower = FrozenTower(embed, PREPROCESSING, DIM, batch_size)
    banks = [
        image_bank.build(items, tower),
        image_bank.build_or_load(items, tower, cache_dir=tmp_path, key_parts=["a"]),
    ]
    chosen = np.array([5, 0, 2, 2, 8, 4, 6])
    expected = slow_embeddings(items)
    for bank in banks:
        assert len(bank) == len(items)
        features, present = bank.take(chosen, max_images)
        assert features.dtype == ml_dtypes.bfloat16
        for row, item in enumerate(chosen):
            wanted = expected[item][:max_images]
            assert present[row].sum() == len(wanted)
            assert present[row, : len(wanted)].all()
            for place, vector in enumerate(wanted):
                np.testing.assert_allclose(
                    features[row, place].astype(np.float32), vector.astype(np.float32), atol=0.01
                )
            assert not features[row, len(wanted) :].any()


def test_the_tower_always_sees_batches_of_one_size_and_runs_once(items, tmp_path):
    shapes = []

    def watched(pixels):
        shapes.append(pixels.shape)
        return embed(pixels)

    tower = FrozenTower(watched, PREPROCESSING, DIM, 4)
    first = image_bank.build_or_load(items, tower, cache_dir=tmp_path, key_parts=["a"])
    assert set(shapes) == {(4, 8, 8, 3)}
    shapes.clear()
    second = image_bank.build_or_load(items, tower, cache_dir=tmp_path, key_parts=["a"])
    assert not shapes
    np.testing.assert_array_equal(first.rows.view(np.uint16), second.rows.view(np.uint16))
    image_bank.build_or_load(items, tower, cache_dir=tmp_path, key_parts=["b"])
    assert shapes


def test_items_without_any_picture(tmp_path):
    bank = image_bank.build([[], [], [b""]], FrozenTower(embed, PREPROCESSING, DIM, 2))
    assert isinstance(bank, ImageBank)
    features, present = bank.take(np.array([2, 0]), 3)
    assert features.shape[0] == 2
    assert not present.any()
    assert bank.rows.shape == (0, DIM)


@pytest.mark.parametrize("size", [(16, 4), (4, 16), (3, 3), (40, 40)])
def test_a_picture_is_fitted_and_padded_with_white(size):
    pixels = pictures.to_pixels(Image.new("RGB", size, (0, 0, 0)), **PREPROCESSING)
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.float32
    mean, std = np.array(PREPROCESSING["mean"]), np.array(PREPROCESSING["std"])
    white, black = (1 - mean) / std, -mean / std
    is_white = np.isclose(pixels, white, atol=1e-5).all(-1)
    is_black = np.isclose(pixels, black, atol=1e-5).all(-1)
    assert (is_white | is_black).all()
    assert is_black.sum() == {(16, 4): 16, (4, 16): 16}.get(size, 64)
    assert is_black[4, 4]  # in the middle


def test_pictures_of_every_mode():
    red = np.array([255, 0, 0])
    for data in (
        picture((255, 0, 0)),
        picture((255, 0, 0), form="JPEG", quality=95),
        picture((255, 0, 0), form="GIF"),
        picture((255, 0, 0, 255), mode="RGBA"),
        picture((0, 255, 255, 0), mode="CMYK", form="TIFF"),
    ):
        image = pictures.decode(data)
        assert image is not None
        assert np.abs(np.asarray(image) - red).max() < 8
    transparent = pictures.decode(picture((255, 0, 0, 0), mode="RGBA"))
    assert np.asarray(transparent).min() == 255  # on white
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(buffer, "PNG")
    assert abs(int(np.asarray(pictures.decode(buffer.getvalue()))[0, 0, 0]) - 40_000 / 257) < 2
    assert np.asarray(pictures.decode(Image.new("L", (2, 2), 7))).max() == 7


def test_a_turned_photograph_is_set_upright():
    image = Image.new("RGB", (6, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert pictures.decode(buffer.getvalue()).size == (2, 6)


def bomb():
    """A PNG of a few hundred bytes that claims 100,000 x 100,000 pixels."""

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    side = (100_000).to_bytes(4, "big")
    header = chunk(b"IHDR", side + side + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"<html>", picture("red")[:40], bomb(), "no/such/file.png"], ids=repr
)
def test_what_is_no_picture_is_missing(data):
    assert pictures.decode(data) is None
