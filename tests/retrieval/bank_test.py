from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from vixml_jax.errors import UserError
from vixml_jax.retrieval import bank
from vixml_jax.retrieval.exact import ExactIndex


@pytest.fixture
def labels():
    seed = int(np.random.SeedSequence().entropy) % 2**32
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    return rng.standard_normal((700, 24), np.float32) * np.exp(3 * rng.standard_normal((700, 1), np.float32))


def expanded(packed: bank.Bank) -> np.ndarray:
    values = packed.rows(slice(None))
    return values if packed.scales_L is None else values * packed.scales_L[:, None]


def test_float32_is_not_copied(labels):
    assert bank.compress(labels).codes_LD is labels


def test_bfloat16_is_rounded_to_nearest(labels):
    packed = bank.compress(labels, "bfloat16")
    np.testing.assert_array_equal(expanded(packed), labels.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert packed.codes_LD.nbytes == labels.nbytes // 2


def test_int8_is_within_half_a_step_of_each_row(labels):
    packed = bank.compress(labels, "int8")
    step_L1 = np.abs(labels).max(axis=1, keepdims=True) / 127
    assert (np.abs(expanded(packed) - labels) <= 0.501 * step_L1).all()
    assert packed.codes_LD.nbytes == labels.nbytes // 4
    assert (np.abs(packed.codes_LD).max(axis=1) == 127).all()


def test_extreme_rows_survive():
    rows = np.float32([[0, 0], [1e15, -1e15], [1e-44, -3e-45], [1, 1e-30]])
    for dtype in bank.DTYPES:
        values = expanded(bank.compress(rows, dtype))
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(values[0], 0)
        np.testing.assert_allclose(values[1], rows[1], rtol=0.01)


def test_blocks_change_nothing(labels, monkeypatch):
    whole = [bank.compress(labels, dtype) for dtype in ("bfloat16", "int8")]
    monkeypatch.setattr(bank, "BLOCK_ROWS", 37)
    for packed in whole:
        again = bank.compress(labels, packed.dtype)
        np.testing.assert_array_equal(again.codes_LD, packed.codes_LD)
        np.testing.assert_array_equal(expanded(again), expanded(packed))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_search_is_exact_over_what_is_kept(dtype, labels):
    queries = np.random.default_rng(0).standard_normal((20, 24), np.float32)
    ids, scores = ExactIndex(labels, dtype=dtype).search(queries, 30)
    wanted, wanted_scores = ExactIndex(expanded(bank.compress(labels, dtype))).search(queries, 30)
    np.testing.assert_allclose(scores, wanted_scores, rtol=1e-4)
    assert (ids == wanted).mean() > 0.99


def test_an_unknown_dtype():
    with pytest.raises(UserError, match="float32, bfloat16 or int8"):
        bank.compress(np.eye(3), "float16")
