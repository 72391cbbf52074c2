"""Batches as pure functions of (seed, epoch, number): their rows, positives, targets and items."""

from __future__ import annotations

import collections
import dataclasses

import fresh
import jax
import ml_dtypes
import numpy as np
import pytest
import scipy.sparse

from vixml_jax import config_rules, sharding
from vixml_jax.data import pipeline
from vixml_jax.data.augmentation import Augmentation
from vixml_jax.data.image_bank import ImageBank, dense_slots
from vixml_jax.data.items import ItemBank
from vixml_jax.data.packing import Template
from vixml_jax.data.pipeline import EpochSource, TrainingData
from vixml_jax.data.ragged import Ragged

(SEED,) = fresh.seeds(1)  # it stands in the ids
NUM_QUERIES, NUM_LABELS, BATCH, ROW_LENGTH, IMAGE_DIM = 37, 19, 8, 16, 4
UNLABELLED = (5, 20)
TOKENS = ("token_ids", "segment_ids", "positions", "item_index", "image_index", "images")


def _bank(rng: np.random.Generator, count: int, image_dim: int) -> ItemBank:
    tokens = [rng.integers(1, 99, rng.integers(1, 9)) for _ in range(count)]
    pictures = rng.integers(0, 3, count)
    rows = rng.normal(size=(pictures.sum(), image_dim)).astype(ml_dtypes.bfloat16)
    images = ImageBank(rows, dense_slots(np.arange(len(rows)), pictures))
    return ItemBank(Ragged.from_rows(tokens, np.int32), Template(), images, max_images=2)


def _data(
    seed: int = SEED, positives: str = "inverse_propensity", image_dim: int = IMAGE_DIM
) -> TrainingData:
    rng = np.random.default_rng(seed)
    dense = (rng.random((NUM_QUERIES, NUM_LABELS)) < 0.2).astype(np.float32)
    dense[np.arange(NUM_QUERIES), rng.integers(0, NUM_LABELS, NUM_QUERIES)] = 1
    dense[list(UNLABELLED)] = 0
    return TrainingData(
        queries=_bank(rng, NUM_QUERIES, image_dim),
        labels=_bank(rng, NUM_LABELS, image_dim),
        targets=scipy.sparse.csr_matrix(dense),
        propensities=rng.uniform(1, 9, NUM_LABELS),
        positives=positives,
        row_length=ROW_LENGTH,
    )


def _order(epoch: int = 0) -> np.ndarray:
    return np.random.default_rng((SEED, epoch)).permutation(NUM_QUERIES)


def _source(epoch: int = 0, *, seed: int = SEED, batch_size: int = BATCH, **options) -> EpochSource:
    return EpochSource(_data(), _order(), batch_size, seed=seed, epoch=epoch, **options)


def _assert_equal(first, second):
    for got, expected in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        got, expected = np.asarray(got), np.asarray(expected)
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert got.tobytes() == expected.tobytes()


def _assert_items(batch, data: TrainingData):
    """Every item of a batch holds its bank's tokens and pictures, in order."""
    tokens = jax.tree.map(np.asarray, batch.tokens)
    items = [(data.queries, row) for row in np.asarray(batch.query_rows)]
    items += [(data.labels, label) for label in np.asarray(batch.label_ids)]
    assert set(np.unique(tokens.item_index)) <= set(range(len(items) + 1))
    for number, (bank, row) in enumerate(items):
        here = tokens.item_index == number
        images = tokens.image_index[here]
        np.testing.assert_array_equal(tokens.token_ids[here][images < 0], bank.tokens[row])
        features, present = bank.images.take(np.array([row]), 2)
        np.testing.assert_array_equal(
            tokens.images[images[images >= 0]].astype(np.float32), features[present].astype(np.float32)
        )


