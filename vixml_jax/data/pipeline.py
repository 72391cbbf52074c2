"""From the epoch's order to batches on the devices, through Grain.

A batch is a pure function of (seed, epoch, batch number, order), so a continued run needs no iterator state:
it starts Grain at the batch where it stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np
import scipy.sparse
from jax.sharding import Mesh

from vixml_jax import sharding
from vixml_jax.data import label_matrix, packing
from vixml_jax.data.augmentation import Augmentation
from vixml_jax.data.items import ItemBank
from vixml_jax.types import Batch, PackedTokens

# Row and image counts are rounded up, so that the step compiles for few shapes: in steps of this share of a
# usual batch, or of so many standard deviations of drawn batches where small ones vary by more.
BUCKET_SHARE, BUCKET_DEVIATIONS = 1 / 16, 1.5


class Expected(NamedTuple):
    """How much of something a batch has: mean and standard deviation, if its items are drawn at random."""

    mean: float
    deviation: float


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What training reads: both banks, the relevance matrix and how positives are drawn.

    Attributes:
      queries: N training queries.
      labels: L labels.
      targets: csr_matrix [N, L].
      propensities: float64 [L]; inverse propensities.
      positives: "inverse_propensity" or "uniform".
      row_length: slots of a packed row.
      drop_images: chance that an item of a batch comes without its pictures, query and label slots each.
      drop_text: chance that an item of a batch that has its pictures comes without its text.
      augmentation: how pictures are changed at random, where the banks hold pixels; None: not at all.
    """

    queries: ItemBank
    labels: ItemBank
    targets: scipy.sparse.csr_matrix
    propensities: np.ndarray
    positives: str
    row_length: int
    drop_images: float = 0.0
    drop_text: float = 0.0
    augmentation: Augmentation | None = None


class EpochSource:
    """The batches of one epoch, by number: a random-access source for Grain.

    The last batch is filled up with the first queries of the order, so that shapes never change and no
    query is left out.

    A batch lies in S row shards, of which a process holds some. Every process works out the whole batch's
    queries, positives and places from the order, the relevance matrix and the items' lengths; tokens,
    pictures and rows of the targets it reads for its own shards only.

    Args:
      data: the banks.
      order: int64 [N]; the epoch's order of the queries.
      batch_size: B; a multiple of S.
      seed: of the sampled positives, with `epoch` and the batch number.
      epoch: 0-based.
      shards: S.
      held: numbers of the shards that are wanted, ascending; all of them by default.
      row_multiple: rows of a shard are a multiple of it.
      image_multiple: the same for image embeddings.
    """

    def __init__(
        self,
        data: TrainingData,
        order: np.ndarray,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        shards: int = 1,
        held: tuple[int, ...] | None = None,
        row_multiple: int = 1,
        image_multiple: int = 1,
    ):
        self._data, self._batch_size, self._seed, self._epoch = data, batch_size, seed, epoch
        self._held = tuple(range(shards)) if held is None else held
        self._plan_options = {
            "shards": shards,
            "row_multiple": row_multiple,
            "image_multiple": image_multiple,
        }
        self._order = np.resize(order, num_batches(len(order), batch_size) * batch_size)
        self._query_sizes, self._label_sizes = Sizes(data.queries), Sizes(data.labels)

    def __len__(self) -> int:
        return len(self._order) // self._batch_size

    def __getitem__(self, index: int) -> Batch:
        """Returns the process's part: tokens, images and targets of its shards, the rest whole."""
        data, size = self._data, self._batch_size
        rows = self._order[index * size : (index + 1) * size]
        rng = np.random.default_rng((self._seed, self._epoch, index))
        positives = label_matrix.sample_positives(data.targets, rows, data.positives, data.propensities, rng)
        # A query without positives has an empty slot: no 1 in its column.
        label_ids = np.maximum(positives, 0)
        keep_images_2B = _kept(rng, (2, size), data.drop_images)
        counts = self._query_sizes.images[rows], self._label_sizes.images[label_ids]
        images_2B = np.where(keep_images_2B, np.stack(counts), 0)
        # Who has lost the pictures, or has none, needs the text.
        keep_text_2B = _kept(rng, (2, size), data.drop_text) | (images_2B == 0)
        query_slots = self._query_sizes.slots_of(rows, keep_images_2B[0], keep_text_2B[0])
        label_slots = self._label_sizes.slots_of(label_ids, keep_images_2B[1], keep_text_2B[1])
        plan = packing.plan_rows(
            np.concatenate([query_slots, label_slots]),
            images_2B.ravel(),
            data.row_length,
            **self._plan_options,
        )
        items = np.flatnonzero(np.isin(plan.blocks(), self._held))
        queries, labels = items[items < size], items[items >= size] - size
        sequences = packing.concatenate(
            data.queries.take(rows[queries], keep_images_2B[0, queries], keep_text_2B[0, queries]),
            data.labels.take(label_ids[labels], keep_images_2B[1, labels], keep_text_2B[1, labels]),
        )
        sequences = self._augmented(sequences, items, images_2B, rng)
        own = np.arange(size).reshape(plan.shards, -1)[list(self._held)].ravel()
        return Batch(
            tokens=packing.lay_out(sequences, items, plan, self._held),
            query_rows=rows.astype(np.int32),
            label_ids=label_ids.astype(np.int32),
            targets=label_matrix.relevance(data.targets, rows[own], positives),
            label_targets=label_matrix.relevance(data.targets, rows, positives[own], by_label=True),
        )

    def _augmented(
        self, sequences: packing.Sequences, items: np.ndarray, images_2B: np.ndarray, rng: np.random.Generator
    ) -> packing.Sequences:
        """Changes the pictures of some of the batch's items; what is drawn does not depend on which."""
        if (augmentation := self._data.augmentation) is None or sequences.images is None:
            return sequences
        most = max(self._data.queries.max_images, self._data.labels.max_images)
        drawn_2BI22 = augmentation.draw(rng, (*images_2B.shape, most))
        there_2BI = np.arange(most) < images_2B[:, :, None]
        drawn_nI22 = drawn_2BI22.reshape(-1, most, 2, 2)[items]
        changes_M22 = drawn_nI22[there_2BI.reshape(-1, most)[items]]
        return dataclasses.replace(sequences, images=augmentation.apply(sequences.images, changes_M22))


