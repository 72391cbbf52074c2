"""Label embeddings as an index holds them: float32, or compressed to bfloat16 or int8, in memory and on disk.

int8 has one scale a label, the largest magnitude of its row divided by 127, so that a row of any length keeps
the same relative precision.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vixml_jax import npy
from vixml_jax.errors import UserError
from vixml_jax.retrieval import index

DTYPES = ("float32", "bfloat16", "int8")
EMBEDDINGS, SCALES = "labels.npy", "scales.npy"
# How each dtype lies in memory: NumPy's files know no bfloat16, so its bits are kept.
STORED = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16), "int8": np.dtype(np.int8)}
# Rows that are compressed together: bounds the memory beside the bank itself.
BLOCK_ROWS = 65536


@dataclasses.dataclass(frozen=True)
class Bank:
    """L label embeddings of D columns.

    Attributes:
      dtype: "float32", "bfloat16" or "int8".
      codes_LD: float32; the bits of bfloat16 as uint16; or int8.
      scales_L: float32, of int8 alone: an embedding is about its scale times its codes.
    """

    dtype: str
    codes_LD: np.ndarray
    scales_L: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(L, D)."""
        return self.codes_LD.shape[0], self.codes_LD.shape[1]

    def rows(self, part: slice) -> np.ndarray:
        """The codes of some labels as float32 [l, D]; products with them are still to be scaled."""
        codes_LD = self.codes_LD[part]
        if self.dtype == "bfloat16":
            return (codes_LD.astype(np.uint32) << 16).view(np.float32)
        return codes_LD.astype(np.float32, copy=False)

    def save(self, directory: Path) -> None:
        """Writes the bank's files into `directory`."""
        np.save(directory / EMBEDDINGS, self.codes_LD, allow_pickle=False)
        if self.scales_L is not None:
            np.save(directory / SCALES, self.scales_L, allow_pickle=False)


def compress(embeddings: np.typing.ArrayLike, dtype: str = "float32") -> Bank:
    """Makes a bank of embeddings [L, D]; for "float32" a float32 array is used as it is, without a copy.

    Raises:
      UserError: if the embeddings are not a matrix of finite numbers, or there is no such dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}", fix=f"give {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    labels_LD = index.checked_labels(embeddings)
    if dtype == "float32":
        return Bank(dtype, labels_LD)
    codes_LD = np.empty(labels_LD.shape, STORED[dtype])
    scales_L = np.empty(len(labels_LD), np.float32) if dtype == "int8" else None
    for start in range(0, len(labels_LD), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        block = labels_LD[part]
        if scales_L is None:
            codes_LD[part] = block.astype(ml_dtypes.bfloat16).view(np.uint16)
        else:
            largest = np.abs(block).max(axis=1)
            scales_L[part] = largest / np.float32(127)
            # Divided by the magnitude first: the scale of a tiny row may not have all its bits.
            codes_LD[part] = np.rint(block / np.where(largest > 0, largest, 1)[:, None] * np.float32(127))
    return Bank(dtype, codes_LD, scales_L)


def of(embeddings: np.typing.ArrayLike | Bank, dtype: str) -> Bank:
    """Returns a bank as it is, and makes one of anything else; see `compress`."""
    return embeddings if isinstance(embeddings, Bank) else compress(embeddings, dtype)


def load(directory: Path, header: dict[str, Any], name: str = EMBEDDINGS) -> Bank:
    """Opens the bank of a saved index, memory-mapped, its files checked already by `index.read`."""
    codes_LD = _mapped(directory / name, (header["num_labels"], header["dim"]))
    kinds = {stored: dtype for dtype, stored in STORED.items()}
    if codes_LD.dtype not in kinds:
        raise UserError(f"embeddings of {codes_LD.dtype}", file=directory / name, fix=index.REBUILD)
    if (dtype := kinds[codes_LD.dtype]) == "float32":
        return Bank(dtype, index.checked_labels(codes_LD))
    if dtype == "bfloat16":
        return Bank(dtype, codes_LD)
    return Bank(dtype, codes_LD, _mapped(directory / SCALES, (header["num_labels"],)))


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    array = npy.load(path, fix=index.REBUILD)
    if array.shape != shape:
        raise UserError(f"shape {array.shape} is not that in {index.HEADER}", file=path, fix=index.REBUILD)
    return array
