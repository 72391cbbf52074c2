"""A prepared dataset: texts, pictures and the relevance matrix, read when they are asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import ml_dtypes
import numpy as np
import scipy.sparse

from vixml_jax import files, npy
from vixml_jax.data import raw_embeddings, sparse_text
from vixml_jax.data.embedding_store import DIGEST_BYTES, NOTHING
from vixml_jax.data.image_bank import ImageBank
from vixml_jax.data.label_matrix import spans
from vixml_jax.data.ragged import Ragged
from vixml_jax.errors import UserError

FORMAT = "vixml dataset 1"
ANEW = "prepare it anew"
META, REPORT = "meta.json", "report.json"
# Where ready embeddings of pictures lie, in a folder for each split that has them.
IMAGE_EMBEDDINGS = "image_embeddings"
HOLDOUT_BY = ("row", "title", "first_word")
# Rows decoded at a time when a whole column is gone through.
CHUNK_ROWS = 65_536


class Store:
    """The files of a prepared dataset, each opened once.

    Args:
      directory: the prepared dataset.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._columns: dict[tuple[str, str], Ragged] = {}
        self._records: dict[str, Any] = {}

    def column(self, split: str, field: str) -> Ragged:
        """Returns a memory-mapped column of a whole split.

        UTF-8 bytes of a text field; `image_sizes`, bytes of each picture; `image_digests`, 16 bytes for each.
        """
        if (split, field) not in self._columns:
            directory = self._directory / "columns" / split / field
            if split == "test" and not directory.parent.is_dir():  # a raw folder may come without test rows
                self._columns[split, field] = Ragged(np.zeros(0, np.uint8), np.zeros(1, np.int64))
            else:
                if field == "image_digests" and not directory.is_dir():
                    self._write_digests(split, directory)
                self._columns[split, field] = Ragged.load(directory)
        return self._columns[split, field]

    def _write_digests(self, split: str, directory: Path) -> None:
        """Names the pictures of a dataset that was prepared before pictures had digests."""
        sizes = self.column(split, "image_sizes")
        names = []
        for row in range(len(sizes)):
            images = self.records(split)[row]["images"] if sizes[row].any() else [b""] * len(sizes[row])
            digests = (
                hashlib.sha256(image).digest()[:DIGEST_BYTES] if image else NOTHING for image in images
            )
            names.append(np.frombuffer(b"".join(digests), np.uint8))
        Ragged.from_rows(names, np.uint8).save(directory)

    def image_embeddings(self, split: str) -> ImageBank | None:
        """Returns the ready embeddings of a whole split's pictures, memory-mapped.

        None if the dataset has none; where only other splits have some, a bank without pictures.
        """
        directory = self._directory / IMAGE_EMBEDDINGS
        some = sorted(directory.glob(f"*/{raw_embeddings.ROWS}"))
        if not some:
            return None
        rows, slots = (directory / split / name for name in (raw_embeddings.ROWS, raw_embeddings.SLOTS))
        if rows.is_file():
            return ImageBank(_mapped(rows).view(ml_dtypes.bfloat16), _mapped(slots))
        nothing = np.zeros((0, _mapped(some[0]).shape[1]), ml_dtypes.bfloat16)
        return ImageBank(nothing, np.full((len(self.column(split, "uid")), 1), -1, np.int32))

    def records(self, split: str) -> Any:
        """Returns the TFDS data source of a split."""
        if split not in self._records:
            import tensorflow_datasets as tfds  # only a run with pictures pays for it

            builder: Any = tfds.builder_from_directory(os.fspath(self._directory))
            self._records[split] = builder.as_data_source(split)
        return self._records[split]

    def __getstate__(self) -> dict[str, Any]:
        return {"_directory": self._directory, "_columns": {}, "_records": {}}


