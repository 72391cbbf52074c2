"""Balanced clusters on the device against the same algorithm on the host, in one run on the same rows.

  python benchmarks/cluster.py
  python benchmarks/cluster.py --rows=300000 --dim=384 --json=cluster.json

All are hierarchical 2-means into equal halves; ours takes a fixed number of rounds, the others go on until
they gain nothing. NumPy takes one cluster after the other, a BLAS product for the scores and a partial sort
for the assignment. Numba, where it is installed (extra `benchmark`), does the same in compiled loops, the
clusters of a level spread over the cores. They run in turn; first runs, which compile, are told apart. The
rows lie in lumps, as trained embeddings do.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import jax
import numpy as np
import timing
from timing import timed

from vixml_jax import host_memory, mining

# When the baselines stop: the mean cosine of a row and its centre gains less than this, or so many rounds.
TOLERANCE = 1e-4
MAX_ROUNDS = 20

try:
    import numba
except ImportError:
    numba = None


def numpy_clusters(x_ND: np.ndarray, cluster_size: int, seed: int) -> np.ndarray:
    """The baseline: int32 [N], sizes equal within one."""
    rng = np.random.default_rng(seed)
    x_ND = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
    groups = [np.arange(len(x_ND))]
    while max(map(len, groups)) > cluster_size:
        groups = [half for rows in groups for half in _halves(x_ND[rows], rows, rng)]
    ids = np.empty(len(x_ND), np.int32)
    for number, rows in enumerate(groups):
        ids[rows] = number
    return ids


def _halves(x_MD: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    half = -(-len(rows) // 2)
    first, second = rng.choice(len(rows), 2, replace=False)
    direction, total, quality = x_MD[first] - x_MD[second], x_MD.sum(axis=0), -1.0
    for _ in range(MAX_ROUNDS):
        order = np.argpartition(-(x_MD @ direction), half - 1)
        left = x_MD[order[:half]].sum(axis=0)
        right = total - left
        left_norm, right_norm = np.linalg.norm(left), np.linalg.norm(right)
        better = (left_norm + right_norm) / len(rows)
        direction = left / left_norm - right / right_norm
        if better - quality <= TOLERANCE:
            break
        quality = better
    return rows[order[:half]], rows[order[half:]]


def numba_clusters() -> Callable[[np.ndarray, int, int], np.ndarray]:
    """Returns the baseline in compiled loops: as `numpy_clusters`."""
    assert numba is not None

    @numba.njit(fastmath=True)
    def halve(x_ND, rows_M, first, second):  # puts the rows of the left half first
        size, dim = len(rows_M), x_ND.shape[1]
        half = (size + 1) // 2
        scores_M, is_left_M = np.empty(size, np.float32), np.empty(size, np.bool_)
        direction_D, left_D = x_ND[rows_M[first]] - x_ND[rows_M[second]], np.empty(dim, np.float32)
        total_D = np.zeros(dim, np.float32)
        for row in rows_M:
            total_D += x_ND[row]
        quality = np.float32(-1)
        for _ in range(MAX_ROUNDS):
            for i in range(size):
                score = np.float32(0)
                for d in range(dim):
                    score += x_ND[rows_M[i], d] * direction_D[d]
                scores_M[i] = -score
            threshold = np.partition(scores_M, half - 1)[half - 1]
            ties = half - np.sum(scores_M < threshold)
            left_D[:] = 0
            for i in range(size):
                is_left_M[i] = scores_M[i] < threshold
                if scores_M[i] == threshold and ties > 0:
                    is_left_M[i] = True
                    ties -= 1
                if is_left_M[i]:
                    for d in range(dim):
                        left_D[d] += x_ND[rows_M[i], d]
            right_D = total_D - left_D
            left_norm, right_norm = np.sqrt(np.sum(left_D * left_D)), np.sqrt(np.sum(right_D * right_D))
            direction_D = left_D / left_norm - right_D / right_norm
            better = (left_norm + right_norm) / size
            if better - quality <= TOLERANCE:
                break
            quality = better
        left_rows, right_rows = rows_M[is_left_M], rows_M[~is_left_M]
        rows_M[:half], rows_M[half:] = left_rows, right_rows

    @numba.njit(parallel=True, fastmath=True)
    def halve_all(x_ND, rows_N, starts_C, firsts_C, seconds_C):
        for c in numba.prange(len(firsts_C)):
            halve(x_ND, rows_N[starts_C[c] : starts_C[c + 1]], firsts_C[c], seconds_C[c])

    def clusters(x_ND: np.ndarray, cluster_size: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        x_ND = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
        # One cluster would keep one core busy: the first split is NumPy's.
        rows_N = np.concatenate(_halves(x_ND, np.arange(len(x_ND)), rng))
        starts = np.array([0, -(-len(x_ND) // 2), len(x_ND)])
        while (sizes := np.diff(starts)).max() > cluster_size:
            firsts = rng.integers(0, sizes)
            seconds = (firsts + rng.integers(1, sizes)) % sizes
            halve_all(x_ND, rows_N, starts, firsts, seconds)
            starts = np.unique(np.concatenate([starts, starts[:-1] + -(-sizes // 2)]))
        ids = np.empty(len(x_ND), np.int32)
        ids[rows_N] = np.repeat(np.arange(len(starts) - 1), sizes)
        return ids

    return clusters


def lumps(num_rows: int, dim: int, seed: int) -> np.ndarray:
    """Draws rows in lumps of about 20, float32 [N, D]."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num_rows // 20 + 1, dim)).astype(np.float32)
    noise = rng.standard_normal((num_rows, dim), np.float32)
    return centres[rng.integers(0, len(centres), num_rows)] + 0.7 * noise


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--size", type=int, default=16, help="largest cluster")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", default="cluster.json", help="where the figures go")
    options = parser.parse_args()

    host_memory.keep_freed()  # all ways, as `vixml train` does
    x = lumps(options.rows, options.dim, seed=0)
    on_device = jax.device_put(x)
    ways: dict[str, Callable[[int], np.ndarray]] = {
        "device": lambda seed: mining.balanced_clusters(on_device, options.size, jax.random.key(seed)),
        "numpy": lambda seed: numpy_clusters(x, options.size, seed),
    }
    if numba is not None:
        compiled = numba_clusters()
        compiled(x[: 4 * options.size], options.size, 0)
        ways["numba"] = lambda seed: compiled(x, options.size, seed)
    compiling, _ = timed(lambda: ways["device"](0))
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for seed in range(1, options.repeats + 1):
        for name, function in ways.items():
            seconds, ids = timed(lambda function=function, seed=seed: function(seed))
            runs[name].append((seconds, mining.inertia(x, ids)))

    medians = {
        name: [statistics.median(column) for column in zip(*each, strict=True)] for name, each in runs.items()
    }
    figures = {
        "rows": options.rows,
        "dim": options.dim,
        "cluster_size": options.size,
        "device": jax.devices()[0].device_kind,
        "repeats": options.repeats,
        "first_call_s": compiling,
    }
    for name, (seconds, inertia) in medians.items():
        figures |= {f"{name}_s": seconds, f"{name}_inertia": inertia}
        if name != "device":
            figures[f"over_{name}"] = seconds / medians["device"][0]
            figures[f"inertia_over_{name}"] = medians["device"][1] / inertia
    timing.report(figures, options.json)


if __name__ == "__main__":
    main()
