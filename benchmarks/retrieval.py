"""Label search in one run: exact blocks against a plain NumPy search, and ScaNN against exact.

  python benchmarks/retrieval.py
  python benchmarks/retrieval.py --labels=131073 --dim=384 --queries=2048 --json=retrieval.json

Labels and queries lie in the same lumps, as trained embeddings do. The plain search multiplies 256 queries
with all labels and takes the best by `argpartition` and a sort. The three searches run in turn, --repeats
times; medians count. ScaNN is tuned on one half of the queries, its recall taken on the other half. The time
of one query alone, as a service has it, is told apart.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from timing import timed

from vixml_jax import files, retrieval

PLAIN_QUERIES = 256
SINGLE_QUERIES = 50

Found = tuple[np.ndarray, np.ndarray]


def plain_search(queries_QD: np.ndarray, labels_LD: np.ndarray, k: int) -> Found:
    """The baseline: (ids [Q, k], scores [Q, k]), best first."""
    ids, scores = [], []
    for start in range(0, len(queries_QD), PLAIN_QUERIES):
        scores_QL = queries_QD[start : start + PLAIN_QUERIES] @ labels_LD.T
        best = np.argpartition(scores_QL, scores_QL.shape[1] - k, axis=1)[:, -k:]
        best_scores = np.take_along_axis(scores_QL, best, axis=1)
        order = np.argsort(-best_scores, axis=1)
        ids.append(np.take_along_axis(best, order, axis=1))
        scores.append(np.take_along_axis(best_scores, order, axis=1))
    return np.concatenate(ids), np.concatenate(scores)


def lumps(num_labels: int, num_queries: int, dim: int, seed: int) -> Found:
    """Draws labels [L, D] and queries [Q, D] of length 1 around the same centres, 50 labels each."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((num_labels // 50 + 1, dim), np.float32)
    drawn = []
    for rows in (num_labels, num_queries):
        x = centres[rng.integers(0, len(centres), rows)] + 0.7 * rng.standard_normal((rows, dim), np.float32)
        drawn.append(x / np.linalg.norm(x, axis=1, keepdims=True))
    return drawn[0], drawn[1]


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=int, default=131_073)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--queries", type=int, default=1024, help="searched; as many again to tune on")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--target_recall", type=float, default=0.98)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", default="retrieval.json", help="where the figures go")
    options = parser.parse_args()

    labels, both = lumps(options.labels, 2 * options.queries, options.dim, seed=0)
    queries, sample = both[: options.queries], both[options.queries :]
    exact = retrieval.build(labels, kind="exact")
    start = time.perf_counter()
    scann = retrieval.build(
        labels, kind="scann", target_recall=options.target_recall, k=options.k, sample_queries=sample
    )
    building = time.perf_counter() - start

    runs: dict[str, list[float]] = {"plain": [], "exact": [], "scann": []}
    found: dict[str, Found] = {}
    for _ in range(options.repeats):
        for name, function in (
            ("plain", lambda: plain_search(queries, labels, options.k)),
            ("exact", lambda: exact.search(queries, options.k)),
            ("scann", lambda: scann.search(queries, options.k)),
        ):
            seconds, found[name] = timed(function)
            runs[name].append(seconds)
    np.testing.assert_allclose(found["exact"][1], found["plain"][1], atol=1e-5)
    hits = [
        len(set(a) & set(b))
        for a, b in zip(found["scann"][0].tolist(), found["exact"][0].tolist(), strict=True)
    ]
    single = {
        name: statistics.median(
            timed(lambda row=row, index=index: index.search(queries[row : row + 1], options.k))[0]
            for row in range(min(SINGLE_QUERIES, options.queries))
        )
        for name, index in (("exact", exact), ("scann", scann))
    }

    medians = {name: statistics.median(seconds) for name, seconds in runs.items()}
    figures = {
        **vars(options),
        **{f"{name}_ms_per_query": 1e3 * seconds / options.queries for name, seconds in medians.items()},
        "exact_speedup_over_plain": medians["plain"] / medians["exact"],
        "scann_speedup_over_exact": medians["exact"] / medians["scann"],
        "exact_single_query_ms": 1e3 * single["exact"],
        "scann_single_query_ms": 1e3 * single["scann"],
        "scann_recall": sum(hits) / options.k / options.queries,
        "scann_build_s": building,
        "scann_measured": scann.measured,
    }
    for name, value in figures.items():
        print(f"{name:26} {value:.4g}" if isinstance(value, float) else f"{name:26} {value}")
    files.write_json(options.json, figures)


if __name__ == "__main__":
    main()
