"""Pictures stretched and moved, against one pixel after the other."""

from __future__ import annotations

import fresh
import ml_dtypes
import numpy as np
import pytest

from vixml_jax.data.augmentation import AT_ONCE, Augmentation

SIZE = 9
WHITE = (1.0, 2.0, 0.5)


def _augmentation(strength: float = 0.5) -> Augmentation:
    return Augmentation(strength, SIZE, WHITE)


def _pictures(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.normal(size=(count, SIZE * SIZE * 3)).astype(np.float32)


def _line(slope: float, pixels: float) -> list[float]:
    """A line that is steeper than none and `pixels` further."""
    return [slope, 2 * pixels / SIZE]


def _by_hand(picture: np.ndarray, change: np.ndarray) -> np.ndarray:
    """One pixel after the other: four neighbours, weighed by how near they are."""
    given = picture.reshape(SIZE, SIZE, 3)
    result = np.zeros((SIZE, SIZE, 3))
    for row in range(SIZE):
        for column in range(SIZE):
            read = []
            for at, (slope, offset) in zip((row, column), change, strict=True):
                center = (at + 0.5) / SIZE * 2 - 1
                read.append((slope * center + offset + 1) / 2 * SIZE - 0.5)
            below = np.floor(read).astype(int)
            for i in (0, 1):
                for j in (0, 1):
                    y, x = below[0] + i, below[1] + j
                    weight = (1 - abs(read[0] - y)) * (1 - abs(read[1] - x))
                    inside = 0 <= y < SIZE and 0 <= x < SIZE
                    result[row, column] += weight * (given[y, x] if inside else np.array(WHITE))
    return result.ravel()


@pytest.mark.parametrize("seed", fresh.seeds(3))
def test_each_pixel_is_read_where_its_line_says(seed):
    rng = np.random.default_rng(seed)
    augmentation = _augmentation()
    pictures, changes = _pictures(rng, 6), augmentation.draw(rng, (6,))
    expected = np.stack([_by_hand(*pair) for pair in zip(pictures, changes, strict=True)])
    np.testing.assert_allclose(augmentation.apply(pictures, changes), expected, atol=1e-4)


def test_whole_pixels_move_whole():
    pictures = _pictures(np.random.default_rng(0), 2)
    changes = np.array([[_line(1, 0), _line(1, 0)], [_line(1, 2), _line(1, -3)]], np.float32)
    same, moved = _augmentation().apply(pictures, changes).reshape(2, SIZE, SIZE, 3)
    given = pictures.reshape(2, SIZE, SIZE, 3)
    np.testing.assert_allclose(same, given[0], atol=1e-5)
    expected = np.broadcast_to(np.array(WHITE, np.float32), (SIZE, SIZE, 3)).copy()
    expected[:-2, 3:] = given[1, 2:, :-3]
    np.testing.assert_allclose(moved, expected, atol=1e-5)


def test_white_stays_white_in_the_banks_own_dtype():
    augmentation = _augmentation()
    white = np.tile(np.array(WHITE, ml_dtypes.bfloat16), (5, SIZE * SIZE))
    changed = augmentation.apply(white, augmentation.draw(np.random.default_rng(0), (5,)))
    assert changed.dtype == white.dtype
    np.testing.assert_array_equal(changed, white)
    assert augmentation.apply(white[:0], augmentation.draw(np.random.default_rng(0), (0,))).shape == (
        0,
        SIZE * SIZE * 3,
    )


def test_many_pictures_are_changed_as_one_by_one():
    rng, augmentation = np.random.default_rng(0), _augmentation()
    pictures, changes = _pictures(rng, 2 * AT_ONCE + 1), augmentation.draw(rng, (2 * AT_ONCE + 1,))
    alone = [augmentation.apply(pictures[[i]], changes[[i]]) for i in range(len(pictures))]
    np.testing.assert_allclose(augmentation.apply(pictures, changes), np.concatenate(alone), atol=1e-5)


def test_what_is_drawn_lies_within_the_strength_and_fills_it():
    drawn = _augmentation(0.3).draw(np.random.default_rng(0), (400, 3))
    assert drawn.shape == (400, 3, 2, 2)
    slopes, offsets = np.log(drawn[..., 0]), drawn[..., 1]
    for values in (slopes, offsets):
        for axis in (0, 1):
            assert -0.3 <= values[..., axis].min() < -0.28
            assert 0.28 < values[..., axis].max() <= 0.3
