"""Approximate maximum inner product search with ScaNN: a tree, anisotropic hashing, exact reordering.

Labels are partitioned into leaves around centroids; a query scores only the labels of its best leaves, from
4-bit codes whose error parallel to the label, the one that moves inner products, weighs most (Guo et al.,
"Accelerating Large-Scale Inference with Anisotropic Vector Quantization", ICML 2020); the best of these are
scored again in float32, so that the scores returned are exact.

How many leaves and how many candidates a search needs depends on the data, so it is measured, not guessed:
`build` compares with the exact neighbours of sample queries until the recall asked for is reached.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vixml_jax.errors import UserError
from vixml_jax.retrieval import index, scann_tuning
from vixml_jax.retrieval.scann_tuning import BRUTE_FORCE, Setting

logger = logging.getLogger(__name__)

# ScaNN's own file of the float32 embeddings, in the order of the labels.
EMBEDDINGS = "dataset.npy"
# Up to so many labels ScaNN scores all of them in float32: a tree would gain little for the time it takes.
BRUTE_FORCE_LABELS = 10_000
# Dimensions of a block, which is what one code stands for: 2 in the paper's experiments. Long embeddings are
# scored faster by coarser codes, about so many, and lose little: of the 100 best of 300,000 labels x 384 in
# clusters of 115, with 200 candidates and a quarter of the leaves, 0.989 were found by blocks of 2, 0.987 by
# blocks of 4 and 0.986 by blocks of 8, in 2.1, 1.4 and 0.8 ms a query.
FINE_BLOCK, COARSE_BLOCK, CODES = 2, 8, 48


@functools.cache
def library() -> Any:
    """ScaNN's NumPy interface, or None where it cannot be imported (its wheels are for Linux on x86-64)."""
    try:
        return importlib.import_module("scann").scann_ops_pybind
    except (ImportError, OSError) as error:
        logger.info("ScaNN cannot be imported: %s", error)
        return None


