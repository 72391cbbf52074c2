"""How a run finds labels: an index over them and, where its config says so, one over its training queries.

Labels that came, changed or went since the index was built (label_changes) are searched beside it, exactly
(added_labels); `Searcher.build` takes them in.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from ml_collections import ConfigDict

from vixml_jax import files, retrieval
from vixml_jax.added_labels import AddedLabels
from vixml_jax.embedding import normalized
from vixml_jax.errors import UserError
from vixml_jax.label_changes import Change, LabelChanges, numbers_of
from vixml_jax.progress import Progress, announced
from vixml_jax.retrieval.augment import Found, augment
from vixml_jax.retrieval.index import Index
from vixml_jax.retrieval.patched import PatchedIndex
from vixml_jax.retrieval.priors import add_priors, log_priors
from vixml_jax.types import Predictions

# Directories of a workdir, and the file that says of which checkpoint and settings they are.
LABELS, NEIGHBOURS, OF = "index", "index_queries", "index_of.json"
# Training queries on which an exact index is measured.
MEASURED_QUERIES = 512
# Searched at a time where progress is shown.
QUERIES_PER_PART = 8192


@dataclasses.dataclass(frozen=True)
class Searcher:
    """Finds the labels of queries.

    Attributes:
      labels: index over the label embeddings.
      neighbours: index over the training queries' embeddings, None for label search alone.
      train_targets: csr_matrix [N, L]; the labels that training queries hand on.
      settings: `config.retrieval`.
      changes: those that `labels` has taken in, as `LabelChanges.fingerprints` gives them.
      patched: `labels` with later changes, None without any.
      lending: what labels that came after training get of `train_targets`, as `augment` takes it; None
        without any changes.
    """

    labels: Index
    neighbours: Index | None
    train_targets: scipy.sparse.csr_matrix
    settings: ConfigDict
    changes: dict[str, str] = dataclasses.field(default_factory=dict)
    patched: PatchedIndex | None = None
    lending: scipy.sparse.csr_matrix | None = None

    @functools.cached_property
    def log_priors_L(self) -> np.ndarray:
        """Of the labels of training, float32 [L]: see `retrieval.priors`."""
        return log_priors(self.train_targets)

    @classmethod
    def build(
        cls,
        labels_LD: np.ndarray,
        train_queries_ND: np.ndarray,
        train_targets: scipy.sparse.csr_matrix,
        settings: ConfigDict,
        changes: dict[str, str] | None = None,
    ) -> Searcher:
        """Builds the indexes that `config.retrieval` asks for.

        Args:
          labels_LD: float32 [L, D]; with changes, a row for each label that there is, by number.
          train_queries_ND: float32 [N, D]. ScaNN is tuned on a sample of them: real queries look like them.
          train_targets: csr_matrix [N, L].
          settings: `config.retrieval`.
          changes: those that the labels have gone through, as `LabelChanges.fingerprints` gives them.
        """
        whole_queries_ND, train_queries_ND = train_queries_ND, prefix(train_queries_ND, settings.dims)
        neighbours = None
        if settings.query_weight:
            with announced(f"index {len(train_queries_ND):,} training queries ({settings.kind})"):
                neighbours = make_index(train_queries_ND, settings, settings.neighbours, train_queries_ND)
        with announced(f"index {len(labels_LD):,} labels ({settings.kind})"):
            labels = make_index(prefix(labels_LD, settings.dims), settings, settings.k, train_queries_ND)
        if settings.kind != "scann":  # which has measured itself while it was tuned
            labels.measured.update(_measure(labels, labels_LD, whole_queries_ND, settings))
        return cls(labels, neighbours, train_targets, settings, changes or {})

    @classmethod
    def load(
        cls, workdir: Path, train_targets: scipy.sparse.csr_matrix, settings: ConfigDict, step: int
    ) -> Searcher | None:
        """Opens what `save` wrote; None where there is nothing, or it is of another checkpoint or config."""
        of = workdir / OF
        if not of.is_file():
            return None
        origin = files.read_json(of)
        changes = origin.pop("changes", {}) if isinstance(origin, dict) else {}
        if origin != _origin(settings, step):
            return None
        if not (workdir / LABELS).is_dir():
            return None
        neighbours = None
        if settings.query_weight:
            if not (workdir / NEIGHBOURS).is_dir():
                return None
            neighbours = retrieval.load(workdir / NEIGHBOURS)
        return cls(retrieval.load(workdir / LABELS), neighbours, train_targets, settings, changes)

    def save(self, workdir: Path, step: int) -> None:
        """Writes the indexes of the checkpoint of `step` into a run's workdir."""
        (workdir / OF).unlink(missing_ok=True)  # until both are there, neither counts
        self.labels.save(workdir / LABELS)
        if self.neighbours is not None:
            self.neighbours.save(workdir / NEIGHBOURS)
        files.write_json(workdir / OF, {**_origin(self.settings, step), "changes": self.changes})

    def pending(self, changes: LabelChanges) -> list[Change]:
        """The changes that the index has not taken in, by label number."""
        return [
            change
            for number, change in sorted(changes.by_number.items())
            if self.changes.get(str(number)) != change.fingerprint
        ]

    def with_changes(self, changes: LabelChanges, added: AddedLabels) -> Searcher:
        """Adds changed labels to what is searched, and hides those that are gone.

        Args:
          changes: all changes of the run.
          added: embeddings of the pending labels that are not gone and, where training queries are searched,
            lenders of all that are new.
        """
        pending = self.pending(changes)
        there = [change for change in pending if not change.removed]
        index = None
        if there:
            rows_AD = added.embeddings_of(there, self.labels.dim)
            index = retrieval.build(prefix(rows_AD, self.settings.dims), kind="exact")
        numbers_M = numbers_of(self.train_targets.get_shape()[1], self.changes)
        hidden = np.array([change.number for change in pending], np.int64)
        numbers_A = np.array([change.number for change in there], np.int32)
        return dataclasses.replace(
            self,
            patched=PatchedIndex(self.labels, numbers_M, hidden, index, numbers_A),
            lending=None if self.neighbours is None else added.lending(changes),
        )

    def search(self, queries_QD: np.ndarray, k: int, title: str | None = None) -> Predictions:
        """Returns the k best labels of each query [Q, D]; with a title it shows progress."""
        if title is None:
            return self._search(queries_QD, k)
        found = []
        with Progress(len(queries_QD), title, "queries") as progress:
            for start in range(0, max(len(queries_QD), 1), QUERIES_PER_PART):
                found.append(self._search(queries_QD[start : start + QUERIES_PER_PART], k))
                progress.update(len(found[-1].ids))
        return Predictions(*map(np.concatenate, zip(*found, strict=True)))

    def candidates(self, queries_QD: np.ndarray, k: int) -> tuple[Found, Found | None]:
        """Searches labels and, where there are `neighbours`, training queries; joins nothing.

        Args:
          queries_QD: float32 [Q, D].
          k: labels wanted in the end; `settings.k` are searched if that is more.

        Returns:
          Ids and scores of labels, [Q, K], without priors, and the same of training queries,
          [Q, `settings.neighbours`], or None.
        """
        queries_QD = prefix(queries_QD, self.settings.dims)
        labels = (self.patched or self.labels).search(queries_QD, max(k, self.settings.k))
        if self.neighbours is None:
            return labels, None
        return labels, self.neighbours.search(queries_QD, self.settings.neighbours)

    def _search(self, queries_QD: np.ndarray, k: int) -> Predictions:
        if self.neighbours is None and not self.settings.prior_weight:
            queries_QD = prefix(queries_QD, self.settings.dims)
            return Predictions(*(self.patched or self.labels).search(queries_QD, k))
        labels, neighbours = self.candidates(queries_QD, k)
        if self.settings.prior_weight:  # else the frequencies of all labels are not counted
            labels = add_priors(labels, self.log_priors_L, self.settings.prior_weight)
        if neighbours is None:
            return Predictions(labels[0][:, :k], labels[1][:, :k])
        return Predictions(
            *augment(
                labels,
                neighbours,
                self.train_targets,
                k=k,
                query_weight=self.settings.query_weight,
                temperature=self.settings.temperature,
                lending=self.lending,
            )
        )