class TextColumn(Sequence[str]):
    """Texts of a split, memory-mapped; several fields are joined by a blank, empty ones left out.

    Args:
      fields: UTF-8 bytes of each field, ragged over the rows of the whole split.
      rows: int64 [N]; the rows of the view, None for all.
    """

    def __init__(self, fields: Sequence[Ragged], rows: np.ndarray | None = None):
        self._fields, self._rows = list(fields), rows

    def __len__(self) -> int:
        return len(self._fields[0]) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> list[str]: ...

    def __getitem__(self, index: int | slice | np.ndarray) -> str | list[str]:
        if isinstance(index, int | np.integer):
            if not -len(self) <= index < len(self):
                raise IndexError(f"row {index} of {len(self)}")
            return self._decode(np.array([index % len(self)]))[0]
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        return self._decode(np.asarray(index, np.int64))

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), CHUNK_ROWS):
            yield from self._decode(np.arange(start, min(start + CHUNK_ROWS, len(self))))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(other) == len(self) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def _decode(self, view_rows: np.ndarray) -> list[str]:
        rows = view_rows if self._rows is None else self._rows[view_rows]
        columns = [_texts(field, rows) for field in self._fields]
        if len(columns) == 1:
            return columns[0]
        return [" ".join(filter(None, parts)) for parts in zip(*columns, strict=True)]


def _texts(field: Ragged, rows: np.ndarray) -> list[str]:
    values, lengths = field.take(rows)
    data, ends = values.tobytes(), np.cumsum(lengths).tolist()
    return [data[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]


class ImageColumn(Sequence[list[bytes]]):
    """Pictures of a split: for each row the encoded bytes of its pictures, b"" for one whose file is missing.

    Args:
      store: the files of the prepared dataset.
      split: the split.
      rows: int64 [N]; the rows of the view, None for all.
    """

    def __init__(self, store: Store, split: str, rows: np.ndarray | None = None):
        self._store, self._split, self._rows = store, split, rows
        self._sizes = store.column(split, "image_sizes")

    def __len__(self) -> int:
        return len(self._sizes) if self._rows is None else len(self._rows)

    def counts(self) -> np.ndarray:
        """Returns how many pictures each row has whose file is there, int64 [N]; opens no records."""
        present = np.concatenate(([0], np.cumsum(np.asarray(self._sizes.values) > 0)))
        counts = np.diff(present[np.asarray(self._sizes.offsets)])
        return counts if self._rows is None else counts[self._rows]

    def digests(self) -> tuple[np.ndarray, np.ndarray]:
        """Names the view's pictures by the content of their files; opens no records.

        Returns:
          uint8 [P, 16], an item after the other, zeros for a missing picture; and how many every item has,
          missing ones counted in, int64 [N].
        """
        column = self._store.column(self._split, "image_digests")
        values, lengths = column.take(np.arange(len(column)) if self._rows is None else self._rows)
        return values.reshape(-1, DIGEST_BYTES), lengths // DIGEST_BYTES

    def name(self, item: int, place: int) -> dict[str, Any]:
        """Says which picture it is: split, row of the whole split, uid, and number within the row, from 1."""
        row = item if self._rows is None else int(self._rows[item])
        uid = self._store.column(self._split, "uid")[row].tobytes().decode()
        return {"split": self._split, "row": row, "uid": uid, "picture": place + 1}

    @overload
    def __getitem__(self, index: int) -> list[bytes]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[bytes]]: ...

    def __getitem__(self, index: int | slice) -> list[bytes] | list[list[bytes]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = int(index) % len(self)
        row = row if self._rows is None else int(self._rows[row])
        sizes = self._sizes[row]
        if not sizes.any():
            return [b""] * len(sizes)
        return [bytes(image) for image in self._store.records(self._split)[row]["images"]]


@dataclasses.dataclass(frozen=True)
class Split:
    """One split, or some rows of it.

    Attributes:
      store: the files of the prepared dataset.
      name: "train", "test" or "labels".
      rows: int64 [N]; the rows of the view, None for all.
    """

    store: Store
    name: str
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.uids)

    @property
    def uids(self) -> TextColumn:
        """The rows' uids."""
        return self.text_of(("uid",))

    @property
    def titles(self) -> TextColumn:
        """The rows' titles."""
        return self.text_of(("title",))

    @property
    def contents(self) -> TextColumn:
        """The rows' contents, often empty."""
        return self.text_of(("content",))

    @property
    def texts(self) -> TextColumn:
        """The rows' titles, which is what the model reads by default."""
        return self.titles

    @property
    def images(self) -> ImageColumn:
        """The rows' pictures."""
        return ImageColumn(self.store, self.name, self.rows)

    def image_embeddings(self) -> ImageBank | None:
        """Returns the embeddings of the rows' pictures that came with the raw files; None if none did."""
        bank = self.store.image_embeddings(self.name)
        return bank if bank is None or self.rows is None else bank.view(self.rows)

    def text_of(self, fields: Sequence[str]) -> TextColumn:
        """Returns texts made of `fields` ("uid", "title", "content"), joined by a blank."""
        unknown = set(fields) - {"uid", "title", "content"}
        if unknown or not fields:
            raise UserError(f"unknown text fields {sorted(unknown)}", fix="give some of title, content")
        return TextColumn([self.store.column(self.name, field) for field in fields], self.rows)

    def take(self, rows: np.ndarray) -> Split:
        """Returns a view of some rows, int [n]."""
        rows = np.asarray(rows, np.int64)
        return dataclasses.replace(self, rows=rows if self.rows is None else self.rows[rows])