class ScannIndex(index.Index):
    """A ScaNN searcher and the setting that reaches its recall; `build` and `load` make one.

    Attributes:
      measured: "recall" on the sample at "k", and its "target_recall"; "scoring", "leaves",
        "leaves_searched", "reorder" (candidates scored again), "block" (dimensions of a code), "sample"
        (number of queries) and "milliseconds_per_query".
    """

    kind: ClassVar[str] = "scann"

    def __init__(self, searcher: Any, num_labels: int, dim: int, measured: dict[str, Any]):
        super().__init__(num_labels, dim, measured)
        self._searcher = searcher

    def _search(self, queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        leaves, setting = self.measured["leaves"], _setting(self.measured)
        if setting != BRUTE_FORCE:
            # Beyond the k that was measured, candidates grow in proportion and leaves with its square: where
            # labels lie in clusters, more than a cluster's are spread over many leaves. On clusters of 100,
            # tuned to 0.98 at 50, searches at 150 found 0.92 to 0.97 in proportion, 0.98 to 0.99 so.
            scale = max(1.0, k / self.measured["k"])
            setting = Setting(
                min(leaves, math.ceil(setting.leaves_searched * scale**2)),
                min(self.num_labels, math.ceil(setting.reorder * scale)),
            )
        ids_QK, scores_QK = scann_tuning.run(self._searcher, queries_QD, k, setting)
        short_Q = np.isnan(scores_QK).any(axis=1)
        if setting != BRUTE_FORCE and short_Q.any():
            # Their leaves hold fewer than k labels.
            everything = Setting(leaves, setting.reorder)
            ids_QK[short_Q], scores_QK[short_Q] = scann_tuning.run(
                self._searcher, queries_QD[short_Q], k, everything
            )
        missing_QK = np.isnan(scores_QK)
        ids_QK[missing_QK], scores_QK[missing_QK] = -1, -np.inf
        return ids_QK, scores_QK

    def _write(self, directory: Path) -> None:
        try:
            self._searcher.serialize(str(directory), relative_path=True)
        except RuntimeError as error:  # it was built: what fails is the writing, and ScaNN does not say why
            raise UserError(
                f"ScaNN could not write the index ({error})",
                file=directory.parent,
                fix="make room, or raise the limit (ulimit -f), and run the same command again",
            ) from error


def build(
    embeddings: np.typing.ArrayLike,
    target_recall: float = 0.98,
    k: int = 100,
    sample_queries: np.typing.ArrayLike | None = None,
    num_leaves: int | None = None,
    seed: int = 0,
) -> ScannIndex:
    """Builds a ScaNN index that reaches `target_recall` at `k` on sample queries, as cheaply as it can.

    The lower 95% confidence bound of the sample's mean recall must reach the target, so that other queries of
    the same kind do as well. Where hashing gets there only at the price of brute force, or not at all, the
    index is brute force. The same input gives the same index.

    Args:
      embeddings: [L, D], any float type.
      target_recall: mean share of the true k best that a search must find, labels of equal score counting
        as the same.
      k: where recall is measured; cut to L.
      sample_queries: [S, D], what will be searched, such as embeddings of training queries; of many, a random
        512 are used. None takes labels, each moved away by the difference of two others. Labels alone would
        flatter the index: each is a point that the partition was fitted to, and the best answer to itself,
        while a query lies beside its labels. The difference of two labels has the directions in which
        embeddings vary; noise in all directions would be mostly orthogonal to them and change little. Such
        queries are harder than most real ones, so the index is slower than with a real sample, not worse.
      num_leaves: of the tree; None takes the square root of L, or brute force up to 10,000 labels.
      seed: of the sample.

    Raises:
      UserError: if embeddings or sample queries are no matrices of finite numbers with equal columns.
    """
    labels_LD = index.checked_labels(embeddings)
    num_labels, dim = labels_LD.shape
    if num_leaves is not None and num_leaves < 1:
        raise UserError(f"num_leaves is {num_leaves}", fix="give at least 1, or none to have it chosen")
    k = min(int(k), num_labels)
    sample = scann_tuning.draw(labels_LD, k, sample_queries, seed)

    searcher, setting, leaves, block = None, None, 0, 0
    # The 16 codes of a block are trained on the labels: ScaNN refuses fewer.
    if num_labels >= 16 and (num_leaves is not None or num_labels > BRUTE_FORCE_LABELS):
        leaves = min(num_labels, num_leaves or round(math.sqrt(num_labels)))
        for block in blocks(dim):
            searcher = None  # one at a time: each has a copy of the labels
            searcher = _hashing(labels_LD, k, leaves, block)
            setting = scann_tuning.cheapest(searcher, sample, target_recall, num_labels, leaves, block)
            if setting is not None:
                break
    if setting is None:
        searcher = library().builder(labels_LD, k, "dot_product").score_brute_force().build()
        setting, leaves, block = BRUTE_FORCE, 0, 0
    measured = {
        "recall": float(sample.recalls(searcher, setting).mean()),
        "target_recall": float(target_recall),
        "k": k,
        "scoring": "brute force" if setting == BRUTE_FORCE else "anisotropic hashing",
        "leaves": leaves,
        **setting._asdict(),
        "block": block,
        "sample": len(sample.queries_SD),
        "milliseconds_per_query": sample.milliseconds(searcher, setting),
    }
    return ScannIndex(searcher, num_labels, dim, measured)


def load(directory: Path, header: dict[str, Any]) -> ScannIndex:
    """Opens a saved index, its files checked already by `index.read`."""
    measured = header["measured"]
    if not all(type(measured.get(name)) is int for name in ("k", "leaves", *Setting._fields)):
        raise UserError("'measured' is damaged", file=directory / index.HEADER, fix=index.REBUILD)
    try:
        searcher = library().load_searcher(str(directory.resolve()), assets_backcompat_shim=False)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"ScaNN cannot load it ({error})", file=directory, fix=index.REBUILD) from None
    if searcher.size() != header["num_labels"]:
        raise UserError(
            f"{searcher.size()} labels, but {index.HEADER} has {header['num_labels']}",
            file=directory,
            fix=index.REBUILD,
        )
    return ScannIndex(searcher, header["num_labels"], header["dim"], measured)


def blocks(dim: int) -> list[int]:
    """The sizes of blocks that `build` tries for embeddings of `dim`, in this order."""
    coarse = min(COARSE_BLOCK, max(FINE_BLOCK, dim // CODES))
    return [min(block, dim) for block in dict.fromkeys((coarse, FINE_BLOCK))]


def _hashing(labels_LD: np.ndarray, k: int, leaves: int, block: int) -> Any:
    """Trains tree and codes; threshold 0.2, as the paper's experiments have it."""
    tree_sample = min(len(labels_LD), max(100_000, 100 * leaves))
    # k-means++: from ScaNN's random start, which may leave leaves empty, builds of the same labels differed.
    return (
        library()
        .builder(labels_LD, k, "dot_product")
        .tree(
            leaves,
            max(1, leaves // 10),
            training_sample_size=tree_sample,
            random_init=False,
            # Centroids of length 1, for inner products: the mean of a leaf with several clusters of labels is
            # short, and others take rows of a cluster that has no centroid of its own. Of 200,000 labels in
            # clusters of 200 and 447 leaves, the best two hold all of the 100 best; they held 0.967 without.
            spherical=True,
        )
        .score_ah(
            block,
            anisotropic_quantization_threshold=0.2,
            # ScaNN's own 100,000 take a third longer to build with, for a recall higher by at most 0.0004.
            training_sample_size=20_000,
        )
        .reorder(2 * k)
        .build()
    )


def _setting(measured: dict[str, Any]) -> Setting:
    return Setting(measured["leaves_searched"], measured["reorder"])
