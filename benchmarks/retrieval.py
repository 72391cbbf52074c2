"""Label search in one run: exact blocks, plain NumPy, ScaNN, and FAISS (IVF-PQ with refining, HNSW).

  python benchmarks/retrieval.py
  python benchmarks/retrieval.py --labels=1305265 --dim=384 --target_recall=0.95 --json=retrieval.json

Labels and queries are unit vectors in the same lumps, as trained embeddings are. All find the --k best on
all cores. ScaNN is tuned by `vixml_jax.retrieval` on one half of the queries; FAISS's effort (nprobe,
efSearch) is the least of a ladder that reaches the same recall on that half, with its usual settings for
such a table. Recall is then taken on the other half. The searches run in turn, --rounds times; ratios are
medians. A query alone, as a service has it, is timed too (median and 99th percentile), and what each index
took to build: seconds, and growth of the process's peak memory beside the vectors. FAISS is left out where
`faiss` is not installed (`pip install faiss-cpu`).
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import timing
from timing import timed

from vixml_jax import retrieval

PLAIN_QUERIES = 256
EFFORTS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
REFINED = 4  # candidates of IVF-PQ that are scored again, in units of k

Found = tuple[np.ndarray, np.ndarray]
Search = Callable[[np.ndarray], Found]


def plain_search(labels_LD: np.ndarray, k: int, queries_QD: np.ndarray) -> Found:
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


def lumps(num_labels: int, num_queries: int, dim: int, lump: int, seed: int) -> Found:
    """Draws labels [L, D] and queries [Q, D] of length 1 around the same centres, `lump` labels each."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((num_labels // lump + 1, dim), np.float32)
    drawn = []
    for rows in (num_labels, num_queries):
        x = rng.standard_normal((rows, dim), np.float32)
        x *= 0.7
        for start in range(0, rows, 100_000):  # in place: a table of a million is 2 GB
            part = x[start : start + 100_000]
            part += centres[rng.integers(0, len(centres), len(part))]
            part /= np.linalg.norm(part, axis=1, keepdims=True)
        drawn.append(x)
    return drawn[0], drawn[1]


def recall(found: Found, true: Found) -> float:
    """Mean share of the true best that were found."""
    pairs = zip(found[0].tolist(), true[0].tolist(), strict=True)
    return sum(len(set(a) & set(b)) for a, b in pairs) / true[0].size


def faiss_index(name: str, labels_LD: np.ndarray, k: int) -> tuple[Search, Callable[[int], None]]:
    """Builds a FAISS index; returns its search, and how to set its effort."""
    import faiss  # a user of FAISS, not this package, has it

    num_labels, dim = labels_LD.shape
    inner = faiss.METRIC_INNER_PRODUCT
    if name == "hnsw":
        index = faiss.IndexHNSWFlat(dim, 32, inner)
        index.hnsw.efConstruction = 80
        index.add(labels_LD)

        def set_effort(effort: int) -> None:
            index.hnsw.efSearch = max(effort, k)

        return (lambda queries: index.search(queries, k)[::-1]), set_effort
    lists = max(1, int(np.sqrt(num_labels)))
    codes = faiss.index_factory(dim, f"IVF{lists},PQ{max(1, dim // 4)}x4fs", inner)
    codes.cp.max_points_per_centroid, codes.cp.min_points_per_centroid = 64, 1
    index = faiss.IndexRefineFlat(codes)
    index.k_factor = REFINED
    index.train(labels_LD)
    index.add(labels_LD)

    def set_effort(effort: int) -> None:
        codes.nprobe = min(effort, lists)

    return (lambda queries: index.search(queries, k)[::-1]), set_effort


def peak_gb() -> float:
    """Peak memory of this process so far; Linux counts KB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=int, default=131_073)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--lump", type=int, default=50, help="labels around a centre")
    parser.add_argument("--queries", type=int, default=1024, help="searched; as many again to tune on")
    parser.add_argument("--singles", type=int, default=200, help="queries that are timed alone")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--target_recall", type=float, default=0.98)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", default="exact,plain,scann,ivfpq,hnsw", help="what is compared; exact always is"
    )
    parser.add_argument("--json", help="JSON file for the figures")
    parser.add_argument("--quick", action="store_true", help="a size that takes seconds, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.labels, options.dim, options.queries, options.singles = 2000, 32, 64, 10
        options.k, options.rounds = 10, 1
    timing.report(measure(options), options.json)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures."""
    labels, both = lumps(options.labels, 2 * options.queries, options.dim, options.lump, seed=0)
    queries, sample = both[: options.queries], both[options.queries :]
    exact = retrieval.build(labels, kind="exact")
    searches: dict[str, Search] = {"exact": lambda batch: exact.search(batch, options.k)}
    figures: dict[str, Any] = vars(options) | {"vectors_gb": labels.nbytes / 1e9}
    wanted = options.only.split(",")
    if "plain" in wanted:
        searches["plain"] = functools.partial(plain_search, labels, options.k)
    if "scann" in wanted:
        before = peak_gb()
        seconds, scann = timed(
            lambda: retrieval.build(
                labels, kind="scann", target_recall=options.target_recall, k=options.k, sample_queries=sample
            )
        )
        searches["scann"] = lambda batch: scann.search(batch, options.k)
        figures |= {"scann_build_s": seconds, "scann_build_gb": peak_gb() - before}
        figures["scann_setting"] = scann.measured
    true_sample = exact.search(sample, options.k)
    for name in ("ivfpq", "hnsw"):
        if name not in wanted or importlib.util.find_spec("faiss") is None:
            continue
        before = peak_gb()
        seconds, (search, set_effort) = timed(lambda name=name: faiss_index(name, labels, options.k))
        figures |= {f"{name}_build_s": seconds, f"{name}_build_gb": peak_gb() - before}
        for effort in EFFORTS:
            set_effort(effort)
            if recall(search(sample), true_sample) >= options.target_recall:
                break
        searches[name], figures[f"{name}_effort"] = search, effort

    found: dict[str, Found] = {}

    def run(name: str) -> None:
        found[name] = searches[name](queries)

    seconds = timing.in_turn({name: functools.partial(run, name) for name in searches}, options.rounds)
    if "plain" in found:
        np.testing.assert_allclose(found["exact"][1], found["plain"][1], atol=1e-5)
    for name, search in searches.items():
        single = [
            timed(lambda search=search, row=row: search(queries[row : row + 1]))[0]
            for row in range(min(options.singles, len(queries)))
        ]
        figures |= {
            f"{name}_queries_per_s": options.queries / float(np.median(seconds[name])),
            f"{name}_recall": recall(found[name], found["exact"]),
            f"{name}_single_p50_ms": 1e3 * float(np.percentile(single, 50)),
            f"{name}_single_p99_ms": 1e3 * float(np.percentile(single, 99)),
        }
        if name != "exact":
            figures[f"{name}_over_exact"] = timing.ratio(seconds["exact"], seconds[name])
    return figures


if __name__ == "__main__":
    main()