@pytest.mark.parametrize("batch_size", [1, 8, 37, 50, 100], ids=lambda size: f"{size}-{SEED}")
def test_every_query_once_and_the_last_batch_filled_up(batch_size):
    source = _source(batch_size=batch_size)
    assert len(source) == pipeline.num_batches(NUM_QUERIES, batch_size)
    batches = [source[i] for i in range(len(source))]
    rows = np.concatenate([batch.query_rows for batch in batches])
    assert {batch.query_rows.shape for batch in batches} == {(batch_size,)}
    np.testing.assert_array_equal(rows[:NUM_QUERIES], _order())
    fill = rows[NUM_QUERIES:]
    assert len(fill) < batch_size
    np.testing.assert_array_equal(fill, np.resize(_order(), len(fill)))


@pytest.mark.parametrize("positives", ["inverse_propensity", "uniform"], ids=lambda kind: f"{kind}-{SEED}")
def test_positives_targets_and_items(positives):
    data = _data(positives=positives)
    source = EpochSource(data, _order(), BATCH, seed=SEED, epoch=2)
    empty = 0
    for batch in (source[i] for i in range(len(source))):
        assert batch.query_rows.dtype == batch.label_ids.dtype == np.int32
        expected = np.zeros((BATCH, BATCH), np.uint8)
        for j, (own, label) in enumerate(zip(batch.query_rows, batch.label_ids, strict=True)):
            if own in UNLABELLED:
                empty += 1
                assert label == 0
                assert not batch.targets[j].any()
                continue
            assert data.targets[own, label] == 1
            for i, row in enumerate(batch.query_rows):
                expected[i, j] = data.targets[row, label] > 0
        assert batch.targets.dtype == np.uint8
        np.testing.assert_array_equal(batch.targets, expected)
        np.testing.assert_array_equal(batch.label_targets, expected.T)
        _assert_items(batch, data)
    assert empty >= len(UNLABELLED)


def test_a_batch_is_a_pure_function():
    source = _source()
    backwards = [source[i] for i in reversed(range(len(source)))][::-1]
    for i, batch in enumerate(backwards):
        _assert_equal(batch, source[i])
        _assert_equal(batch, _source()[i])  # of a fresh source, as after a restart

    def labels(source):
        return np.concatenate([source[i].label_ids for i in range(len(source))])

    assert (labels(_source(1)) != labels(source)).any()
    assert (labels(_source(seed=SEED + 1)) != labels(source)).any()


def test_rows_and_images_are_rounded_up():
    plain, rounded = _source()[0], _source(row_multiple=8, image_multiple=10)[0]
    assert rounded.tokens.token_ids.shape == (sharding.round_up(len(plain.tokens.token_ids), 8), ROW_LENGTH)
    assert len(rounded.tokens.images) == sharding.round_up(len(plain.tokens.images), 10)
    _assert_items(rounded, _data())


class Spy:
    """A bank that remembers which of its items were read."""

    def __init__(self, bank: ItemBank):
        self._bank, self.read = bank, []

    def take(self, rows, *kept):
        self.read.extend(rows.tolist())
        return self._bank.take(rows, *kept)

    def __getattr__(self, name):
        return getattr(self._bank, name)


