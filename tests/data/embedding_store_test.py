"""A store of embeddings: what is in it stays, what was half-written goes."""

import hashlib

import ml_dtypes
import numpy as np
import pytest

from vixml_jax.data.embedding_store import (
    DIGEST,
    DIGESTS,
    MADE_FROM,
    NOTHING,
    ROWS,
    UNREADABLE,
    EmbeddingStore,
)
from vixml_jax.data.pictures import UnreadablePicture
from vixml_jax.errors import UserError

DIM = 3


def digest(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()[:16]


def digests(*numbers: int) -> np.ndarray:
    return np.array([digest(number) for number in numbers], DIGEST)


def embedding(number: int) -> np.ndarray:
    return np.full(DIM, number, np.float32)


def open_store(directory):
    return EmbeddingStore(directory, DIM, {"tower": "a"})


def add(store, *numbers: int, broken: tuple[int, ...] = ()):
    with store.adding() as adder:
        problems = [UnreadablePicture("broken", f"no {n}") if n in broken else None for n in numbers]
        rows = np.stack([embedding(number) for number in numbers])
        adder.add([digest(number) for number in numbers], rows, problems)


def test_what_was_added_is_found_by_everybody(tmp_path):
    store = open_store(tmp_path / "new" / "store")
    assert store.missing(digests(5, 3, 5, 4)).tolist() == [0, 1, 3]
    add(store, 5, 3)
    add(store, 7, 9, 8, broken=(9,))
    for again in (store, open_store(store.directory)):
        wanted = digests(3, 9, 8, 1, 5, 7, 3)
        rows = again.find(wanted)
        assert rows.tolist() == [1, -1, 3, -1, 0, 2, 1]
        found = again.rows[rows[rows >= 0]]
        assert found.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found[:, 0].astype(np.float32), [3, 8, 5, 7, 3])
        # Neither what is known to be unreadable nor what is not there is asked for again.
        gaps = np.concatenate([np.array([NOTHING], DIGEST), wanted])
        assert again.missing(gaps).tolist() == [4]
        problem = again.problem(digest(9))
        assert (problem.problem, problem.detail) == ("broken", "no 9")
        assert again.problem(digest(3)) is None


@pytest.mark.parametrize("cut", [1, 2 * DIM - 1, 2 * DIM, 2 * DIM + 1])
def test_half_written_rows_do_not_count_and_are_overwritten(tmp_path, cut):
    store = open_store(tmp_path)
    add(store, 1, 2, 3, 4, broken=(4,))
    rows, names = (tmp_path / ROWS).read_bytes(), (tmp_path / DIGESTS).read_bytes()
    notes = (tmp_path / UNREADABLE).read_bytes()
    # Killed between rows and digests, or after a part of them; and within a line about an unreadable one.
    for name, data in ((ROWS, rows[:-cut]), (DIGESTS, names[: -16 + cut]), (UNREADABLE, notes + notes[:7])):
        (tmp_path / name).write_bytes(data)
    again = open_store(tmp_path)
    assert again.num_rows == (1 if cut > 2 * DIM else 2)
    known = (again.find(digests(1, 2, 3)) >= 0).tolist()
    assert known == [number <= again.num_rows for number in (1, 2, 3)]
    add(again, 3, 6, 2, broken=(6,))
    whole = open_store(tmp_path)
    for number in (1, 2, 3):
        (row,) = whole.find(digests(number))
        np.testing.assert_array_equal(whole.rows[row].astype(np.float32), embedding(number))
    assert whole.missing(digests(1, 2, 3, 4, 6)).size == 0


def test_rows_that_are_read_stay_while_others_are_added(tmp_path):
    store = open_store(tmp_path)
    add(store, 1, 2)
    rows = open_store(tmp_path).rows
    before = rows.copy()
    for number in range(3, 90):
        add(store, number)
    np.testing.assert_array_equal(rows, before)


@pytest.mark.parametrize(
    ("file", "data"),
    [(MADE_FROM, b'{"dim": 4}'), *((UNREADABLE, data) for data in (b"{}\n", b"x\n", b"[" * 90_000 + b"\n"))],
)
def test_what_is_no_store_is_refused(tmp_path, file, data):
    add(open_store(tmp_path), 1, 2)
    (tmp_path / file).write_bytes(data)
    with pytest.raises(UserError, match=tmp_path.name):
        open_store(tmp_path)
