from __future__ import annotations

import gzip
import subprocess
import sys

import fresh
import numpy as np
import pytest
import scipy.sparse

from vixml_jax.data import sparse_text
from vixml_jax.data.sparse_text import SparseReport, read_filter_pairs, read_sparse, write_sparse_text
from vixml_jax.errors import UserError

(ENTROPY,) = fresh.seeds(1)


def slow_read(text):
    """Line by line, as the format is described; the largest value of a repeated label."""
    header, *lines = text.split("\n")
    rows, columns = map(int, header.split())
    dense = np.full((rows, columns), np.nan)
    for i, line in enumerate(lines):
        for entry in line.split():
            label, value = entry.split(":")
            dense[i, int(label)] = np.nanmax([dense[i, int(label)], float(value)])
    return dense


def to_dense(matrix):
    dense = np.full(matrix.shape, np.nan)
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    dense[rows, matrix.indices] = matrix.data
    return dense


FORMATS = ["{:.5f}", "{:g}", "{:.0f}", "{:.3e}", "{!r}", "{:+.2f}", "{:.20f}"]


@pytest.mark.parametrize("piece_bytes", [1 << 22, 64, 7])
@pytest.mark.parametrize("seed", [0, 1, 2, ENTROPY])
def test_equals_a_slow_parser(tmp_path, monkeypatch, seed, piece_bytes):
    monkeypatch.setattr(sparse_text, "PIECE_BYTES", piece_bytes)
    rng = np.random.default_rng(seed)
    rows, columns = int(rng.integers(1, 40)), int(rng.integers(1, 30))
    form = FORMATS[rng.integers(len(FORMATS))]
    lines = []
    for _ in range(rng.integers(0, rows + 1)):
        labels = rng.integers(0, columns, rng.integers(0, 6))
        values = rng.normal(0, 10.0 ** rng.integers(-4, 4), len(labels))
        lines.append("  ".join(f"{a}:{form.format(float(b))}" for a, b in zip(labels, values, strict=True)))
    text = "\n".join([f"{rows} {columns}", *lines]) + rng.choice(["", "\n", "\n\n"])
    (tmp_path / "m.txt").write_bytes(text.replace("\n", str(rng.choice(["\n", "\r\n"]))).encode())
    expected = slow_read("\n".join([f"{rows} {columns}", *lines])).astype(np.float32)
    report = SparseReport()
    matrix = read_sparse(tmp_path / "m.txt", report)
    np.testing.assert_array_equal(to_dense(matrix), expected, err_msg=text)
    matrix.check_format(full_check=True)
    assert matrix.dtype == np.float32
    assert matrix.indices.dtype == np.int32
    labels = [[int(e.split(":")[0]) for e in line.split()] for line in lines]
    assert report.unsorted == [i for i, row in enumerate(labels, 2) if row != sorted(row)]
    assert report.duplicated == [i for i, row in enumerate(labels, 2) if len(row) != len(set(row))]


@pytest.mark.parametrize("text", ["3 4\n", "3 4", "3 4\n\n\n\n", "3 4\n\n"])
def test_missing_and_blank_lines_are_empty_rows(tmp_path, text):
    (tmp_path / "m.txt").write_text(text)
    matrix = read_sparse(tmp_path / "m.txt")
    assert matrix.shape == (3, 4)
    assert matrix.nnz == 0


def test_unsorted_rows_are_sorted_and_counted(tmp_path):
    (tmp_path / "m.txt").write_text("3 5\n0:1 1:1\n4:0.5 1:2 4:0.75\n3:1 2:1\n")
    report = SparseReport()
    matrix = read_sparse(tmp_path / "m.txt", report)
    np.testing.assert_array_equal(matrix.indices, [0, 1, 1, 4, 2, 3])
    np.testing.assert_array_equal(matrix.data, [1, 1, 2, 0.75, 1, 1])
    assert (report.unsorted, report.duplicated, report.repaired) == ([3, 4], [3], 2)


def test_byte_order_mark_gzip_and_stored_zeros(tmp_path):
    (tmp_path / "m.txt").write_bytes(gzip.compress(b"\xef\xbb\xbf1 3\n0:0 2:-1.5\n"))
    matrix = read_sparse(tmp_path / "m.txt")
    np.testing.assert_array_equal(matrix.indices, [0, 2])
    np.testing.assert_array_equal(matrix.data, [0, -1.5])


@pytest.mark.parametrize(
    ("text", "row", "message"),
    [
        ("", 1, "header"),
        ("0:1 1:1\n", 1, "header"),
        ("3 4 5\n", 1, "header"),
        ("-1 4\n", 1, "header"),
        ("99999999999 4\n", 1, "exceed"),
        ("2 3\n0:1\n3:1\n", 3, "label 3 is outside the 3 columns"),
        ("1 3\n0:1\n1:1\n", 3, "more than the 1"),
        ("1 3\n0:1\n\n1:1\n", 4, "more than the 1"),
        ("2 3\n0:1\n0\n", 3, "'0' is not label:value"),
        ("2 3\n0:1\n0:1:2 1\n", 3, "'0:1:2'"),
        ("2 3\n0:1\n0: 1\n", 3, "'0:'"),
        ("2 3\n0:1 :1\n", 2, "':1'"),
        ("2 3\n-1:1\n", 2, "'-1:1'"),
        ("2 3\n1.5:1\n", 2, "'1.5:1'"),
        ("2 3\n0:1\n0:nan\n", 3, "nan"),
        ("2 3\n0:1\n0:1.2.3\n", 3, "'0:1.2.3'"),
        ("2 3\n0:1\n0:--1\n", 3, "'0:--1'"),
        ("2 3\n0:1\n0:x\n", 3, "'0:x'"),
        ("2 3\n0:.\n", 2, "'0:.'"),
        ("2 3\n0:1\n0:1\x00\n", 3, "is not label:value"),
        ("2 0\n0:1\n", 2, "outside the 0 columns"),
        ("2 3\n0:1\n00000000000000000000009:1\n", 3, "label 9 is outside"),
    ],
)
def test_bad_text_names_file_and_row(tmp_path, text, row, message):
    (tmp_path / "bad.txt").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_sparse(tmp_path / "bad.txt")
    assert caught.value.row == row
    assert "bad.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_gzip_is_named(tmp_path):
    whole = gzip.compress(b"2 3\n" + b"0:1 1:1\n" * 2000)
    (tmp_path / "cut.txt.gz").write_bytes(whole[:-12])
    with pytest.raises(UserError, match=r"cut\.txt\.gz: a broken gzip"):
        read_sparse(tmp_path / "cut.txt.gz")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.npz: no such file"):
        read_sparse(tmp_path / "none.npz")