LENGTHS = {
    "one": lambda rng, n: np.full(n, 5),
    "even": lambda rng, n: rng.integers(1, 33, n),
    "titles": lambda rng, n: np.clip(2 + rng.lognormal(1.2, 0.7, n), 2, 32).astype(int),
    "mostly short": lambda rng, n: np.where(rng.random(n) < 0.9, 2, 32),
}


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda name: f"{name}-{SEED}")
def test_an_epoch_has_few_shapes_and_little_padding(single_mesh, lengths):
    """The step compiles once for each shape, so that there may be 6 at most."""
    rng = np.random.default_rng(SEED)
    batch_size, num_queries, num_labels = 256, 256 * 24, 500

    def bank(count: int) -> ItemBank:
        tokens = [np.full(n, 7) for n in LENGTHS[lengths](rng, count)]
        return ItemBank(Ragged.from_rows(tokens, np.int32), Template())

    columns = rng.integers(0, num_labels, num_queries)
    targets = scipy.sparse.csr_matrix((np.ones(num_queries), (np.arange(num_queries), columns)))
    data = TrainingData(bank(num_queries), bank(num_labels), targets, np.ones(num_labels), "uniform", 64)
    shapes, filled = set(), []
    order = rng.permutation(num_queries)
    for batch in pipeline.train_batches(data, order, batch_size, single_mesh, seed=0, epoch=0):
        shapes.add(batch.tokens.token_ids.shape)
        filled.append((np.asarray(batch.tokens.segment_ids) > 0).mean())
    assert len(shapes) <= 6, shapes
    # Rounding up in steps of a sixteenth of a usual batch wastes half a step on average, or three quarters of
    # a standard deviation; rows themselves a few percent.
    assert np.mean(filled) > 0.9