def prefix(embeddings_ND: np.ndarray, dims: int) -> np.ndarray:
    """The first `dims` dimensions of embeddings, normalised again; 0 takes them as they are."""
    if not dims:
        return embeddings_ND
    if dims > embeddings_ND.shape[1]:
        raise UserError(
            f"config.retrieval.dims={dims}", fix=f"embeddings have {embeddings_ND.shape[1]} dimensions"
        )
    return normalized(embeddings_ND[:, :dims])


def make_index(embeddings: np.ndarray, settings: ConfigDict, k: int, sample_queries: np.ndarray) -> Index:
    """Builds the kind of index that `config.retrieval` asks for; ScaNN is tuned on `sample_queries`."""
    options: dict[str, Any] = {"dtype": settings.dtype}
    if settings.kind == "scann":
        options = {"sample_queries": sample_queries}
    return retrieval.build(
        embeddings, kind=settings.kind, target_recall=settings.target_recall, k=k, **options
    )


def _measure(
    built: Index, labels_LD: np.ndarray, queries_ND: np.ndarray, settings: ConfigDict
) -> dict[str, Any]:
    """Time of an exact index on a sample of queries and, where it is compressed, its recall.

    Recall is against exact search in float32 over whole embeddings, so that it tells what compression and
    shorter embeddings cost together.
    """
    rows = np.linspace(0, len(queries_ND) - 1, min(MEASURED_QUERIES, len(queries_ND))).astype(np.int64)
    queries_SD, k = queries_ND[rows], min(settings.k, len(labels_LD))
    figures: dict[str, Any] = {"k": k, "dtype": settings.dtype, "sample": len(queries_SD)}
    found, _ = built.search(prefix(queries_SD, settings.dims), k)
    if settings.dims or settings.dtype != "float32":
        wanted, _ = retrieval.build(labels_LD, kind="exact").search(queries_SD, k)
        hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), wanted.tolist(), strict=True)]
        figures["recall"] = sum(hits) / wanted.size
    started = time.perf_counter()
    built.search(prefix(queries_SD, settings.dims), k)
    return {**figures, "milliseconds_per_query": 1e3 * (time.perf_counter() - started) / len(queries_SD)}


def _origin(settings: ConfigDict, step: int) -> dict[str, Any]:
    """What saved indexes depend on."""
    return {"step": step, "retrieval": json.loads(settings.to_json())}