class Sizes:
    """How many slots and images the items of a bank take, known without reading any of them."""

    def __init__(self, bank: ItemBank):
        self.images, self._slots = bank.image_counts(), bank.slots()
        self._bare = bank.text_only().slots()
        # What an item is shorter by without its text.
        self._saved = bank.text_lengths() - (len(bank.no_text) if bank.template.has_text else 0)

    def slots_of(self, rows: np.ndarray, keep_images: np.ndarray, keep_text: np.ndarray) -> np.ndarray:
        """Returns the slots of `rows` (int [n]), int64 [n], some without their pictures or their text."""
        slots = np.where(keep_images, self._slots[rows], self._bare[rows])
        return slots - np.where(keep_text, 0, self._saved[rows])


def _kept(rng: np.random.Generator, shape: tuple[int, ...], dropped: float) -> np.ndarray:
    """Draws who keeps what is left out with a chance of `dropped`, bool; draws nothing where that is 0."""
    return rng.random(shape) >= dropped if dropped else np.ones(shape, bool)


def num_batches(num_queries: int, batch_size: int) -> int:
    """Batches of an epoch; the last one is filled up."""
    return -(-num_queries // batch_size)


def train_batches(
    data: TrainingData,
    order: np.ndarray,
    batch_size: int,
    mesh: Mesh,
    *,
    seed: int,
    epoch: int,
    start: int = 0,
    chunk_rows: int = 0,
) -> Iterator[Batch]:
    """Yields the epoch's batches from number `start` on, placed on the mesh.

    Rows and pictures of a device come as a multiple of `chunk_rows`, where that is not 0.
    """
    shards = sharding.num_row_shards(mesh)
    counts = [(bank.slots(), bank.image_counts()) for bank in (data.queries, data.labels)]
    rows, images = expected_size(counts, batch_size, data.row_length)
    source = EpochSource(
        data,
        order,
        batch_size,
        seed=seed,
        epoch=epoch,
        shards=shards,
        held=sharding.local_row_shards(mesh),
        **block_multiples(rows, images, shards, chunk_rows),
    )
    dataset = grain.MapDataset.source(source).slice(slice(start, None))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    for batch in dataset.to_iter_dataset(options):
        yield place(batch, mesh)


def encoding_batches(
    bank: ItemBank, rows: np.ndarray, items_per_call: int, row_length: int, mesh: Mesh
) -> Iterator[tuple[np.ndarray, PackedTokens]]:
    """Yields (rows of the bank, packed items on the mesh), `items_per_call` items at a time.

    The last call is filled up with its first items; the rows say how many count. Numbers of packed rows and
    of pictures are rounded to powers of two, or to multiples of one: banks of all sizes and lengths, one
    after the other, meet few shapes.
    """
    shards, held = sharding.num_row_shards(mesh), sharding.local_row_shards(mesh)
    slots, images = bank.slots(), bank.image_counts()
    expected = expected_size([(slots, images)], items_per_call, row_length)
    multiples = {
        name: sharding.power_of_two(value) for name, value in block_multiples(*expected, shards).items()
    }
    for start in range(0, len(rows), items_per_call):
        chosen = rows[start : start + items_per_call]
        filled = np.resize(chosen, items_per_call)
        if len(rows) <= items_per_call:  # the only call
            num_rows = packing.assign_rows(slots[filled], row_length)[2]
            multiples = {
                "row_multiple": sharding.power_of_two(-(-num_rows // shards)),
                # Itself a power of two or the usual size, however many pictures there are: few shapes.
                "image_multiple": max(items_per_call // shards, 1),
            }
        plan = packing.plan_rows(slots[filled], images[filled], row_length, shards=shards, **multiples)
        items = np.flatnonzero(np.isin(plan.blocks(), held))
        tokens = packing.lay_out(bank.take(filled[items]), items, plan, held)
        yield chosen, place_tokens(tokens, mesh)


def call_size(count: int, most: int, shards: int) -> int:
    """Items of a call that embeds `count` of them: `most`, or for few a power of two times `shards`."""
    return min(sharding.power_of_two(-(-count // shards)) * shards, most)


def expected_size(
    counts: Sequence[tuple[np.ndarray, np.ndarray]], items_of_each: int, row_length: int
) -> tuple[Expected, Expected]:
    """What a batch of items with all their pictures takes: packed rows, and image embeddings.

    Args:
      counts: of each bank, slots and image embeddings of its items, int64 [N] each.
      items_of_each: items of each bank in a batch.
      row_length: slots of a row.
    """

    def total(counts: Iterable[np.ndarray], unit: int) -> Expected:
        filled = [count_N for count_N in counts if len(count_N)]
        mean = items_of_each * sum(float(count_N.mean()) for count_N in filled)
        variance = items_of_each * sum(float(count_N.var()) for count_N in filled)
        return Expected(mean / unit, variance**0.5 / unit)

    return total((slots for slots, _ in counts), row_length), total((images for _, images in counts), 1)


def block_multiples(rows: Expected, images: Expected, shards: int, chunk_rows: int = 0) -> dict[str, int]:
    """Of what a shard's rows and pictures are multiples, as arguments of `packing.plan_rows`.

    Args:
      rows: packed rows of all shards.
      images: pictures of all shards.
      shards: of the mesh.
      chunk_rows: they are multiples of it as well, where it is not 0.
    """
    return {
        name: sharding.round_up(_bucket(expected, shards), chunk_rows or 1)
        for name, expected in (("row_multiple", rows), ("image_multiple", images))
    }


def _bucket(expected: Expected, shards: int) -> int:
    """The step in which a shard's count is rounded up."""
    step = max(expected.mean * BUCKET_SHARE, expected.deviation * BUCKET_DEVIATIONS)
    return max(int(step / shards), 1)


def place(batch: Batch, mesh: Mesh) -> Batch:
    """Puts the processes' parts of a batch on the mesh; rows, queries and targets are split by rows."""
    rows = sharding.rows(mesh)
    return Batch(
        tokens=place_tokens(batch.tokens, mesh),
        query_rows=sharding.put(np.asarray(batch.query_rows), rows),
        label_ids=sharding.put(np.asarray(batch.label_ids), rows),
        targets=sharding.from_local_rows(np.asarray(batch.targets), mesh),
        label_targets=sharding.from_local_rows(np.asarray(batch.label_targets), mesh),
    )


def place_tokens(tokens: PackedTokens, mesh: Mesh) -> PackedTokens:
    """Puts the processes' parts of packed items on the mesh, rows and images split over the devices."""
    return jax.tree.map(lambda local: sharding.from_local_rows(local, mesh), tokens)
