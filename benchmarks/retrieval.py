"""Label search in one run: exact blocks, plain NumPy, ScaNN, and FAISS (IVF-PQ with refining, HNSW).

  python benchmarks/retrieval.py
  python benchmarks/retrieval.py --labels=1305265 --dim=384 --target_recall=0.95 --json=retrieval.json
  for name in scann ivfpq hnsw; do  # built one by one, so that each has its own peak of memory
    python benchmarks/retrieval.py --labels=1305265 --dim=384 --target_recall=0.95 --keep=kept --only=$name
  done
  python benchmarks/retrieval.py --workdir=runs/picto_text

Labels and queries are unit vectors in the same lumps, as trained embeddings are; or with --workdir the labels
and test queries of a run. All find the --k best on all cores. ScaNN is tuned by `vixml_jax.retrieval` on one
half of the queries; FAISS's effort (nprobe, efSearch) is the least of a ladder that reaches the same recall
on that half, with its usual settings for such a table. Recall is then taken on the other half. The searches
run in turn, --rounds times; ratios are medians. A query alone, as a service has it, is timed too (median and
99th percentile), and what each index took to build: seconds, and growth of the process's peak memory beside
the vectors. With --keep vectors and indexes stay in a folder, so that they can be built apart and searched
together. FAISS is left out where `faiss` is not installed (`pip install faiss-cpu`).
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import timing
from timing import timed

from vixml_jax import files, retrieval
from vixml_jax.retrieval.index import Index

PLAIN_QUERIES = 256
EFFORTS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
REFINED = 4  # candidates of IVF-PQ that are scored again, in units of k

Found = tuple[np.ndarray, np.ndarray]
Search = Callable[[np.ndarray], Found]
Built = TypeVar("Built")


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


class Faiss:
    """A FAISS index, "ivfpq" with refining or "hnsw", that searches by `effort`.

    Args:
      name: which of them.
      labels_LD: what it is built of.
      k: labels a query.
      file: where it is kept, and read from if it is there; None keeps nothing.
    """

    def __init__(self, name: str, labels_LD: np.ndarray, k: int, file: Path | None):
        import faiss  # a user of FAISS, not this package, has it

        self._k = k
        if file is not None and file.is_file():
            self._index = faiss.read_index(str(file))
        else:
            self._index = self._hnsw(labels_LD) if name == "hnsw" else self._ivfpq(labels_LD)
            if file is not None:
                part = file.with_name(file.name + ".part")
                faiss.write_index(self._index, str(part))
                part.replace(file)
        self._is_hnsw = name == "hnsw"
        if not self._is_hnsw:
            self._index.k_factor = REFINED  # no part of the file
            self._codes = faiss.downcast_index(self._index.base_index)

    @staticmethod
    def _hnsw(labels_LD: np.ndarray) -> Any:
        import faiss

        index = faiss.IndexHNSWFlat(labels_LD.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 40
        index.add(labels_LD)
        return index

    @staticmethod
    def _ivfpq(labels_LD: np.ndarray) -> Any:
        import faiss

        num_labels, dim = labels_LD.shape
        lists = max(1, int(np.sqrt(num_labels)))
        codes = faiss.index_factory(dim, f"IVF{lists},PQ{max(1, dim // 4)}x4fs", faiss.METRIC_INNER_PRODUCT)
        codes.cp.max_points_per_centroid, codes.cp.min_points_per_centroid = 64, 1
        index = faiss.IndexRefineFlat(codes)
        index.train(labels_LD)
        index.add(labels_LD)
        return index

    def set_effort(self, effort: int) -> None:
        """Sets what a search does: nodes kept, at least k, or lists looked into."""
        if self._is_hnsw:
            self._index.hnsw.efSearch = max(effort, self._k)
        else:
            self._codes.nprobe = min(effort, self._codes.nlist)

    def search(self, queries_QD: np.ndarray) -> Found:
        """(ids [Q, k], scores [Q, k]), best first."""
        return self._index.search(queries_QD, self._k)[::-1]


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
    parser.add_argument("--workdir", help="a run whose embeddings are searched, instead of drawn ones")
    parser.add_argument("--queries", type=int, default=1024, help="searched; as many again to tune on")
    parser.add_argument("--singles", type=int, default=200, help="queries that are timed alone")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--target_recall", type=float, default=0.98)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", default="exact,plain,scann,ivfpq,hnsw", help="what is compared; exact always is"
    )
    parser.add_argument(
        "--keep", help="folder where vectors and indexes are kept; those that are there are not made again"
    )
    parser.add_argument("--json", help="JSON file for the figures")
    parser.add_argument("--quick", action="store_true", help="a size that takes seconds, to see that it runs")
    options = parser.parse_args()
    if options.workdir and options.keep:  # an index in it would be taken for one of the run's labels
        parser.error("--keep is for drawn vectors: leave it or --workdir out")
    if options.quick:
        options.labels, options.dim, options.queries, options.singles = 2000, 32, 64, 10
        options.k, options.rounds = 10, 1
    timing.report(measure(options), options.json)


def vectors(options: argparse.Namespace, keep: Path | None) -> Found:
    """Labels and queries as the options say; with `keep` they are written, and mapped when they are there."""
    if options.workdir:
        return trained(options)
    drawn = {name: getattr(options, name) for name in ("labels", "dim", "lump", "queries")}
    if keep is not None and (keep / "drawn.json").is_file():
        if files.read_json(keep / "drawn.json") != drawn:
            raise SystemExit(f"{keep} holds vectors of other options: give another --keep")
        return np.load(keep / "labels.npy"), np.load(keep / "queries.npy")
    both = lumps(options.labels, 2 * options.queries, options.dim, options.lump, seed=0)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        for name, array in zip(("labels", "queries"), both, strict=True):
            with files.atomic_file(keep / f"{name}.npy") as file:
                np.save(file, array)
        files.write_json(keep / "drawn.json", drawn)
    return both


def trained(options: argparse.Namespace) -> Found:
    """Label embeddings of a run, and its test queries in random order; the options then say how many."""
    folder = Path(options.workdir) / "embeddings"
    labels_LD, queries_QD = np.load(folder / "labels.npy"), np.load(folder / "test.npy")
    order = np.random.default_rng(0).permutation(len(queries_QD))[: 2 * options.queries]
    options.queries, (options.labels, options.dim) = len(order) // 2, labels_LD.shape
    return labels_LD, queries_QD[order]


def scann_index(
    labels_LD: np.ndarray, sample_SD: np.ndarray, options: argparse.Namespace, directory: Path | None
) -> Index:
    """Builds the index, or opens the one that is in `directory` already."""
    if directory is not None and directory.is_dir():
        return retrieval.load(directory)
    index = retrieval.build(
        labels_LD,
        kind="scann",
        target_recall=options.target_recall,
        k=options.k,
        sample_queries=sample_SD,
    )
    if directory is not None:
        index.save(directory)
    return index


def built(
    name: str, keep: Path | None, figures: dict[str, Any], build: Callable[[Path | None], Built]
) -> Built:
    """Builds an index, or opens it, and adds to `figures` what building took, now or when it was kept."""
    if keep is not None and not (keep / f"{name}.json").is_file():
        # One that a killed run has kept: what building it took is not known.
        shutil.rmtree(keep / name) if (keep / name).is_dir() else (keep / name).unlink(missing_ok=True)
    before = peak_gb()
    seconds, index = timed(lambda: build(keep and keep / name))
    took = {f"{name}_build_s": seconds, f"{name}_build_gb": peak_gb() - before}
    if keep is not None:
        if (keep / f"{name}.json").is_file():
            took = files.read_json(keep / f"{name}.json")
        else:
            files.write_json(keep / f"{name}.json", took)
    figures |= took
    return index


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures."""
    keep = Path(options.keep) if options.keep else None
    labels, both = vectors(options, keep)
    queries, sample = both[: options.queries], both[options.queries :]
    exact = retrieval.build(labels, kind="exact")
    searches: dict[str, Search] = {"exact": lambda batch: exact.search(batch, options.k)}
    figures: dict[str, Any] = vars(options) | {"vectors_gb": labels.nbytes / 1e9}
    wanted = options.only.split(",")
    if "plain" in wanted:
        searches["plain"] = functools.partial(plain_search, labels, options.k)
    if "scann" in wanted:
        scann = built("scann", keep, figures, lambda file: scann_index(labels, sample, options, file))
        searches["scann"] = lambda batch: scann.search(batch, options.k)
        figures["scann_setting"] = scann.measured
    true_sample = exact.search(sample, options.k)
    for name in ("ivfpq", "hnsw"):
        if name not in wanted or importlib.util.find_spec("faiss") is None:
            continue
        index = built(name, keep, figures, lambda file, name=name: Faiss(name, labels, options.k, file))
        for effort in EFFORTS:
            index.set_effort(effort)
            reached = recall(index.search(sample), true_sample)
            if reached >= options.target_recall:
                break
        searches[name], figures[f"{name}_effort"] = index.search, effort

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
