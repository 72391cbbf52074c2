"""The image bank against one picture at a time; and how often the tower is asked."""

import hashlib
import io
import json
import logging

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from vixml_jax.data import image_bank
from vixml_jax.data.image_bank import FrozenTower, ImageBank, dense_slots
from vixml_jax.errors import UserError

PREPROCESSING = {"size": 8, "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)}
DIM = 5


def picture(colour, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def embed(pixels):
    """A stand-in for a tower: five numbers that tell pictures apart."""
    return np.stack([pixels[..., 0].mean((1, 2)), pixels[..., 1].mean((1, 2)), pixels[..., 2].mean((1, 2)),
                     pixels[:, 0].mean((1, 2)), pixels.std((1, 2, 3))], axis=1)  # fmt: skip


class Watched:
    """Counts the pictures that the tower embeds."""

    def __init__(self, batch_size=4, made_from="a", size=8):
        self.calls = []
        preprocessing = {**PREPROCESSING, "size": size}
        self.tower = FrozenTower(self._embed, preprocessing, DIM, batch_size, {"weights": made_from})

    def _embed(self, pixels):
        self.calls.append(pixels.shape)
        return embed(pixels)


class Stored(list):
    """Items of encoded pictures, as a prepared dataset has them; b"" for one that is not there."""

    def digests(self):
        names = [hashlib.sha256(data).digest()[:16] if data else bytes(16) for item in self for data in item]
        return np.frombuffer(b"".join(names), np.uint8).reshape(-1, 16), np.array(list(map(len, self)))

    def name(self, item, place):
        return {"row": item, "picture": place + 1}


@pytest.fixture
def items():
    """Items with none to four pictures, some of them missing, no pictures, or seen before."""
    rng = np.random.default_rng(0)
    rows = Stored()
    for count in (0, 1, 3, 0, 2, 4, 1, 1, 3):
        rows.append([picture(tuple(map(int, rng.integers(0, 255, 3)))) for _ in range(count)])
    rows[2][1] = b""
    rows[4][0] = b"<html>not found</html>"
    rows[6] = [b""]
    rows[7][0] = rows[5][2]
    rows[8][2] = rows[4][0]
    return rows


READABLE = 10  # distinct ones of `items`


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
    tower = Watched(batch_size).tower
    banks = [image_bank.build(items, tower), image_bank.build_or_load(items, tower, tmp_path, "train")]
    chosen = np.array([5, 0, 2, 2, 8, 4, 6, 7])
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
        used = bank.rows[bank.used_rows()].astype(np.float32)
        np.testing.assert_allclose(
            used, np.concatenate([i for i in expected if i]).astype(np.float32), atol=0.01
        )


def test_a_picture_is_embedded_once_wherever_it_is_shown(items, tmp_path):
    watched = Watched()
    first = image_bank.build_or_load(items, watched.tower, tmp_path, "train")
    assert set(watched.calls) == {(4, 8, 8, 3)}  # always as many, so that it compiles once
    assert len(watched.calls) == -(-(READABLE + 1) // 4)
    assert len(first.rows) == READABLE
    assert isinstance(first.rows, np.memmap)  # mapped, not read
    assert isinstance(first.slots, np.memmap)

    watched.calls.clear()
    second = image_bank.build_or_load(items, watched.tower, tmp_path, "train")
    np.testing.assert_array_equal(first.slots, second.slots)
    view = Stored(items[row] for row in (8, 2, 5))  # held-out rows, another split
    held = image_bank.build_or_load(view, watched.tower, tmp_path, "test")
    np.testing.assert_array_equal(held.slots, first.slots[[8, 2, 5], : held.slots.shape[1]])
    assert not watched.calls

    changed = Stored(map(list, items))
    changed[5][0] = picture((1, 2, 3))
    after = image_bank.build_or_load(changed, watched.tower, tmp_path, "train")
    assert len(watched.calls) == 1
    assert len(after.rows) == READABLE + 1
    assert after.slots[5, 0] == READABLE
    for other in (Watched(made_from="b"), Watched(size=6)):
        image_bank.build_or_load(items, other.tower, tmp_path, "train")
        assert len(other.calls) == -(-(READABLE + 1) // 4)


def test_a_stopped_bank_goes_on_where_it_stopped(items, tmp_path):
    class Killed(BaseException):
        pass

    calls = 0

    def dying(pixels):
        nonlocal calls
        calls += 1
        if calls > 3:  # two calls are fetched by then
            raise Killed
        return embed(pixels)

    watched = Watched(2)
    tower = FrozenTower(dying, PREPROCESSING, DIM, 2, watched.tower.made_from)
    with pytest.raises(Killed):
        image_bank.build_or_load(items, tower, tmp_path, "train")
    bank = image_bank.build_or_load(items, watched.tower, tmp_path, "train")
    assert len(watched.calls) == -(-(READABLE + 1) // 2) - 2
    whole = image_bank.build_or_load(items, watched.tower, tmp_path / "whole", "train")
    assert bank.rows.tobytes() == whole.rows.tobytes()
    assert bank.slots.tobytes() == whole.slots.tobytes()


def test_what_cannot_be_read_is_reported(items, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        bank = image_bank.build_or_load(items, Watched().tower, tmp_path, "train")
        report = json.loads(next(tmp_path.glob("*/report-train.json")).read_text())
    assert report == {
        "pictures": 13, "distinct": READABLE + 1, "not_there": 2,
        "unreadable": [
            {"row": row, "picture": place, "problem": "not a picture of a known format", "detail": ""}
            for row, place in ((4, 1), (8, 3))
        ],
    }  # fmt: skip
    assert "2 of pictures of train" in caplog.text
    assert "row 8, picture 3: not a picture" in caplog.text
    assert bank.slots[8].tolist()[2:] == [-1, -1]
    caplog.clear()
    image_bank.build([["no/such.png", b"", picture("red")]], Watched().tower)
    assert "no/such.png: no such file" in caplog.text


def test_items_without_any_picture(tmp_path):
    for items in ([[], [], []], [[], []], []):
        for bank in (
            image_bank.build(items, Watched().tower),
            image_bank.build_or_load(Stored(items), Watched().tower, tmp_path, "train"),
        ):
            assert isinstance(bank, ImageBank)
            assert bank.rows.shape == (0, DIM)
            assert len(bank) == len(items)
            if items:
                features, present = bank.take(np.array([len(items) - 1, 0]), 3)
                assert len(features) == 2
                assert not present.any()


def test_items_with_missing_pictures_only(tmp_path):
    items = [[], [b"", b""], [b""]]
    for bank in (
        image_bank.build(items, Watched().tower),
        image_bank.build_or_load(Stored(items), Watched().tower, tmp_path, "train"),
    ):
        assert len(bank.used_rows()) == 0
        assert not bank.take(np.array([2, 1]), 3)[1].any()


def test_slots_are_laid_out_item_by_item():
    rows, counts = np.array([4, -1, 2, 9, -1, -1, 0]), np.array([3, 0, 1, 2, 1])
    slots = dense_slots(rows, counts)
    assert slots.dtype == np.int32
    assert slots.tolist() == [[4, 2], [-1, -1], [9, -1], [-1, -1], [0, -1]]


def test_a_tower_that_overflows_is_refused(items, tmp_path):
    tower = FrozenTower(lambda pixels: embed(pixels) * np.float32(np.inf), PREPROCESSING, DIM, 4)
    with np.errstate(invalid="ignore"), pytest.raises(UserError, match="not finite"):
        image_bank.build_or_load(items, tower, tmp_path, "train")


def test_embeddings_that_are_gone_are_missed(items, tmp_path):
    image_bank.build_or_load(items, Watched().tower, tmp_path, "train")
    for file in tmp_path.glob("*/rows.bin"):
        file.unlink()
    with pytest.raises(UserError, match="are gone"):
        image_bank.build_or_load(items, Watched().tower, tmp_path, "train")
