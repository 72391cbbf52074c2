"""What the report reads of a run, and which runs can be set side by side."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from vixml_jax import config as config_lib
from vixml_jax import files, npy
from vixml_jax import run as run_lib
from vixml_jax.data import predictions_file
from vixml_jax.data.dataset import XmcDataset
from vixml_jax.errors import UserError

# What may lie in a workdir.
RUN_FILES = {
    "config.json": "the config, every field",
    "checkpoints": "Orbax checkpoints",
    "metrics.jsonl": "figures while training, one record a line",
    "events": "the same for TensorBoard",
    "metrics.json": "final figures, in percent",
    "predictions.npz": "scores of the labels retrieved for the test split (CSR)",
    "embeddings": "of test queries and labels (float32 .npy)",
    "index": "the label index",
}


class RunFiles:
    """What a run left in its workdir, each read when it is first asked for.

    Everything raises a UserError for a file that is missing or broken.

    Args:
      workdir: the run's directory.
      name: as the page calls it.
      color: as in `report_charts.legend`; 0 for the run that the page is about.
    """

    def __init__(self, workdir: Path, name: str, color: int):
        self.workdir, self.name, self.color = workdir, name, color

    @functools.cached_property
    def figures(self) -> dict[str, float]:
        """The final figures, in percent."""
        return files.read_figures(self._evaluated("metrics.json"))

    @functools.cached_property
    def records(self) -> list[dict[str, float]]:
        """The records of `metrics.jsonl`, up to one that a kill has cut short."""
        path = self.workdir / "metrics.jsonl"
        if not path.is_file():
            raise UserError("no such file", file=path, fix="training writes it")
        records = []
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(record, dict) or "step" not in record:
                break
            if not all(_is_figure(value) for value in record.values()):
                break
            records.append(record)
        return records

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The config's fields, by dotted name."""
        return _flat(files.read_object(self.workdir / "config.json"))

    @functools.cached_property
    def dataset(self) -> XmcDataset:
        """The prepared dataset, as the run saw it."""
        return run_lib.open_dataset(config_lib.load(self.workdir / "config.json"))

    @functools.cached_property
    def predictions(self) -> scipy.sparse.csr_matrix:
        """Scores [N, L] of the labels retrieved for the test split, filter pairs still in."""
        path = self._evaluated("predictions.npz")
        matrix: Any = predictions_file.read(path)
        wanted: Any = self.dataset.test_targets.shape
        if matrix.shape != wanted:
            raise UserError(
                f"is {matrix.shape[0]} x {matrix.shape[1]}, the test split {wanted[0]} x {wanted[1]}",
                file=path,
                fix=self._evaluate,
            )
        return matrix

    def embeddings(self, of: str) -> np.ndarray:
        """Embeddings of "test" or "labels", float32 [N, D], memory-mapped."""
        path = self._evaluated(f"embeddings/{of}.npy")
        values = npy.load(path, fix=self._evaluate)
        rows = len(self.dataset.test if of == "test" else self.dataset.labels)
        if values.ndim != 2 or len(values) != rows:
            raise UserError(f"has the shape {values.shape}, for {rows} rows", file=path, fix=self._evaluate)
        return values

    def curve(self, name: str) -> np.ndarray:
        """(step, value) [n, 2] of one figure."""
        points = [(record["step"], record[name]) for record in self.records if name in record]
        return np.array(points, np.float64).reshape(-1, 2)

    def best(self, row: int, count: int) -> list[tuple[int, float]]:
        """The best labels of a test query with their scores, filter pairs out, in the metrics' order."""
        matrix: Any = self.predictions
        pairs = self.dataset.filter_pairs_test
        entries = slice(*matrix.indptr[[row, row + 1]])
        labels, scores = matrix.indices[entries], matrix.data[entries]
        kept = ~np.isin(labels, pairs[pairs[:, 0] == row, 1])
        labels, scores = labels[kept], scores[kept]
        order = np.lexsort((labels, -scores))[:count]
        return list(zip(labels[order].tolist(), scores[order].tolist(), strict=True))

    def _evaluated(self, name: str) -> Path:
        """The path of a file that an evaluation writes."""
        path = self.workdir / name
        if not path.is_file():
            raise UserError("no such file", file=path, fix=self._evaluate)
        return path

    @property
    def _evaluate(self) -> str:
        return f"`vixml eval --workdir={self.workdir}` writes it"


def split_off(
    runs: list[RunFiles], needed: Callable[[RunFiles], Any]
) -> tuple[list[RunFiles], list[UserError]]:
    """Returns the runs that have what is `needed`, and what is wrong with the others.

    Raises:
      UserError: if none has.
    """
    known, problems = [], []
    for run in runs:
        try:
            needed(run)
            known.append(run)
        except UserError as error:
            problems.append(error)
    if not known:
        raise problems[-1]
    return known, problems


def alike(runs: list[RunFiles]) -> tuple[list[RunFiles], list[UserError]]:
    """Returns the runs with predictions of the last one's test split, and what is wrong with the others."""
    wanted = runs[-1].dataset
    targets: Any = wanted.test_targets

    def predictions(run: RunFiles) -> scipy.sparse.csr_matrix:
        found = run.dataset
        if (
            found.test_targets.shape != targets.shape
            or (found.test_targets != targets).nnz
            or not np.array_equal(found.filter_pairs_test, wanted.filter_pairs_test)
        ):
            raise UserError(f"{run.name} was evaluated on another test split than {runs[-1].name}")
        return run.predictions

    return split_off(runs, predictions)


def positives(dataset: XmcDataset, row: int) -> np.ndarray:
    """The labels of a test query, rising."""
    targets: Any = dataset.test_targets
    return targets.indices[targets.indptr[row] : targets.indptr[row + 1]]


def _is_figure(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
