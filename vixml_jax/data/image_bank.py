"""The image bank: one embedding for every picture of a split, computed once by the frozen vision tower."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vixml_jax import files
from vixml_jax.data import pictures
from vixml_jax.data.pictures import Picture
from vixml_jax.data.ragged import Ragged, RaggedWriter
from vixml_jax.progress import Progress

# float32 pixels [B, H, W, 3] -> float32 embeddings [B, V]
Embed = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class FrozenTower:
    """A vision tower as the banks see it.

    Attributes:
      embed: embeds pixels.
      preprocessing: arguments of `pictures.to_pixels`.
      dim: V, size of an embedding.
      batch_size: pictures a call of `embed`; always as many, so that it compiles once.
    """

    embed: Embed
    preprocessing: dict[str, Any]
    dim: int
    batch_size: int


class ImageBank:
    """Embeddings of the pictures of N items.

    Pictures that are missing or cannot be read take no place: the readable ones of an item stand in order.

    Args:
      values: bits of bfloat16 embeddings as uint16, ragged: those of an item's pictures end to end.
      dim: V, size of an embedding.
    """

    def __init__(self, values: Ragged, dim: int):
        self.dim = dim
        self.rows = values.values.view(ml_dtypes.bfloat16).reshape(-1, dim)
        first_N = np.asarray(values.offsets[:-1]) // dim
        counts_N = values.lengths() // dim
        places = np.arange(max(int(counts_N.max(initial=0)), 1))
        # int32 [N, I]: rows of `rows`, -1 where an item has fewer pictures.
        self.slots = np.where(places < counts_N[:, None], first_N[:, None] + places, -1).astype(np.int32)

    def __len__(self) -> int:
        return len(self.slots)

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


def build(images: Sequence[Sequence[Picture]], tower: FrozenTower) -> ImageBank:
    """Embeds the pictures of N items in memory."""
    return ImageBank(Ragged.from_rows((row.ravel() for row in embedded(images, tower)), np.uint16), tower.dim)


def build_or_load(
    images: Sequence[Sequence[Picture]], tower: FrozenTower, *, cache_dir: Path, key_parts: list[Any]
) -> ImageBank:
    """Embeds pictures, or opens what an earlier call with the same key wrote.

    Args:
      images: the pictures of N items.
      tower: its preprocessing is part of the key.
      cache_dir: where banks lie.
      key_parts: JSON-able; what names the pictures and the tower.
    """
    directory = cache_dir / f"images-{files.fingerprint(*key_parts, tower.preprocessing)}"
    if not directory.is_dir():
        with (
            files.atomic_dir(directory) as temporary,
            RaggedWriter(temporary, np.uint16) as writer,
            Progress(len(images), "embed pictures", "items") as progress,
        ):
            for row in embedded(images, tower):
                writer.append(row)
                progress.update()
    return ImageBank(Ragged.load(directory), tower.dim)


def embedded(images: Sequence[Sequence[Picture]], tower: FrozenTower) -> Iterator[np.ndarray]:
    """Yields for each item the embeddings of its readable pictures, bfloat16 as uint16 [pictures, V].

    Pictures of neighbouring items share a call of `embed`.
    """
    size = tower.preprocessing["size"]
    waiting = np.zeros((tower.batch_size, size, size, 3), np.float32)
    counts: list[int] = []  # pictures of the items not yet yielded
    filled = 0
    ready: list[np.ndarray] = []

    def flush() -> Iterator[np.ndarray]:
        """Embeds what waits, and yields the items that are complete by it."""
        nonlocal filled
        if filled:
            ready.append(_bits(tower.embed(waiting)[:filled]))
            filled = 0
        done = np.concatenate(ready) if ready else np.zeros((0, tower.dim), np.uint16)
        ready.clear()
        start = 0
        for count in counts:
            yield done[start : start + count]
            start += count
        counts.clear()

    for pixels in _decoded(images, tower.preprocessing):
        for picture in pixels:
            if filled == tower.batch_size:
                ready.append(_bits(tower.embed(waiting)))
                filled = 0
            waiting[filled] = picture
            filled += 1
        counts.append(len(pixels))
        if filled == tower.batch_size:
            yield from flush()
    yield from flush()


def _decoded(
    images: Sequence[Sequence[Picture]], preprocessing: dict[str, Any]
) -> Iterator[list[np.ndarray]]:
    """Yields the pixels of each item's readable pictures; decoding is done by threads, some items ahead."""

    def pixels(item: Sequence[Picture]) -> list[np.ndarray]:
        opened = [pictures.decode(picture) for picture in item]
        return [pictures.to_pixels(image, **preprocessing) for image in opened if image is not None]

    ahead = 4 * (os.cpu_count() or 1)
    with ThreadPoolExecutor() as pool:
        tasks = []
        for row in range(len(images)):
            tasks.append(pool.submit(pixels, list(images[row])))
            if len(tasks) > ahead:
                yield tasks.pop(0).result()
        for task in tasks:
            yield task.result()


def _bits(embeddings: np.ndarray) -> np.ndarray:
    return np.asarray(embeddings).astype(ml_dtypes.bfloat16).view(np.uint16)
