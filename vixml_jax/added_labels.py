"""What was computed of labels that changed after training, kept in `workdir/index_added.npz`.

So the towers need not run over them whenever a run is opened. It holds embeddings of those that the index has
not taken in, and for each label that training has not seen, those that lend to it. All of it can be computed
again from `labels_changed`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse

from vixml_jax import files
from vixml_jax.errors import UserError
from vixml_jax.label_changes import Change, LabelChanges

ADDED = "index_added.npz"
# Number and fingerprint of a change.
Key = tuple[int, str]


class Lenders(NamedTuple):
    """Known labels that lend a label their centroids, and what training queries hand them.

    Attributes:
      labels_K: int [K]; -1 where there are fewer.
      shares_K: float32 [K], as `centroids.lending_shares` gives them.
    """

    labels_K: np.ndarray
    shares_K: np.ndarray


@dataclasses.dataclass(frozen=True)
class AddedLabels:
    """What was computed of changed labels.

    Attributes:
      embeddings: float32 [D], as they are searched.
      lenders: of labels that training has not seen.
    """

    embeddings: Mapping[Key, np.ndarray] = dataclasses.field(default_factory=dict)
    lenders: Mapping[Key, Lenders] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, workdir: Path, step: int, num_known: int) -> AddedLabels:
        """Opens what `save` wrote; empty where there is nothing, or it is of another checkpoint.

        A file of an earlier version, which has embeddings alone, gives these.

        Args:
          workdir: of the run.
          step: of the checkpoint.
          num_known: labels of the dataset.

        Raises:
          UserError: if the file is damaged.
        """
        path = workdir / ADDED
        if not path.is_file():
            return cls()
        try:
            # Opened here: NumPy leaves a file that is no archive open.
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as saved:
                if int(saved["step"]) != step:
                    return cls()
                lenders = {}
                if "lenders" in saved:
                    lenders = dict(zip(_keys(saved, "borrower_"), _lenders(saved, num_known), strict=True))
                return cls(dict(zip(_keys(saved), saved["embeddings"], strict=True)), lenders)
        except PermissionError:
            raise
        except Exception as error:  # NumPy and zipfile raise whatever they stumble on
            raise UserError(
                f"damaged embeddings of added labels ({type(error).__name__}: {error})",
                file=path,
                fix="delete it: they are computed again",
            ) from None

    def save(self, workdir: Path, step: int, changes: Iterable[Change], pending: Iterable[Change]) -> None:
        """Writes embeddings of the `pending` changes, which must be there, and the lenders of `changes`."""
        embedded = [change.key for change in pending]
        borrowers = [change.key for change in changes if change.key in self.lenders]
        lenders = [self.lenders[key] for key in borrowers]
        with files.atomic_file(workdir / ADDED) as file:
            np.savez(
                file,
                step=np.int64(step),
                numbers=np.array([number for number, _ in embedded], np.int64),
                fingerprints=np.array([print_ for _, print_ in embedded], np.str_),
                embeddings=np.array([self.embeddings[key] for key in embedded], np.float32),
                borrower_numbers=np.array([number for number, _ in borrowers], np.int64),
                borrower_fingerprints=np.array([print_ for _, print_ in borrowers], np.str_),
                lenders=np.array([labels_K for labels_K, _ in lenders], np.int32),
                shares=np.array([shares_K for _, shares_K in lenders], np.float32),
            )

    def __or__(self, other: AddedLabels) -> AddedLabels:
        return AddedLabels({**self.embeddings, **other.embeddings}, {**self.lenders, **other.lenders})

    def missing(self, embedded: Iterable[Change], borrowing: Iterable[Change]) -> list[Change]:
        """The changes of which something is not here: embeddings of the ones, lenders of the others."""
        missing = [change for change in embedded if change.key not in self.embeddings]
        missing += [change for change in borrowing if change.key not in self.lenders]
        return list({change.key: change for change in missing}.values())

    def embeddings_of(self, changes: Iterable[Change], dim: int) -> np.ndarray:
        """The embeddings of changed labels, float32 [A, D], which must be here."""
        rows = [self.embeddings[change.key] for change in changes]
        return np.stack(rows) if rows else np.zeros((0, dim), np.float32)

    def lending(self, changes: LabelChanges) -> scipy.sparse.csr_matrix:
        """How what training queries hand known labels is shared out, for `retrieval.augment`.

        A label of the dataset gets all of its own, unless it is gone; a new one the shares that its lenders
        lend it, also of those that are gone: their training queries are still there, as their centroids are.

        Returns:
          float32 csr_matrix [labels of the dataset, `changes.total`].
        """
        kept = np.setdiff1d(np.arange(changes.num_known), changes.removed)
        givers, takers, shares = [kept], [kept], [np.ones(len(kept), np.float32)]
        for change in changes.new:
            labels_K, shares_K = self.lenders[change.key]
            lends_K = shares_K > 0
            givers.append(labels_K[lends_K])
            takers.append(np.full(int(lends_K.sum()), change.number))
            shares.append(shares_K[lends_K])
        places = (np.concatenate(givers), np.concatenate(takers))
        shape = (changes.num_known, changes.total)
        return scipy.sparse.csr_matrix((np.concatenate(shares), places), shape=shape)


def _keys(saved: Any, prefix: str = "") -> list[Key]:
    pairs = zip(saved[f"{prefix}numbers"].tolist(), saved[f"{prefix}fingerprints"].tolist(), strict=True)
    return list(pairs)


def _lenders(saved: Any, num_known: int) -> list[Lenders]:
    labels_AK, shares_AK = saved["lenders"], saved["shares"]
    if labels_AK.shape != shares_AK.shape or labels_AK.dtype != np.int32 or shares_AK.dtype != np.float32:
        raise ValueError("lenders")
    lends_AK = shares_AK != 0
    if not ((labels_AK >= 0) & (labels_AK < num_known) & (shares_AK > 0) & (shares_AK <= 1))[lends_AK].all():
        raise ValueError("lenders")
    return [Lenders(*pair) for pair in zip(labels_AK, shares_AK, strict=True)]
