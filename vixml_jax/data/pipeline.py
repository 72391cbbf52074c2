"""From the epoch's order to batches on the devices, through Grain.

A batch is a pure function of (seed, epoch, batch number, order), so a continued run needs no iterator state:
it starts Grain at the batch where it stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import grain
import jax
import numpy as np
import scipy.sparse
from jax.sharding import Mesh

from vixml_jax import sharding
from vixml_jax.data import label_matrix, packing
from vixml_jax.data.items import ItemBank
from vixml_jax.types import Batch, PackedTokens

# Row and image counts are rounded up to this share of a usual batch: the step compiles for few shapes.
BUCKET_SHARE = 1 / 8


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
    """

    queries: ItemBank
    labels: ItemBank
    targets: scipy.sparse.csr_matrix
    propensities: np.ndarray
    positives: str
    row_length: int
    drop_images: float = 0.0


class EpochSource:
    """The batches of one epoch, by number: a random-access source for Grain.

    The last batch is filled up with the first queries of the order, so that shapes never change and no
    query is left out.

    Args:
      data: the banks.
      order: int64 [N]; the epoch's order of the queries.
      batch_size: B.
      seed: of the sampled positives, with `epoch` and the batch number.
      epoch: 0-based.
      row_multiple: rows of a packed batch are a multiple of it.
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
        row_multiple: int = 1,
        image_multiple: int = 1,
    ):
        self._data, self._batch_size, self._seed, self._epoch = data, batch_size, seed, epoch
        self._row_multiple, self._image_multiple = row_multiple, image_multiple
        self._order = np.resize(order, num_batches(len(order), batch_size) * batch_size)

    def __len__(self) -> int:
        return len(self._order) // self._batch_size

    def __getitem__(self, index: int) -> Batch:
        data = self._data
        rows = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        rng = np.random.default_rng((self._seed, self._epoch, index))
        label_ids = label_matrix.sample_positives(data.targets, rows, data.positives, data.propensities, rng)
        targets = label_matrix.relevance(data.targets, rows, label_ids)
        label_ids = np.maximum(
            label_ids, 0
        )  # a query without positives has an empty slot: no 1 in its column
        keep_2B = rng.random((2, len(rows))) >= data.drop_images if data.drop_images else (None, None)
        sequences = packing.concatenate(
            data.queries.take(rows, keep_2B[0]), data.labels.take(label_ids, keep_2B[1])
        )
        tokens = packing.pack(
            sequences, data.row_length, row_multiple=self._row_multiple, image_multiple=self._image_multiple
        )
        return Batch(tokens, rows.astype(np.int32), label_ids.astype(np.int32), targets)


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
) -> Iterator[Batch]:
    """Yields the epoch's batches from number `start` on, placed on the mesh."""
    rows, images = usual_size(data, batch_size)
    source = EpochSource(
        data,
        order,
        batch_size,
        seed=seed,
        epoch=epoch,
        row_multiple=bucket(rows, sharding.num_row_shards(mesh)),
        image_multiple=bucket(images),
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
    shards = sharding.num_row_shards(mesh)
    mean_slots = bank.slots().mean() if len(bank) else 1.0
    row_multiple = bucket(items_per_call * mean_slots / row_length)
    image_multiple = bucket(items_per_call * bank.image_counts().mean() if len(bank) else 0)
    row_multiple = sharding.power_of_two(row_multiple) * shards
    image_multiple = sharding.power_of_two(image_multiple)
    for start in range(0, len(rows), items_per_call):
        chosen = rows[start : start + items_per_call]
        sequences = bank.take(np.resize(chosen, items_per_call))
        if len(rows) <= items_per_call:  # the only call
            num_rows = packing.assign_rows(sequences.lengths, row_length)[2]
            row_multiple = sharding.power_of_two(-(-num_rows // shards)) * shards
            image_multiple = items_per_call  # itself a power of two or the usual size: few shapes
        tokens = packing.pack(sequences, row_length, row_multiple=row_multiple, image_multiple=image_multiple)
        yield chosen, place_tokens(tokens, mesh)


def call_size(count: int, most: int, shards: int) -> int:
    """Items of a call that embeds `count` of them: `most`, or for few a power of two times `shards`."""
    return min(sharding.power_of_two(-(-count // shards)) * shards, most)


def usual_size(data: TrainingData, batch_size: int) -> tuple[float, float]:
    """Expected number of packed rows and of image embeddings of a batch."""
    slots = data.queries.slots().mean() + data.labels.slots().mean()
    images = data.queries.image_counts().mean() + data.labels.image_counts().mean()
    return batch_size * slots / data.row_length, batch_size * images


def bucket(usual: float, multiple: int = 1) -> int:
    """The step in which a count is rounded up, itself a multiple of `multiple`."""
    return sharding.round_up(max(int(usual * BUCKET_SHARE), 1), multiple)


def place(batch: Batch, mesh: Mesh) -> Batch:
    """Puts a host batch on the mesh; packed rows, queries and rows of the targets are split."""
    rows = sharding.rows(mesh)
    return Batch(
        tokens=place_tokens(batch.tokens, mesh),
        query_rows=_put(batch.query_rows, rows),
        label_ids=_put(batch.label_ids, rows),
        targets=_put(batch.targets, sharding.rows(mesh, 2)),
    )


def place_tokens(tokens: PackedTokens, mesh: Mesh) -> PackedTokens:
    """Puts packed items on the mesh: rows split over the devices, image embeddings whole on each."""
    rows = sharding.rows(mesh, 2)
    placed = {
        name: _put(getattr(tokens, name), rows)
        for name in ("token_ids", "segment_ids", "positions", "item_index", "image_index")
        if getattr(tokens, name) is not None
    }
    if tokens.images is not None:
        placed["images"] = _put(tokens.images, sharding.replicated(mesh))
    return PackedTokens(**placed)


def _put(array: np.ndarray | jax.Array, where: jax.sharding.NamedSharding) -> jax.Array:
    """Every process holds the same host array and hands over the part that its devices own."""
    if jax.process_count() == 1:
        return jax.device_put(array, where)
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])
