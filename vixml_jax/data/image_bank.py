"""The image bank: one embedding for every picture of a split, computed once by the frozen vision tower.

Embeddings lie in an `EmbeddingStore` by the content of the pictures, so that a picture is embedded once
however many items, splits, held-out views or versions of a dataset show it, and a killed run goes on with the
picture at which it stopped. The bank of a view is an index into the store.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from vixml_jax import files, npy
from vixml_jax.data import pictures
from vixml_jax.data.ahead import mapped_ahead
from vixml_jax.data.embedding_store import DIGEST, EmbeddingStore
from vixml_jax.data.pictures import Picture, UnreadablePicture
from vixml_jax.errors import UserError
from vixml_jax.progress import Progress

logger = logging.getLogger(__name__)

# So many unreadable pictures are named one by one when a bank is made; the report has them all.
NAMED = 5


@dataclasses.dataclass(frozen=True)
class FrozenTower:
    """A vision tower as the banks see it.

    Attributes:
      embed: float32 pixels [B, H, W, 3] -> float [B, V], perhaps not computed yet when it returns.
      preprocessing: arguments of `pictures.to_pixels`.
      dim: V, size of an embedding.
      batch_size: B, pictures a call of `embed`; always as many, so that it compiles once.
      made_from: JSON-able; names the tower's weights, and all else that its embeddings depend on.
    """

    embed: Callable[[np.ndarray], Any]
    preprocessing: dict[str, Any]
    dim: int
    batch_size: int
    made_from: dict[str, Any] = dataclasses.field(default_factory=dict)


class StoredPictures(Protocol):
    """Pictures of N items that lie in a prepared dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sequence[bytes]:
        """The pictures of an item."""
        ...

    def digests(self) -> tuple[np.ndarray, np.ndarray]:
        """Names all pictures by their content, uint8 [P, 16], and says how many every item has, int64 [N]."""
        ...

    def name(self, item: int, place: int) -> dict[str, Any]:
        """Says which picture of which item it is, for a report."""
        ...


class ImageBank:
    """Embeddings of the pictures of N items.

    Args:
      rows: bfloat16 [M, V]; embeddings, of these items and perhaps of others.
      slots: int32 [N, I]; rows of an item's pictures in order, -1 where it has no more. Pictures that are
        missing or cannot be read take no place.
    """

    def __init__(self, rows: np.ndarray, slots: np.ndarray):
        self.rows, self.slots, self.dim = rows, slots, rows.shape[1]

    def __len__(self) -> int:
        return len(self.slots)

    def view(self, items: np.ndarray) -> ImageBank:
        """Returns the bank of some items, int [n]."""
        return ImageBank(self.rows, self.slots[items])

    def used_rows(self) -> np.ndarray:
        """Returns the rows of the items' pictures, an item after the other, int64 [n]."""
        return self.slots[self.slots >= 0].astype(np.int64)

    def take(self, rows: np.ndarray, max_images: int) -> tuple[np.ndarray, np.ndarray]:
        """Gathers the first `max_images` pictures of items.

        Args:
          rows: int [n].
          max_images: I.

        Returns:
          bfloat16 [n, I, V], zero where there is no picture, and bool [n, I], where there is one.
        """
        slots = self.slots[rows, :max_images]
        present = slots >= 0
        features = np.zeros((*slots.shape, self.dim), ml_dtypes.bfloat16)
        features[present] = self.rows[slots[present]]
        return features, present


def dense_slots(rows_P: np.ndarray, counts_N: np.ndarray) -> np.ndarray:
    """Lays out which rows are whose.

    Args:
      rows_P: int [P]; rows of all items' pictures, an item after the other; -1 for one that is missing.
      counts_N: int [N]; pictures of every item, missing ones counted in.

    Returns:
      int32 [N, I]; the rows of every item that are not missing, then -1. I is at least 1.
    """
    counts_N = np.asarray(counts_N, np.int64)
    there_P = rows_P >= 0
    items = np.repeat(np.arange(len(counts_N)), counts_N)[there_P]
    present_N = np.bincount(items, minlength=len(counts_N))
    places = np.arange(len(items)) - np.repeat(np.cumsum(present_N) - present_N, present_N)
    slots = np.full((len(counts_N), max(int(present_N.max(initial=0)), 1)), -1, np.int32)
    slots[items, places] = rows_P[there_P]
    return slots


