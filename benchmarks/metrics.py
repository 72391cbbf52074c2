"""Times `vixml metrics` at the sizes of the published datasets, and against a plain loop.

Each size is scored by the command line in a process of its own, reading included: seconds from start to exit
and the largest resident memory, medians of --repeats runs. On the first --loop_rows rows a loop over rows and
labels computes the same figures; the ratio is that of the seconds per row within this run, and the figures
must agree.

Example:
  python benchmarks/metrics.py --json=metrics.json
  python benchmarks/metrics.py --sizes=131k --truth=tst_X_Y.txt --filter=filter_labels_test.txt
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse
from absl import app, flags

from vixml_jax import files, metrics
from vixml_jax.data import predictions_file, sparse_text

REPEATS = flags.DEFINE_integer("repeats", 3, "Runs of which the median counts", lower_bound=1)
SIZES = flags.DEFINE_list("sizes", ["131k", "1.3m"], "Sizes to run: 131k, 1.3m")
FORMATS = flags.DEFINE_list("formats", ["npz", "txt", "jsonl"], "Kinds of prediction file: npz, txt, jsonl")
TRUTH = flags.DEFINE_string("truth", None, "Truth to use for the size 131k in place of a drawn one")
FILTER = flags.DEFINE_string("filter", None, "Filter pairs to use for the size 131k in place of drawn ones")
LOOP_ROWS = flags.DEFINE_integer("loop_rows", 2000, "Rows that the plain loop scores", lower_bound=1)
JSON = flags.DEFINE_string("json", None, "File for the figures")

PREDICTIONS_PER_ROW = 100
KS = (1, 3, 5)


class Size(NamedTuple):
    """Rows, labels, mean positives a row and number of filter pairs."""

    rows: int
    labels: int
    positives: float
    pairs: int


# LF-AmazonTitles-131K's test split; 100,000 rows over LF-AmazonTitles-1.3M's labels.
KNOWN_SIZES = {
    "131k": Size(134_835, 131_073, 2.11, 79_663),
    "1.3m": Size(100_000, 1_305_265, 22.2, 100_000),
}


class Cost(NamedTuple):
    """Of one process."""

    seconds: float
    peak_mb: float


def main(argv: list[str]) -> None:
    """Runs the benchmark."""
    del argv
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in SIZES.value:
            figures[name] = measure(name, Path(folder))
    print(f"\n{'size':<6}{'file':<8}{'seconds':>9}{'peak MB':>9}")
    for name, result in figures.items():
        for kind, cost in result["command"].items():
            print(f"{name:<6}{kind:<8}{cost['seconds']:>9.2f}{cost['peak_mb']:>9.0f}")
    for name, result in figures.items():
        print(f"{name}: {result['loop_ratio']:.0f} times faster a row than the plain loop")
    if JSON.value:
        files.write_json(JSON.value, figures)


def measure(name: str, folder: Path) -> dict[str, object]:
    """Figures of one size."""
    print(f"{name}: drawing the data", file=sys.stderr, flush=True)
    rng = np.random.default_rng(0)
    truth, pairs = truth_of(name, rng)
    predictions = draw_predictions(truth, rng)
    truth_path, filter_path = folder / f"{name}.truth.txt", folder / f"{name}.filter.txt"
    sparse_text.write_sparse_text(truth_path, truth)
    np.savetxt(filter_path, pairs, fmt="%d")
    command: dict[str, dict[str, float]] = {}
    for kind in FORMATS.value:
        path = folder / f"{name}.{kind}"
        WRITERS[kind](path, predictions)
        arguments = [f"--predictions={path}", f"--truth={truth_path}", f"--train={truth_path}"]
        runs = []
        for _ in range(REPEATS.value):
            runs.append(run([*arguments, f"--filter={filter_path}", "--json=-"]))
            print(f"{name} {kind}: {runs[-1].seconds:.2f} s, {runs[-1].peak_mb:.0f} MB", file=sys.stderr)
        command[kind] = {
            "seconds": statistics.median(cost.seconds for cost in runs),
            "peak_mb": statistics.median(cost.peak_mb for cost in runs),
        }
        path.unlink()
    return {
        "rows": truth.shape[0],
        "labels": truth.shape[1],
        "predictions": int(predictions.nnz),
        "command": command,
        "loop_ratio": compare_with_loop(predictions, truth, pairs),
    }


def truth_of(name: str, rng: np.random.Generator) -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
    """Truth and filter pairs of a size: the given files', else drawn with popular and rare labels."""
    if name == "131k" and TRUTH.value:
        truth = sparse_text.read_sparse(TRUTH.value)
        pairs = (
            np.zeros((0, 2), np.int64) if not FILTER.value else sparse_text.read_filter_pairs(FILTER.value)
        )
        return truth, pairs
    size = KNOWN_SIZES[name]
    counts = 1 + rng.poisson(size.positives - 1, size.rows)
    rows = np.repeat(np.arange(size.rows), counts)
    labels = draw_labels(rng, len(rows), size.labels)
    truth = scipy.sparse.csr_matrix(
        (np.ones(len(rows), np.float32), (rows, labels)), (size.rows, size.labels)
    )
    truth.data[:] = 1
    pairs = np.stack(
        [rng.integers(0, size.rows, size.pairs), draw_labels(rng, size.pairs, size.labels)], axis=1
    )
    return truth, pairs


