"""Choosing how much a ScaNN search does, by measuring against the exact neighbours of sample queries."""

from __future__ import annotations

import math
import os
import statistics
import time
from typing import Any, NamedTuple

import numpy as np

from vixml_jax.errors import UserError
from vixml_jax.retrieval import exact, index

SAMPLE = 512
# Noise of the default sample, with labels of length 1: at 1 the cosine to the label is about 0.7, about
# that of a query to its positive under a trained model.
NOISE = 1.0
# Candidates scored again, in units of k.
REORDERS = (3.0, 2.0, 1.5, 4.0, 6.0, 8.0, 12.0, 16.0)
# Time of a search in units of scoring one label by codes of 2 dimensions each, from bulk searches of 60,000
# labels x 64 and x 384 on 2 cores: a candidate scored again 15 to 26, a label in ScaNN's brute force 1.3 to
# 1.6. Codes of more dimensions are fewer, and scored in proportion less time. Choosing by this model instead
# of a clock keeps the choice the same in every build.
COST_REORDER, COST_BRUTE_FORCE = 20.0, 1.5
# Labels of equal score are interchangeable: one counts as found from this much below the k-th best, in units
# of the highest score, which also covers that ScaNN sums in another order.
TOLERANCE = 1e-5


class Setting(NamedTuple):
    """What a search does: leaves searched and candidates scored again; both 0 for brute force."""

    leaves_searched: int
    reorder: int


BRUTE_FORCE = Setting(0, 0)


def run(searcher: Any, queries_QD: np.ndarray, k: int, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Searches on all cores: ids, int32 [Q, k], and scores, float32 [Q, k], NaN where no label was found."""
    per_call = max(1, min(256, -(-len(queries_QD) // (2 * (os.cpu_count() or 1)))))
    efforts = {}
    if setting != BRUTE_FORCE:
        efforts["leaves_to_search"] = setting.leaves_searched
        efforts["pre_reorder_num_neighbors"] = max(k, setting.reorder)
    ids_QK, scores_QK = searcher.search_batched_parallel(
        queries_QD, final_num_neighbors=k, batch_size=per_call, **efforts
    )
    return ids_QK.astype(np.int32), scores_QK


class Sample(NamedTuple):
    """Queries whose exact neighbours are known.

    Attributes:
      queries_SD: float32 [S, D].
      floor_S1: float32 [S, 1]; a label that scores at least this is among the k best.
      k: how many count.
    """

    queries_SD: np.ndarray
    floor_S1: np.ndarray
    k: int

    def recalls(self, searcher: Any, setting: Setting) -> np.ndarray:
        """The share of its k best labels that each query finds, float64 [S]."""
        _, scores_SK = run(searcher, self.queries_SD, self.k, setting)
        return (scores_SK >= self.floor_S1).mean(axis=1)  # a NaN is no hit

    def reaches(self, target: float, searcher: Any, setting: Setting) -> bool:
        """Whether the lower 95% bound of the mean recall is at least `target`."""
        recalls_S = self.recalls(searcher, setting)
        error = recalls_S.std(ddof=1) / math.sqrt(len(recalls_S)) if len(recalls_S) > 1 else 0.0
        return bool(recalls_S.mean() - 1.645 * error >= target - 1e-9)

    def milliseconds(self, searcher: Any, setting: Setting) -> float:
        """Median over three searches of the whole sample."""
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            run(searcher, self.queries_SD, self.k, setting)
            seconds.append(time.perf_counter() - start)
        return 1e3 * statistics.median(seconds) / len(self.queries_SD)


def cheapest(
    searcher: Any, sample: Sample, target: float, num_labels: int, leaves: int, block: int = 2
) -> Setting | None:
    """The cheapest setting that reaches the target for less than brute force, or None.

    `block` is the number of dimensions that a code stands for.

    For each number of candidates it raises the leaves first, as recall is lost to partitioning while few are
    searched; it stops where the setting would cost more than the best so far. Recall rises with either.
    """
    best, best_cost = None, COST_BRUTE_FORCE * num_labels
    ladder = sorted({round(step) for step in np.geomspace(1, leaves, 2 + int(4 * math.log2(leaves)))})
    for reorder in dict.fromkeys(min(num_labels, math.ceil(share * sample.k)) for share in REORDERS):

        def cost(rung: int, reorder: int = reorder) -> float:
            return num_labels * ladder[rung] / leaves * 2 / block + COST_REORDER * reorder

        below, rung, step = -1, None, 3
        while below + 1 < len(ladder) and cost(below + 1) < best_cost:
            candidate = min(below + step, len(ladder) - 1)
            while cost(candidate) >= best_cost:
                candidate -= 1
            if sample.reaches(target, searcher, Setting(ladder[candidate], reorder)):
                rung = candidate
                break
            below = candidate
        while rung is not None and rung - below > 1:
            middle = (below + rung) // 2
            if sample.reaches(target, searcher, Setting(ladder[middle], reorder)):
                rung = middle
            else:
                below = middle
        if rung is not None:
            best, best_cost = Setting(ladder[rung], reorder), cost(rung)
    return best


def draw(labels_LD: np.ndarray, k: int, queries: np.typing.ArrayLike | None = None, seed: int = 0) -> Sample:
    """Draws at most SAMPLE of `queries`, or perturbed labels where None, and finds their k best exactly."""
    rng = np.random.default_rng(seed)
    if queries is None:
        queries_SD = _perturbed(labels_LD, rng)
    else:
        queries_SD = index.checked(queries, "sample queries")
        if not len(queries_SD) or queries_SD.shape[1] != labels_LD.shape[1]:
            raise UserError(
                f"sample queries have shape {queries_SD.shape}",
                fix=f"give at least one row of {labels_LD.shape[1]} columns",
            )
        if len(queries_SD) > SAMPLE:
            queries_SD = queries_SD[np.sort(rng.choice(len(queries_SD), SAMPLE, replace=False))]
    _, scores_SK = exact.ExactIndex(labels_LD).search(queries_SD, k)
    slack_S1 = TOLERANCE * np.abs(scores_SK).max(axis=1, keepdims=True)
    return Sample(queries_SD, scores_SK[:, -1:] - slack_S1, k)


def _perturbed(labels_LD: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels, each moved away by the difference of two others; float32 [S, D], of any length.

    A query's length changes nothing in the order of its labels.
    """
    rows_3S = rng.integers(0, len(labels_LD), (3, SAMPLE))
    labels_SD, first_SD, second_SD = (labels_LD[rows] for rows in rows_3S)
    return _unit(labels_SD) + NOISE * _unit(first_SD - second_SD)


def _unit(x_SD: np.ndarray) -> np.ndarray:
    lengths_S1 = np.linalg.norm(x_SD, axis=1, keepdims=True)
    return x_SD / np.where(lengths_S1 > 0, lengths_S1, 1)