def build(images: Sequence[Sequence[Picture]], tower: FrozenTower) -> ImageBank:
    """Embeds the pictures of N items in memory; those that cannot be read are named and left out."""
    flat = [picture for item in images for picture in item]
    rows = np.full(len(flat), -1, np.int64)
    parts, unreadable, done = [np.zeros((0, tower.dim), ml_dtypes.bfloat16)], [], 0
    for embeddings, problems in embedded(flat, tower):
        for number, problem in enumerate(problems, start=done):
            if problem is None:
                rows[number] = number
            else:
                picture = flat[number]
                name = picture if isinstance(picture, str) else getattr(picture, "filename", "")
                unreadable.append(f"{name or f'picture {number}'}: {problem}")
        parts.append(np.asarray(embeddings, ml_dtypes.bfloat16))
        done += len(problems)
    _warn("these pictures", unreadable, "")
    return ImageBank(np.concatenate(parts), dense_slots(rows, np.array([len(item) for item in images])))


def build_or_load(images: StoredPictures, tower: FrozenTower, cache_dir: Path, title: str) -> ImageBank:
    """Opens the bank of a view; embeds those of its pictures that no earlier call has embedded.

    Args:
      images: the pictures of N items.
      tower: who embeds them.
      cache_dir: where embeddings lie; a directory for every tower and preprocessing.
      title: of the view, for progress and report.
    """
    made_from = {**tower.made_from, "preprocessing": tower.preprocessing}
    directory = cache_dir / f"images-{files.fingerprint(made_from, tower.dim)}"
    digests, counts_N = images.digests()
    view = hashlib.sha256(digests.tobytes() + counts_N.tobytes()).hexdigest()[:16]
    slots_file = directory / f"slots-{view}.npy"
    store = EmbeddingStore(directory, tower.dim, made_from)
    if not slots_file.is_file():
        digests_P = np.ascontiguousarray(digests).view(DIGEST).reshape(-1)
        if len(store.missing(digests_P)):
            _fill(store, images, digests_P, counts_N, tower, title)
        slots = dense_slots(store.find(digests_P), counts_N)
        _report(store, images, digests_P, counts_N, title)
        with files.atomic_file(slots_file) as file:
            np.save(file, slots, allow_pickle=False)
    slots = npy.load(slots_file, fix="delete it: it is made anew")
    if slots.max(initial=-1) >= store.num_rows:
        raise UserError("some embeddings are gone", file=directory, fix="delete it, to make them anew")
    return ImageBank(store.rows, slots)


def _fill(
    store: EmbeddingStore,
    images: StoredPictures,
    digests_P: np.ndarray,
    counts_N: np.ndarray,
    tower: FrozenTower,
    title: str,
) -> None:
    """Embeds the pictures that the store lacks, in the order of the items."""
    ends_N = np.cumsum(counts_N)
    with store.adding() as adder:
        todo = store.missing(digests_P)
        distinct = len(np.unique(digests_P[_is_there(digests_P)]))
        with Progress(distinct, f"embed pictures of {title}", "pictures", distinct - len(todo)) as progress:
            done = 0
            for embeddings, problems in embedded(_Chosen(images, todo, ends_N), tower):
                chosen = digests_P[todo[done : done + len(problems)]]
                adder.add([bytes(digest) for digest in chosen], embeddings, problems)
                done += len(problems)
                progress.update(len(problems))


