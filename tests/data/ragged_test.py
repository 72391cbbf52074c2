from __future__ import annotations

import numpy as np
import pytest

from vixml_jax.data.ragged import Ragged, RaggedWriter
from vixml_jax.errors import UserError

ROWS = [np.arange(3), np.arange(0), np.arange(7, 12), np.arange(1)]


@pytest.fixture
def ragged():
    return Ragged.from_rows(ROWS, np.int32)


def test_reads_every_row(ragged):
    assert len(ragged) == 4
    for i, row in enumerate(ROWS):
        np.testing.assert_array_equal(ragged[i], row)
    np.testing.assert_array_equal(ragged[-1], ROWS[-1])
    np.testing.assert_array_equal(ragged.lengths(), [3, 0, 5, 1])
    with pytest.raises(IndexError):
        ragged[4]


@pytest.mark.parametrize("rows", [[], [1], [2, 0, 2, 1, 3], [3, 3, 3]])
def test_take_equals_slow_loop(ragged, rows):
    values, lengths = ragged.take(np.asarray(rows, np.int64))
    expected = [ROWS[r] for r in rows]
    np.testing.assert_array_equal(values, np.concatenate([np.zeros(0, np.int32), *expected]))
    np.testing.assert_array_equal(lengths, [len(row) for row in expected])
    assert values.dtype == np.int32


@pytest.mark.parametrize("rows", [ROWS, [], [np.arange(0)]], ids=["some", "none", "empty-row"])
def test_both_writers_round_trip(tmp_path, rows):
    Ragged.from_rows(rows, np.int32).save(tmp_path / "whole")
    with RaggedWriter(tmp_path / "streamed", np.int32) as writer:
        for row in rows:
            writer.append(row)
    for name in ("whole", "streamed"):
        loaded = Ragged.load(tmp_path / name)
        assert len(loaded) == len(rows)
        assert loaded.values.dtype == np.int32
        for i, row in enumerate(rows):
            np.testing.assert_array_equal(loaded[i], row)
    if rows is ROWS:
        assert isinstance(Ragged.load(tmp_path / "whole").values, np.memmap)


def test_bytes_are_rows_too(tmp_path):
    with RaggedWriter(tmp_path / "text", np.uint8) as writer:
        for text in ("é", "", "title"):
            writer.append(text.encode())
    loaded = Ragged.load(tmp_path / "text")
    assert [loaded[i].tobytes().decode() for i in range(3)] == ["é", "", "title"]


def test_a_failed_write_leaves_no_offsets(tmp_path):
    def write():
        with RaggedWriter(tmp_path / "half", np.uint8) as writer:
            writer.append(b"abc")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write()
    with pytest.raises(UserError, match="half"):
        Ragged.load(tmp_path / "half")


def test_values_must_fit_offsets():
    with pytest.raises(ValueError, match="do not fit"):
        Ragged(np.zeros(2), np.array([0, 3]))
