"""How a run finds labels: an index over them and, where its config says so, one over its training queries."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from ml_collections import ConfigDict

from vixml_jax import files, retrieval
from vixml_jax.embedding import normalized
from vixml_jax.errors import UserError
from vixml_jax.retrieval.augment import augment
from vixml_jax.retrieval.index import Index
from vixml_jax.types import Predictions

# Directories of a workdir, and the file that says of which checkpoint and settings they are.
LABELS, NEIGHBOURS, OF = "index", "index_queries", "index_of.json"


@dataclasses.dataclass(frozen=True)
class Searcher:
    """Finds the labels of queries.

    Attributes:
      labels: index over the label embeddings.
      neighbours: index over the training queries' embeddings, None for label search alone.
      train_targets: csr_matrix [N, L]; the labels that training queries hand on.
      settings: `config.retrieval`.
    """

    labels: Index
    neighbours: Index | None
    train_targets: scipy.sparse.csr_matrix
    settings: ConfigDict

    @classmethod
    def build(
        cls,
        labels_LD: np.ndarray,
        train_queries_ND: np.ndarray,
        train_targets: scipy.sparse.csr_matrix,
        settings: ConfigDict,
    ) -> Searcher:
        """Builds the indexes that `config.retrieval` asks for.

        Args:
          labels_LD: float32 [L, D].
          train_queries_ND: float32 [N, D]. ScaNN is tuned on a sample of them: real queries look like them.
          train_targets: csr_matrix [N, L].
          settings: `config.retrieval`.
        """

        train_queries_ND = prefix(train_queries_ND, settings.dims)

        def index(embeddings: np.ndarray, k: int) -> Index:
            options: dict[str, Any] = {"dtype": settings.dtype}
            if settings.kind == "scann":
                options = {"sample_queries": train_queries_ND}
            return retrieval.build(
                embeddings, kind=settings.kind, target_recall=settings.target_recall, k=k, **options
            )

        neighbours = index(train_queries_ND, settings.neighbours) if settings.query_weight else None
        return cls(index(prefix(labels_LD, settings.dims), settings.k), neighbours, train_targets, settings)

    @classmethod
    def load(
        cls, workdir: Path, train_targets: scipy.sparse.csr_matrix, settings: ConfigDict, step: int
    ) -> Searcher | None:
        """Opens what `save` wrote; None where there is nothing, or it is of another checkpoint or config."""
        of = workdir / OF
        if not of.is_file() or files.read_json(of) != _origin(settings, step):
            return None
        if not (workdir / LABELS).is_dir():
            return None
        neighbours = None
        if settings.query_weight:
            if not (workdir / NEIGHBOURS).is_dir():
                return None
            neighbours = retrieval.load(workdir / NEIGHBOURS)
        return cls(retrieval.load(workdir / LABELS), neighbours, train_targets, settings)

    def save(self, workdir: Path, step: int) -> None:
        """Writes the indexes of the checkpoint of `step` into a run's workdir."""
        (workdir / OF).unlink(missing_ok=True)  # until both are there, neither counts
        self.labels.save(workdir / LABELS)
        if self.neighbours is not None:
            self.neighbours.save(workdir / NEIGHBOURS)
        files.write_json(workdir / OF, _origin(self.settings, step))

    def search(self, queries_QD: np.ndarray, k: int) -> Predictions:
        """Returns the k best labels of each query [Q, D]."""
        queries_QD = prefix(queries_QD, self.settings.dims)
        if self.neighbours is None:
            return Predictions(*self.labels.search(queries_QD, k))
        return Predictions(
            *augment(
                self.labels.search(queries_QD, max(k, self.settings.k)),
                self.neighbours.search(queries_QD, self.settings.neighbours),
                self.train_targets,
                k=k,
                query_weight=self.settings.query_weight,
                temperature=self.settings.temperature,
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


def _origin(settings: ConfigDict, step: int) -> dict[str, Any]:
    """What saved indexes depend on."""
    return {"step": step, "retrieval": json.loads(settings.to_json())}
