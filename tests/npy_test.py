"""Arrays on disk: what cannot be opened is not said to be damaged."""

from __future__ import annotations

import builtins

import pytest

from vixml_jax import npy
from vixml_jax.added_labels import ADDED, AddedLabels
from vixml_jax.data import sparse_text

READERS = {
    "npy": lambda path: npy.load(path, fix="delete it"),
    "sparse": lambda path: sparse_text.load_npz(path, fix="delete it"),
    "added": lambda path: AddedLabels.load(path.parent, 3, 9),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_file_without_permission_is_not_damaged(reader, tmp_path, monkeypatch):
    path = tmp_path / ADDED
    path.write_bytes(b"")

    def refused(file, *_, **__):
        raise PermissionError(13, "Permission denied", file)

    monkeypatch.setattr(builtins, "open", refused)
    with pytest.raises(PermissionError, match="Permission denied"):
        READERS[reader](path)


@pytest.mark.parametrize("reader", ["npy", "sparse"])
def test_a_directory_is_not_damaged(reader, tmp_path):
    with pytest.raises(IsADirectoryError):
        READERS[reader](tmp_path)
