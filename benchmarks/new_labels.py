"""Labels that training never saw, added to the index afterwards: how well they are found, beside TF-IDF.

  python benchmarks/new_labels.py --dataset=data/picto_tags --out=runs/new_labels --json=new_labels.json \
      -- --config=configs/picto_tags.py --config.text.checkpoint=MINILM_L6_DIR

Takes --share of the labels out of a prepared dataset, with every mention of them, and training queries that
have no other label; prepares the rest (texts alone); trains on it with the flags after `--`; adds the labels
taken out by `vixml index --add`; and scores the test queries that have some of them. R@10 and R@100 count
those labels alone as right, first among all labels, as a user gets them, then among the new labels alone.
TF-IDF ranks the same labels by the words that they share with the query (its document frequencies are those
of labels and training queries). --out keeps everything: called again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import timing

from vixml_jax import XmcModel, data, metrics, retrieval
from vixml_jax import config as config_lib
from vixml_jax.data.dataset import Split, XmcDataset
from vixml_jax.prepare import prepare

CUTS = (10, 100)
QUERIES_AT_ONCE = 1024


def main() -> None:
    """Runs the whole of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, help="prepared dataset")
    parser.add_argument("--out", type=Path, required=True, help="folder for the smaller dataset and the run")
    parser.add_argument("--share", type=float, default=0.1, help="of the labels to take out")
    parser.add_argument("--seed", type=int, default=0, help="of that choice")
    parser.add_argument("--json", help="JSON file for the figures")
    parser.add_argument("train", nargs="*", help="flags of `vixml train`, after --")
    options = parser.parse_args()
    dataset = data.load(options.dataset)
    new = taken_out(len(dataset.labels), options.share, options.seed)
    smaller, run, added = (options.out / name for name in ("dataset", "run", "new_labels.jsonl"))
    if not smaller.exists():
        write_raw(dataset, new, options.out)
        prepare(options.out / "raw", smaller, "without_new_labels")
    command = [f"--config.dataset.dir={smaller}", "--config.vision.images=0", f"--workdir={run}"]
    _vixml("train", *options.train, *command)
    _vixml("index", f"--workdir={run}", f"--add={added}")
    timing.report(score(dataset, new, run), options.json)


def taken_out(num_labels: int, share: float, seed: int) -> np.ndarray:
    """Draws the labels that are to be new, int64 [n], in order."""
    drawn = np.random.default_rng(seed).choice(num_labels, max(1, round(share * num_labels)), replace=False)
    return np.sort(drawn)


def write_raw(dataset: XmcDataset, new: np.ndarray, out: Path) -> None:
    """Writes `raw/`, the dataset without the new labels, and `new_labels.jsonl`; uids are row numbers."""
    kept = np.setdiff1d(np.arange(len(dataset.labels)), new)
    place = np.full(len(dataset.labels), -1)
    place[kept] = np.arange(len(kept))
    (out / "raw").mkdir(parents=True, exist_ok=True)
    for name, split, targets in (
        ("trn", dataset.train, dataset.train_targets),
        ("tst", dataset.test, dataset.test_targets),
    ):
        rows = []
        for record, row in zip(_records(split), targets, strict=True):
            places = place[row.indices]
            record["target_ind"] = places[places >= 0].tolist()
            if record["target_ind"] or name == "tst":
                rows.append(record)
        _write(out / "raw" / f"{name}.json.gz", rows)
    labels = list(_records(dataset.labels))
    _write(out / "raw" / "lbl.json.gz", [labels[row] for row in kept])
    (out / "new_labels.jsonl").write_text(
        "".join(f"{json.dumps(labels[row])}\n" for row in new), encoding="utf-8"
    )


def score(dataset: XmcDataset, new: np.ndarray, run: Path) -> dict[str, Any]:
    """Returns how well the new labels are found by the run and by TF-IDF."""
    model = XmcModel.load(run)
    num_labels = len(dataset.labels)
    truth = scipy.sparse.csr_matrix(dataset.test_targets[:, new])
    asked = np.flatnonzero(np.diff(truth.indptr))
    truth = truth[asked]
    fields = tuple(config_lib.load(run / "config.json").dataset.fields)
    queries = dataset.test.text_of(fields)[asked]
    labels = list(dataset.labels.text_of(fields))
    new_texts = [labels[row] for row in new]

    # Numbers of the run's labels: those that were kept in their order, then the new ones.
    kept = np.setdiff1d(np.arange(num_labels), new)
    number = np.concatenate([kept, new])
    found, _ = model.predict(queries, k=max(CUTS))
    ours_all = number[found]
    embedded = retrieval.build(model.encode_labels(new_texts), kind="exact")
    ours_new, _ = embedded.search(model.encode_queries(queries), max(CUTS))
    words = TfIdf([*labels, *dataset.train.text_of(fields)])
    tfidf_all = words.best(queries, labels, max(CUTS))
    tfidf_new = words.best(queries, new_texts, max(CUTS))

    figures: dict[str, Any] = {"new_labels": len(new), "queries": len(asked)}
    among_all = scipy.sparse.csr_matrix(dataset.test_targets[asked])
    among_all = among_all.multiply(np.isin(np.arange(num_labels), new)).tocsr()
    for name, ids, relevant in (
        ("all_ours", ours_all, among_all),
        ("all_tfidf", tfidf_all, among_all),
        ("new_ours", ours_new, truth),
        ("new_tfidf", tfidf_new, truth),
    ):
        places = np.broadcast_to(-np.arange(ids.shape[1], dtype=np.float32), ids.shape)
        measured = metrics.evaluate((ids.astype(np.int32), places), relevant)
        figures |= {f"{name}_R@{cut}": measured[f"R@{cut}"] for cut in CUTS}
    return figures


class TfIdf:
    """Texts as word counts, weighted by inverse document frequency, of length 1.

    Args:
      texts: what document frequencies are counted in.
    """

    def __init__(self, texts: Sequence[str]):
        counts = Counter(word for text in texts for word in set(_words(text)))
        self._columns = {word: column for column, word in enumerate(counts)}
        self._idf = np.log((1 + len(texts)) / (1 + np.array(list(counts.values())))) + 1

    def best(self, queries: Sequence[str], labels: Sequence[str], k: int) -> np.ndarray:
        """Returns the k labels with the highest cosine, int64 [Q, k], best first; equal ones by number."""
        labels_LW, best = self._vectors(labels), []
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            part = self._vectors(queries[start : start + QUERIES_AT_ONCE])
            scores_QL = (part @ labels_LW.T).toarray()
            best.append(np.argsort(-scores_QL, axis=1, kind="stable")[:, :k])
        return np.concatenate(best)

    def _vectors(self, texts: Sequence[str]) -> scipy.sparse.csr_matrix:
        entries = [
            (row, self._columns[word], count)
            for row, text in enumerate(texts)
            for word, count in Counter(_words(text)).items()
            if word in self._columns
        ]
        rows, columns, counts = np.array(entries, np.int64).reshape(-1, 3).T
        weights = scipy.sparse.csr_matrix(
            (counts * self._idf[columns], (rows, columns)), shape=(len(texts), len(self._columns))
        )
        lengths = np.sqrt(weights.multiply(weights).sum(axis=1))
        return scipy.sparse.csr_matrix(weights / np.where(lengths > 0, lengths, 1))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _records(split: Split) -> list[dict[str, Any]]:
    columns = zip(split.titles, split.contents, strict=True)
    return [
        {"uid": str(row), "title": title, "content": content} for row, (title, content) in enumerate(columns)
    ]


def _write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(record)}\n" for record in records)


def _vixml(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "vixml_jax", *arguments])
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