@dataclasses.dataclass(frozen=True)
class XmcDataset:
    """A prepared dataset of N training queries, M test queries and L labels.

    Attributes:
      name: as given to `vixml prepare`.
      dir: the prepared dataset.
      fingerprint: changes with the content, and with the rows of a view.
      train, test, labels: the splits.
      train_targets, test_targets: csr_matrix float32 [N, L] and [M, L]; 1 where a label is relevant.
      filter_pairs_train, filter_pairs_test: int64 [n, 2]; pairs (row, label) that evaluation leaves out.
    """

    name: str
    dir: Path
    fingerprint: str
    train: Split
    test: Split
    labels: Split
    train_targets: scipy.sparse.csr_matrix
    test_targets: scipy.sparse.csr_matrix
    filter_pairs_train: np.ndarray
    filter_pairs_test: np.ndarray


def is_prepared(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory is a prepared dataset."""
    return (Path(directory) / META).is_file() and (Path(directory) / "dataset_info.json").is_file()


def load(directory: str | os.PathLike[str]) -> XmcDataset:
    """Opens a prepared dataset.

    Raises:
      UserError: if `directory` is not one, or one of a version that this code does not read.
    """
    directory = Path(directory)
    if not is_prepared(directory):
        fix = "make it with `vixml prepare --raw=DIR --out=" + os.fspath(directory) + "`"
        raise UserError("not a prepared dataset", file=directory, fix=fix)
    meta, store = files.read_json(directory / META), Store(directory)
    form = meta.get("format") if isinstance(meta, dict) else None
    if form != FORMAT:
        raise UserError(
            f"a dataset of the form {form!r}, this version reads {FORMAT!r}", file=directory, fix=ANEW
        )
    if not all(isinstance(meta.get(name), str) for name in ("name", "fingerprint")):
        raise UserError("has no name or no fingerprint", file=directory / META, fix=ANEW)
    return XmcDataset(
        name=meta["name"],
        dir=directory,
        fingerprint=meta["fingerprint"],
        train=Split(store, "train"),
        test=Split(store, "test"),
        labels=Split(store, "labels"),
        train_targets=_targets(directory / "targets_train.npz"),
        test_targets=_targets(directory / "targets_test.npz"),
        filter_pairs_train=_pairs(directory / "filter_pairs_train.npy"),
        filter_pairs_test=_pairs(directory / "filter_pairs_test.npy"),
    )


def subset(
    dataset: XmcDataset, train_rows: np.ndarray | None = None, test_rows: np.ndarray | None = None
) -> XmcDataset:
    """Returns a view of some training and test queries; the labels stay as they are.

    Args:
      dataset: the dataset.
      train_rows: int [n]; rows of its training split, None for all.
      test_rows: int [m]; rows of its test split, None for all.
    """
    changes: dict[str, Any] = {}
    for name, rows in (("train", train_rows), ("test", test_rows)):
        if rows is None:
            continue
        rows = np.asarray(rows, np.int64)
        changes[name] = getattr(dataset, name).take(rows)
        changes[f"{name}_targets"] = getattr(dataset, f"{name}_targets")[rows]
        changes[f"filter_pairs_{name}"] = _pairs_of(getattr(dataset, f"filter_pairs_{name}"), rows)
        before = changes.get("fingerprint", dataset.fingerprint)
        changes["fingerprint"] = files.fingerprint(before, name, hashlib.sha256(rows.tobytes()).hexdigest())
    return dataclasses.replace(dataset, **changes)


def holdout(dataset: XmcDataset, fraction: float, seed: int, by: str = "row") -> XmcDataset:
    """Sets training queries aside as the test split, so that choices never look at the real one.

    Args:
      dataset: the dataset; its own test split is not used.
      fraction: share of the training queries to set aside, between 0 and 1.
      seed: of the choice.
      by: what is drawn: "row", every query by itself; "title", queries of equal title together; "first_word",
        queries whose titles begin with the same word together, ignoring case. Take what is nearest to how the
        test queries differ from the training queries: a random row is easier than a word never seen.

    Returns:
      A view: `train` is the rest, `test` the queries set aside, with their targets and filter pairs.
    """
    num_queries = len(dataset.train)
    wanted = round(fraction * num_queries)
    groups_N = _groups(dataset.train, by)
    order_G = np.random.default_rng(seed).permutation(int(groups_N.max(initial=-1)) + 1)
    sizes_G = np.bincount(groups_N)[order_G]
    # Whole groups until the share is reached; a group that would overshoot it by far is passed over.
    chosen_G, count = [], 0
    for group, size in zip(order_G, sizes_G, strict=True):
        if count >= wanted:
            break
        if count + size <= max(1.2 * wanted, 1):
            chosen_G.append(group)
            count += size
    if not 0 < count < num_queries:
        raise UserError(
            f"a share of {fraction} of {num_queries} training queries by {by}", fix="give one between 0 and 1"
        )
    is_aside_N = np.isin(groups_N, chosen_G)
    view = subset(dataset, train_rows=np.flatnonzero(~is_aside_N))
    held = subset(dataset, train_rows=np.flatnonzero(is_aside_N))
    return dataclasses.replace(
        view,
        test=held.train,
        test_targets=held.train_targets,
        filter_pairs_test=held.filter_pairs_train,
        fingerprint=files.fingerprint(dataset.fingerprint, "holdout", fraction, seed, by),
    )


def _groups(split: Split, by: str) -> np.ndarray:
    """Numbers the groups that `holdout` keeps together, int64 [N]."""
    if by == "row":
        return np.arange(len(split))
    if by not in HOLDOUT_BY:
        raise UserError(f"holdout by {by!r}", fix="give one of " + ", ".join(HOLDOUT_BY))
    numbers: dict[str, int] = {}
    keys = (title if by == "title" else title.casefold().partition(" ")[0] for title in split.titles)
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _pairs_of(pairs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The pairs of `rows`, renumbered to their places in `rows`, in that order."""
    order = np.argsort(pairs[:, 0], kind="stable")
    ordered = pairs[order]
    first = np.searchsorted(ordered[:, 0], rows, side="left")
    counts = np.searchsorted(ordered[:, 0], rows, side="right") - first
    labels = ordered[spans(first, counts), 1]
    return np.stack([np.repeat(np.arange(len(rows)), counts), labels], axis=1).astype(np.int64)


def _targets(file: Path) -> scipy.sparse.csr_matrix:
    matrix = sparse_text.load_npz(file, fix=ANEW)
    matrix.has_sorted_indices = matrix.has_canonical_format = True
    return matrix


def _mapped(file: Path) -> np.ndarray:
    return npy.load(file, fix=ANEW)


def _pairs(file: Path) -> np.ndarray:
    pairs = npy.load(file, fix=ANEW, mmap_mode=None)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
        raise UserError(f"an array of {pairs.dtype} and shape {pairs.shape}", file=file, fix=ANEW)
    return pairs