@pytest.mark.parametrize("held", [[(0, 1, 2, 3)], [(0, 1), (2, 3)], [(0, 2), (1,), (3,)]], ids=str)
def test_processes_read_their_shares_of_one_batch(held):
    """What they read together is the whole batch, each item once; every shard stands on its own."""
    shards = 4
    whole = _source(shards=shards, row_multiple=2, image_multiple=3)[1]
    parts, read = [], []
    for shares in held:
        data = _data()
        spies = Spy(data.queries), Spy(data.labels)
        data = dataclasses.replace(data, queries=spies[0], labels=spies[1])
        source = EpochSource(
            data, _order(), BATCH, seed=SEED, epoch=0, shards=shards, held=shares, row_multiple=2,
            image_multiple=3,
        )  # fmt: skip
        parts.append(source[1])
        read.append(sorted(spies[0].read))
        assert len(spies[0].read) + len(spies[1].read) == len(
            set(parts[-1].tokens.item_index.ravel()) - {2 * BATCH}
        )
    assert sorted(row for rows in read for row in rows) == sorted(whole.query_rows.tolist())

    def split(batch):
        targets = {"targets": batch.targets, "label_targets": batch.label_targets}
        return targets | {name: getattr(batch.tokens, name) for name in TOKENS}

    for shares, part in zip(held, parts, strict=True):
        np.testing.assert_array_equal(part.query_rows, whole.query_rows)
        np.testing.assert_array_equal(part.label_ids, whole.label_ids)
        for name, array in split(part).items():
            expected = np.stack(np.split(split(whole)[name], shards))[list(shares)]
            np.testing.assert_array_equal(np.stack(np.split(array, len(shares))), expected)
    # The slots of a shard take images of that shard only.
    size = len(whole.tokens.images) // shards
    for shard, index in enumerate(np.split(whole.tokens.image_index, shards)):
        assert set(index[index >= 0] // size) <= {shard}
    _assert_items(whole, _data())


@pytest.mark.parametrize("start", [0, 3], ids=lambda start: f"{start}-{SEED}")
def test_train_batches_are_those_of_the_source_on_every_mesh(mesh, start):
    data, source = _data(), _source(epoch=4)
    batches = list(pipeline.train_batches(data, _order(), BATCH, mesh, seed=SEED, epoch=4, start=start))
    assert len(batches) == len(source) - start
    shards = sharding.num_row_shards(mesh)
    for number, batch in enumerate(batches, start):
        expected = source[number]
        _assert_equal(
            (batch.query_rows, batch.label_ids, batch.targets, batch.label_targets),
            (expected.query_rows, expected.label_ids, expected.targets, expected.label_targets),
        )
        _assert_items(batch, data)
        assert batch.tokens.token_ids.shape[0] % shards == 0
        for array in (batch.tokens.token_ids, batch.tokens.images, batch.targets):
            assert array.sharding.is_equivalent_to(sharding.rows(mesh, 2), 2)


def test_no_batches_are_left_after_the_last(single_mesh):
    last = len(_source())
    assert not list(
        pipeline.train_batches(_data(), _order(), BATCH, single_mesh, seed=SEED, epoch=0, start=last)
    )


def test_encoding_batches_cover_the_rows(single_mesh):
    bank = _bank(np.random.default_rng(SEED), 11, IMAGE_DIM)
    rows = np.array([9, 1, 4, 0, 10, 2, 3])
    chosen = []
    for part, tokens in pipeline.encoding_batches(bank, rows, 4, ROW_LENGTH, single_mesh):
        chosen.extend(part)
        tokens = jax.tree.map(np.asarray, tokens)
        for number, row in enumerate(np.resize(part, 4)):
            here = (tokens.item_index == number) & (tokens.image_index < 0)
            np.testing.assert_array_equal(tokens.token_ids[here], bank.tokens[row])
    np.testing.assert_array_equal(chosen, rows)


def _has_picture(batch) -> np.ndarray:
    """Whether each item of a batch has one, bool [2 * BATCH]."""
    tokens = jax.tree.map(np.asarray, batch.tokens)
    shown = tokens.item_index[tokens.image_index >= 0]
    return np.isin(np.arange(2 * len(batch.query_rows)), shown)


def test_pictures_are_dropped_item_by_item_and_nothing_else():
    whole = [_source()[i] for i in range(len(_source()))]
    data = dataclasses.replace(_data(), drop_images=0.5)
    source = EpochSource(data, _order(), BATCH, seed=SEED, epoch=0)
    kept, had = [], []
    for index, batch in enumerate(whole):
        dropped = source[index]
        _assert_equal(dropped.label_ids, batch.label_ids)  # the same positives are drawn
        _assert_equal(dropped, source[index])
        here, there = _has_picture(dropped), _has_picture(batch)
        assert not (here & ~there).any()
        kept.append(here)
        had.append(there)
        tokens = jax.tree.map(np.asarray, dropped.tokens)
        for number in np.flatnonzero(here):  # all of an item's pictures, or none
            bank, row = (
                (data.queries, batch.query_rows[number])
                if number < BATCH
                else (data.labels, batch.label_ids[number - BATCH])
            )
            shown = (tokens.item_index == number) & (tokens.image_index >= 0)
            assert shown.sum() == bank.image_counts()[row]
    kept, had = np.stack(kept), np.stack(had)
    for side in (slice(0, BATCH), slice(BATCH, None)):
        assert 0 < kept[:, side].sum() < had[:, side].sum()


@pytest.mark.parametrize("no_text", [[], [7, 8]], ids=["nothing", "special tokens"])
def test_text_is_dropped_where_pictures_stay_and_nothing_else(no_text):
    whole = _data()
    queries = dataclasses.replace(whole.queries, no_text=np.array(no_text, np.int32))
    labels = dataclasses.replace(whole.labels, no_text=np.array(no_text, np.int32))
    data = dataclasses.replace(whole, queries=queries, labels=labels, drop_images=0.3, drop_text=0.5)
    source = EpochSource(data, _order(), BATCH, seed=SEED, epoch=0)
    seen = collections.Counter()
    for index in range(len(source)):
        batch = source[index]
        _assert_equal(batch.label_ids, _source()[index].label_ids)  # the same positives are drawn
        _assert_equal(batch, source[index])
        shown = _has_picture(batch)
        tokens = jax.tree.map(np.asarray, batch.tokens)
        for number in range(2 * BATCH):
            is_query = number < BATCH
            bank, row = (
                (queries, batch.query_rows[number]) if is_query else (labels, batch.label_ids[number - BATCH])
            )
            text = tokens.token_ids[(tokens.item_index == number) & (tokens.image_index < 0)].tolist()
            kept = text == bank.tokens[row].tolist()
            assert kept or (text == no_text and shown[number])
            seen[is_query, bool(shown[number]), kept] += 1
    for is_query in (True, False):
        assert min(seen[is_query, True, True], seen[is_query, True, False], seen[is_query, False, True])


@pytest.mark.parametrize("no_text", [[], [7, 8]], ids=["nothing", "special tokens"])
def test_a_bank_of_pictures_only_is_one_whose_texts_are_all_left_out(no_text):
    bank = _bank(np.random.default_rng(SEED), 11, IMAGE_DIM)
    bank = dataclasses.replace(bank, no_text=np.array(no_text, np.int32))
    rows, pictures = np.array([7, 0, 3, 3]), bank.pictures_only()
    found = pictures.take(rows)
    _assert_equal(vars(found), vars(bank.take(rows, keep_text=np.zeros(4, bool))))
    assert found.token_ids[found.image_index < 0].tolist() == no_text * 4
    np.testing.assert_array_equal(pictures.slots()[rows], found.lengths)


@pytest.mark.parametrize("no_text", [[], [7, 8]], ids=["nothing", "special tokens"])
@pytest.mark.parametrize(
    "modalities", [("text+image",), ("text",), ("image",), ("image", "text+image"), config_rules.MODALITIES]
)
def test_items_with_text_and_pictures_are_seen_as_each_modality_all_others_once(no_text, modalities):
    rng = np.random.default_rng(SEED)
    bank = _bank(rng, 40, IMAGE_DIM)
    tokens = [no_text + bank.tokens[row].tolist() * (rng.random() < 0.7) for row in range(len(bank))]
    bank = dataclasses.replace(
        bank, tokens=Ragged.from_rows(tokens, np.int32), no_text=np.array(no_text, np.int32)
    )
    found = [[] for _ in tokens]
    for view, rows in bank.views(modalities):
        for row in rows.tolist():
            item = view.take(np.array([row]))
            is_text = item.image_index < 0
            found[row].append((item.token_ids[is_text].tolist(), int((~is_text).sum())))
    kinds = set()
    for row, text in enumerate(tokens):
        pictures = int((bank.images.slots[row] >= 0).sum())
        has_both = text != no_text and pictures > 0
        kinds.add((text != no_text, pictures > 0))
        seen = {"text": (text, 0), "image": (no_text, pictures), "text+image": (text, pictures)}
        wanted = [seen[name] for name in modalities] if has_both else [seen["text+image"]]
        assert sorted(found[row]) == sorted(wanted)
    assert len(kinds) == 4


def test_augmentation_changes_pictures_and_nothing_else():
    augmentation = Augmentation(0.5, size=2, white=(1.0, 1.0, 1.0))
    whole = _data(image_dim=12)
    data = dataclasses.replace(whole, augmentation=augmentation)
    plain, augmented, on_four = (
        EpochSource(data, _order(), BATCH, seed=SEED, epoch=0, shards=shards)
        for data, shards in ((whole, 1), (data, 1), (data, 4))
    )
    for index in range(len(plain)):
        batch, changed = plain[index], augmented[index]
        _assert_equal(changed, augmented[index])
        before, after = _pictures_of(batch), _pictures_of(changed)
        assert not any(np.array_equal(*pair) for pair in zip(before, after, strict=True))
        tokens = dataclasses.replace(changed.tokens, images=batch.tokens.images)
        _assert_equal(dataclasses.replace(changed, tokens=tokens), batch)
        # However the batch is split, a picture is changed alike.
        _assert_equal(_pictures_of(on_four[index]), after)


def _pictures_of(batch) -> list[np.ndarray]:
    """The pictures of a batch, item after item."""
    tokens = jax.tree.map(np.asarray, batch.tokens)
    shown = tokens.image_index >= 0
    order = np.lexsort((tokens.positions[shown], tokens.item_index[shown]))
    return [tokens.images[row] for row in tokens.image_index[shown][order]]