def draw_labels(rng: np.random.Generator, count: int, num_labels: int) -> np.ndarray:
    """Labels of which the first are popular, int64 [count]."""
    return (rng.random(count) ** 3 * num_labels).astype(np.int64)


def draw_predictions(truth: scipy.sparse.csr_matrix, rng: np.random.Generator) -> scipy.sparse.csr_matrix:
    """PREDICTIONS_PER_ROW predictions a row, about half the positives among them, scores of 6 digits."""
    num_rows, num_labels = truth.shape
    rows = np.repeat(np.arange(num_rows), PREDICTIONS_PER_ROW * 5 // 4)
    keys = rows * num_labels + draw_labels(rng, len(rows), num_labels)
    true_rows = np.repeat(np.arange(num_rows), np.diff(truth.indptr))
    chosen = rng.random(truth.nnz) < 0.5
    keys = np.unique(np.concatenate([keys, (true_rows * num_labels + truth.indices)[chosen]]))
    # Of what is left a random choice, the same number in each row that has so many.
    rows, scores = keys // num_labels, np.round(rng.random(len(keys)), 6).astype(np.float32)
    order = np.lexsort((-scores, rows))
    counts = np.bincount(rows, minlength=num_rows)
    ranks = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = np.sort(order[ranks < PREDICTIONS_PER_ROW])
    matrix = scipy.sparse.csr_matrix((scores[kept], (rows[kept], keys[kept] % num_labels)), truth.shape)
    matrix.sort_indices()
    return matrix


def write_jsonl(path: Path, predictions: scipy.sparse.csr_matrix) -> None:
    """Writes what `vixml predict` would, titles included."""
    with files.atomic_file(path, "w") as file:
        for row, (start, stop) in enumerate(
            zip(predictions.indptr[:-1], predictions.indptr[1:], strict=True)
        ):
            labels = [
                {
                    "index": label,
                    "uid": f"B{label:09d}",
                    "title": "A title of usual length, 32 px",
                    "score": score,
                }
                for label, score in zip(
                    predictions.indices[start:stop].tolist(),
                    np.round(predictions.data[start:stop].astype(np.float64), 6).tolist(),
                    strict=True,
                )
            ]
            file.write(json.dumps({"uid": str(row), "labels": labels}) + "\n")


WRITERS = {
    "npz": predictions_file.write_npz,
    "txt": sparse_text.write_sparse_text,
    "jsonl": write_jsonl,
}


# Starts a command, waits for it and prints what it took. A process of its own, because a child's peak memory
# begins at that of the process which starts it, and this one has held the data.
WATCHER = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([time.perf_counter() - started, usage.ru_maxrss / 1024]))  # Linux counts KB
sys.exit(os.waitstatus_to_exitcode(status))
"""


def run(arguments: list[str]) -> Cost:
    """Runs `vixml metrics` and returns what it took."""
    command = [sys.executable, "-c", WATCHER, sys.executable, "-m", "vixml_jax", "metrics", *arguments]
    watched = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return Cost(*json.loads(watched.stdout))


def compare_with_loop(
    predictions: scipy.sparse.csr_matrix, truth: scipy.sparse.csr_matrix, pairs: np.ndarray
) -> float:
    """Seconds a row of the plain loop over those of `metrics.evaluate`, on the first LOOP_ROWS rows.

    Raises:
      AssertionError: if the two disagree.
    """
    head, head_truth = predictions[: LOOP_ROWS.value], truth[: LOOP_ROWS.value]
    head_pairs = pairs[pairs[:, 0] < head.shape[0]]
    started = time.perf_counter()
    wanted = plain_loop(head, head_truth, {(int(row), int(label)) for row, label in head_pairs})
    loop_seconds = time.perf_counter() - started
    seconds = []
    for _ in range(REPEATS.value):
        started = time.perf_counter()
        got = metrics.evaluate(head, head_truth, ks=KS, filter_pairs=head_pairs)
        seconds.append(time.perf_counter() - started)
    for name, value in wanted.items():
        assert abs(got[name] - value) < 1e-9, f"{name}: {got[name]} and {value}"
    return loop_seconds / statistics.median(seconds)


def plain_loop(
    predictions: scipy.sparse.csr_matrix, truth: scipy.sparse.csr_matrix, pairs: set[tuple[int, int]]
) -> dict[str, float]:
    """P@k, nDCG@k and R@k by their definitions, in percent."""
    sums = {f"{metric}@{k}": 0.0 for metric in ("P", "nDCG", "R") for k in KS}
    for row in range(truth.shape[0]):
        positives = set(truth.indices[truth.indptr[row] : truth.indptr[row + 1]].tolist())
        entries = slice(predictions.indptr[row], predictions.indptr[row + 1])
        ranked = sorted(
            zip(
                (-predictions.data[entries]).tolist(),
                predictions.indices[entries].tolist(),
                strict=True,
            )
        )
        labels = [label for _, label in ranked if (row, label) not in pairs]
        for k in KS:
            gains = [1 if label in positives else 0 for label in labels[:k]]
            best = sum(1 / math.log2(rank + 2) for rank in range(min(k, len(positives))))
            dcg = sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains))
            sums[f"P@{k}"] += sum(gains) / k
            sums[f"R@{k}"] += sum(gains) / max(len(positives), 1)
            sums[f"nDCG@{k}"] += dcg / best if best else 0
    return {name: 100 * value / truth.shape[0] for name, value in sums.items()}


if __name__ == "__main__":
    app.run(main)