@pytest.mark.parametrize("seed", [0, ENTROPY])
def test_text_round_trip_is_exact(tmp_path, seed):
    rng = np.random.default_rng(seed)
    dense = np.where(rng.random((20, 30)) < 0.1, rng.normal(size=(20, 30)), 0)
    matrix = scipy.sparse.csr_matrix(dense.astype(np.float32))
    write_sparse_text(tmp_path / "m.txt", matrix)
    again = read_sparse(tmp_path / "m.txt")
    np.testing.assert_array_equal(again.toarray(), matrix.toarray())
    assert again.shape == matrix.shape


@pytest.mark.parametrize("form", ["csr", "csc", "coo"])
def test_npz_of_any_form(tmp_path, form):
    matrix = scipy.sparse.random(20, 30, 0.1, format=form, dtype=np.float64)
    scipy.sparse.save_npz(tmp_path / "m.npz", matrix)
    again = read_sparse(tmp_path / "m.npz")
    np.testing.assert_array_equal(again.toarray(), matrix.toarray().astype(np.float32))
    assert (again.dtype, again.indices.dtype) == (np.float32, np.int32)


def test_npz_rows_are_sorted_and_counted(tmp_path):
    matrix = scipy.sparse.csr_matrix(
        (np.array([1, 2, 3, 4, 5.0]), np.array([1, 2, 3, 0, 0]), np.array([0, 2, 2, 5])), shape=(3, 4)
    )
    scipy.sparse.save_npz(tmp_path / "m.npz", matrix)
    report = SparseReport()
    again = read_sparse(tmp_path / "m.npz", report)
    np.testing.assert_array_equal(again.toarray(), [[0, 1, 2, 0], [0, 0, 0, 0], [5, 0, 0, 3]])
    assert (report.unsorted, report.duplicated) == ([3], [3])


def _npz_with_pickle(path):
    np.savez(path, format=b"csr", data=np.array([{}]), indices=[0], indptr=[0, 1], shape=(1, 1))


def _npz_with_index_outside(path):
    np.savez(path, format=b"csr", data=[1.0], indices=np.array([7]), indptr=np.array([0, 1]), shape=(1, 3))


def _npz_with_bad_indptr(path):
    np.savez(path, format=b"csr", data=[1.0], indices=np.array([0]), indptr=np.array([0, 9]), shape=(1, 3))


def _npz_dense(path):
    np.savez(path, array=np.eye(3))


def _npz_complex(path):
    scipy.sparse.save_npz(path, scipy.sparse.csr_matrix(np.eye(2) * 1j))


@pytest.mark.parametrize(
    "write",
    [
        _npz_with_pickle,
        _npz_with_index_outside,
        _npz_with_bad_indptr,
        _npz_dense,
        _npz_complex,
        lambda path: path.write_bytes(b"PK\x03\x04 not a zip"),
        lambda path: path.write_text("1 1\n"),
        lambda path: path.write_bytes(b""),
    ],
)
def test_bad_npz_is_named(tmp_path, write):
    write(tmp_path / "bad.npz")
    with pytest.raises(UserError, match=r"bad\.npz: not a sparse matrix"):
        read_sparse(tmp_path / "bad.npz")


def test_nan_in_npz_names_the_row(tmp_path):
    scipy.sparse.save_npz(tmp_path / "m.npz", scipy.sparse.csr_matrix([[0, 1.0], [0, 0], [np.nan, 1]]))
    with pytest.raises(UserError, match="row 3: a value is not a number"):
        read_sparse(tmp_path / "m.npz")


def test_filter_pairs(tmp_path):
    (tmp_path / "f.txt").write_bytes(b"\xef\xbb\xbf0 5\r\n\n3 1\n")
    pairs = read_filter_pairs(tmp_path / "f.txt")
    np.testing.assert_array_equal(pairs, [[0, 5], [3, 1]])
    assert pairs.dtype == np.int64
    (tmp_path / "empty.txt").write_text("")
    assert read_filter_pairs(tmp_path / "empty.txt").shape == (0, 2)


@pytest.mark.parametrize("line", ["1", "1 2 3", "-1 2", "a b", "1.0 2"])
def test_bad_filter_pairs_name_the_row(tmp_path, line):
    (tmp_path / "f.txt").write_text(f"0 1\n{line}\n")
    with pytest.raises(UserError, match=r"f\.txt: row 2: .* is not a filter pair"):
        read_filter_pairs(tmp_path / "f.txt")


def test_reading_needs_no_jax():
    code = "import sys, vixml_jax.data.sparse_text; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
