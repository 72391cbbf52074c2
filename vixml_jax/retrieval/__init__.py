"""Maximum inner product search over label embeddings: the k labels that score highest for each query.

index = retrieval.build(labels_LD, kind="scann", target_recall=0.98, k=100)
ids, scores = index.search(queries_QD, k=100)
index.save("runs/demo/text/index")
index = retrieval.load("runs/demo/text/index")
"""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np

from vixml_jax.errors import UserError
from vixml_jax.retrieval import exact, index, scann_index

# Kind -> the options that it takes.
OPTIONS: dict[str, tuple[str, ...]] = {
    "scann": ("sample_queries", "num_leaves", "seed"),
    "exact": ("query_block", "label_block", "dtype"),
    "mesh": ("query_block", "label_block", "dtype", "mesh"),
}

logger = logging.getLogger(__name__)


def build(
    embeddings: np.typing.ArrayLike,
    kind: str = "scann",
    target_recall: float = 0.98,
    k: int = 100,
    **options: Any,
) -> index.Index:
    """Builds an index over label embeddings.

    Args:
      embeddings: [L, D], any float type; row i is the label with number i. Kept as float32.
      kind: "scann" (approximate, fast; see `scann_index.build`), "exact" (on the CPU; see `exact.ExactIndex`)
        or "mesh" (exact, labels split over all devices; see `mesh_index.MeshIndex`). Where ScaNN cannot be
        imported, "scann" gives an exact index, and a warning is logged.
      target_recall: mean share of the true k best labels that a search must find; exact search finds all.
      k: the k at which recall is meant; a search may ask for another.
      **options: of the kind. "scann": `sample_queries`, `num_leaves`, `seed`; "exact": `query_block`,
        `label_block`, `dtype`; "mesh": the same and `mesh`.

    Raises:
      UserError: if the embeddings are not a matrix of finite numbers, or an argument makes no sense.
    """
    if kind not in OPTIONS:
        raise UserError(f"unknown kind of index {kind!r}", fix=f"use {' or '.join(OPTIONS)}")
    if unknown := sorted(set(options) - set(OPTIONS[kind])):
        raise UserError(
            f"unknown option {unknown[0]!r} of {kind} index", fix=f"it takes {', '.join(OPTIONS[kind])}"
        )
    if not 0 < target_recall <= 1:
        raise UserError(f"target_recall is {target_recall}", fix="give a share above 0 and up to 1")
    index.check_k(k)
    if kind == "exact":
        return exact.ExactIndex(embeddings, **options)
    if kind == "mesh":
        from vixml_jax.retrieval import mesh_index  # here, as only it needs JAX

        return mesh_index.MeshIndex(embeddings, **options)
    if scann_index.library() is None:
        logger.warning("ScaNN cannot be imported here: searching exactly, which is slower but finds the same")
        return exact.ExactIndex(embeddings)
    return scann_index.build(embeddings, target_recall, k, **options)


def load(directory: str | os.PathLike[str]) -> index.Index:
    """Opens an index that `Index.save` wrote, wherever its directory lies now.

    No pickle is read. A saved ScaNN index keeps the embeddings too, so that where ScaNN cannot be imported it
    is searched exactly, and a warning is logged.

    Raises:
      UserError: if the directory holds no index, one of another version, or a damaged one.
    """
    directory, header = index.read(directory)
    if header["kind"] == "exact":
        return exact.load(directory, header)
    if header["kind"] == "mesh":
        from vixml_jax.retrieval import mesh_index

        return mesh_index.load(directory, header)
    if header["kind"] != "scann":
        raise UserError(
            f"unknown kind of index {header['kind']!r}", file=directory / index.HEADER, fix=index.REBUILD
        )
    if scann_index.library() is None:
        logger.warning("ScaNN cannot be imported here: searching %s exactly, which is slower", directory)
        return exact.load(directory, header, scann_index.EMBEDDINGS)
    return scann_index.load(directory, header)