class _Chosen(Sequence[bytes]):
    """Some pictures of the items, by their places in the row of all pictures, ascending."""

    def __init__(self, images: StoredPictures, places: np.ndarray, ends_N: np.ndarray):
        self._images, self._places = images, places
        self._items = np.searchsorted(ends_N, places, side="right")
        self._within = places - np.concatenate([[0], ends_N])[self._items]
        self._open: tuple[int, Sequence[bytes]] = (-1, ())

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
        if number >= len(self):
            raise IndexError(number)
        item = int(self._items[number])
        if self._open[0] != item:  # pictures of an item follow each other
            self._open = (item, self._images[item])
        return self._open[1][self._within[number]]


def embedded(
    images: Sequence[Picture], tower: FrozenTower
) -> Iterator[tuple[np.ndarray, list[UnreadablePicture | None]]]:
    """Embeds pictures, a batch at a time, while threads decode the next ones.

    Yields:
      Embeddings [b, V] of up to `batch_size` pictures, in order, and what is wrong with each; the embedding
      of a picture with which something is wrong means nothing.
    """

    def pixels(picture: Picture) -> np.ndarray | UnreadablePicture:
        try:
            return pictures.to_pixels(pictures.load(picture), **tower.preprocessing)
        except UnreadablePicture as problem:
            return problem

    size = tower.preprocessing["size"]
    decoded = mapped_ahead(pixels, images)
    waiting: tuple[Any, list[UnreadablePicture | None]] | None = None
    for start in range(0, len(images), tower.batch_size):
        batch = np.zeros((tower.batch_size, size, size, 3), np.float32)
        problems: list[UnreadablePicture | None] = []
        for number in range(min(tower.batch_size, len(images) - start)):
            result = next(decoded)
            if isinstance(result, UnreadablePicture):
                problems.append(result)
            else:
                problems.append(None)
                batch[number] = result
        embeddings = tower.embed(batch)
        if waiting is not None:  # fetched one call late, so that the device always has work
            yield _fetched(*waiting)
        waiting = embeddings, problems
    if waiting is not None:
        yield _fetched(*waiting)


def _fetched(
    embeddings: Any, problems: list[UnreadablePicture | None]
) -> tuple[np.ndarray, list[UnreadablePicture | None]]:
    rows = np.asarray(embeddings)[: len(problems)]
    if not np.isfinite(rows).all():
        raise UserError(
            "the vision tower gives embeddings that are not finite",
            fix="give --config.vision.dtype=float32, or another checkpoint",
        )
    return rows, problems


def _report(
    store: EmbeddingStore, images: StoredPictures, digests_P: np.ndarray, counts_N: np.ndarray, title: str
) -> None:
    """Writes which pictures of a view cannot be read, and why, beside the embeddings."""
    ends_N = np.cumsum(counts_N)
    is_there_P = _is_there(digests_P)
    unreadable = []
    for place in np.flatnonzero(is_there_P & (store.find(digests_P) < 0)):
        item = int(np.searchsorted(ends_N, place, side="right"))
        problem = store.problem(bytes(digests_P[place]))
        assert problem is not None  # else it would have been embedded
        name = images.name(item, int(place - (ends_N[item] - counts_N[item])))
        unreadable.append({**name, "problem": problem.problem, "detail": problem.detail})
    report = {
        "pictures": int(is_there_P.sum()),
        "distinct": len(np.unique(digests_P[is_there_P])),
        "not_there": int((~is_there_P).sum()),
        "unreadable": unreadable,
    }
    file = store.directory / f"report-{title}.json"
    files.write_json(file, report)
    shown = [f"{_named(found)}: {found['problem']}" for found in unreadable]
    _warn(f"pictures of {title}", shown, f"; all are in {file}")


def _is_there(digests_P: np.ndarray) -> np.ndarray:
    return digests_P != np.zeros(1, DIGEST)


def _named(found: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in found.items() if key not in ("problem", "detail"))


def _warn(what: str, unreadable: list[str], where: str) -> None:
    if unreadable:
        more = f" and {len(unreadable) - NAMED} more" if len(unreadable) > NAMED else ""
        logger.warning(
            "%d of %s cannot be read and count as missing: %s%s%s",
            len(unreadable), what, "; ".join(unreadable[:NAMED]), more, where,
        )  # fmt: skip
