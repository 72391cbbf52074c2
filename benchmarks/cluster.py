"""Balanced clusters on the device against the same algorithm in NumPy, in one run on the same rows.

  python benchmarks/cluster.py
  python benchmarks/cluster.py --rows=294805 --dim=384 --json=cluster.json

Both are hierarchical 2-means into equal halves with the same rule for stopping. NumPy takes one cluster after
the other, a BLAS product for the scores and a partial sort for the assignment. They run in turn; the first
run of the device, which compiles, is told apart. The rows lie in lumps, as trained embeddings do.
"""

from __future__ import annotations

import argparse
import statistics

import jax
import numpy as np
import timing
from timing import timed

from vixml_jax import mining, two_means


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
    for _ in range(two_means.MAX_ROUNDS):
        order = np.argpartition(-(x_MD @ direction), half - 1)
        left = x_MD[order[:half]].sum(axis=0)
        right = total - left
        left_norm, right_norm = np.linalg.norm(left), np.linalg.norm(right)
        better = (left_norm + right_norm) / len(rows)
        direction = left / left_norm - right / right_norm
        if better - quality <= two_means.TOLERANCE:
            break
        quality = better
    return rows[order[:half]], rows[order[half:]]


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

    x = lumps(options.rows, options.dim, seed=0)
    on_device = jax.device_put(x)
    compiling, _ = timed(lambda: mining.balanced_clusters(on_device, options.size, jax.random.key(0)))
    runs: dict[str, list[tuple[float, float]]] = {"device": [], "numpy": []}
    for seed in range(1, options.repeats + 1):
        key = jax.random.key(seed)
        for name, function in (
            ("device", lambda key=key: mining.balanced_clusters(on_device, options.size, key)),
            ("numpy", lambda seed=seed: numpy_clusters(x, options.size, seed)),
        ):
            seconds, ids = timed(function)
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
        "device_s": medians["device"][0],
        "numpy_s": medians["numpy"][0],
        "speedup": medians["numpy"][0] / medians["device"][0],
        "device_inertia": medians["device"][1],
        "numpy_inertia": medians["numpy"][1],
        "inertia_ratio": medians["device"][1] / medians["numpy"][1],
    }
    timing.report(figures, options.json)


if __name__ == "__main__":
    main()
