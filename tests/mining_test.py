"""Balanced clusters, the order of an epoch and the curriculum."""

from __future__ import annotations

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vixml_jax import mining, sharding, two_means
from vixml_jax.train_state import row_table

SEEDS = fresh.seeds(2)  # they stand in the ids


def lumps(rng: np.random.Generator, num_rows: int, dim: int = 16, lump: int = 12) -> np.ndarray:
    """Rows in lumps of about `lump`."""
    centres = rng.normal(size=(num_rows // lump + 1, dim))
    noise = rng.normal(size=(num_rows, dim))
    return (centres[rng.integers(0, len(centres), num_rows)] + 0.4 * noise).astype(np.float32)


def slow_clusters(x: np.ndarray, depth: int, rng: np.random.Generator) -> np.ndarray:
    """Balanced hierarchical 2-means, one cluster at a time, by sorting."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    groups = [np.arange(len(x))]
    for _ in range(depth):
        halves = []
        for rows in groups:
            a, b = x[rng.choice(rows, 2, replace=False)]
            quality = -1.0
            while True:
                order = rows[np.argsort(-(x[rows] @ (a - b)), kind="stable")]
                left, right = order[: -(-len(rows) // 2)], order[-(-len(rows) // 2) :]
                a, b = x[left].mean(0), x[right].mean(0)
                a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
                better = ((x[left] @ a).sum() + (x[right] @ b).sum()) / len(rows)
                if better - quality <= 1e-4:
                    break
                quality = better
            halves += [left, right]
        groups = halves
    ids = np.empty(len(x), np.int32)
    for number, rows in enumerate(groups):
        ids[rows] = number
    return ids


def slow_inertia(x: np.ndarray, ids: np.ndarray) -> float:
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    total = 0.0
    for number in set(ids.tolist()):
        rows = x[ids == number]
        centre = rows.mean(0) / np.linalg.norm(rows.mean(0))
        total += sum(1 - row @ centre for row in rows)
    return total / len(x)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("num_rows", "size", "num_clusters"), [(64, 16, 4), (65, 16, 8), (777, 16, 64), (300, 1, 300), (5, 8, 1)]
)
def test_sizes_are_equal_within_one(seed, num_rows, size, num_clusters):
    x = lumps(np.random.default_rng(seed), num_rows)
    ids = mining.balanced_clusters(x, size, jax.random.key(seed))
    assert ids.dtype == np.int32
    assert ids.shape == (num_rows,)
    counts = np.bincount(ids, minlength=num_clusters)
    assert len(counts) == num_clusters
    assert counts.max() - counts.min() <= 1
    assert counts.max() <= size


@pytest.mark.parametrize(("num_rows", "num_clusters"), [(100, 1), (100, 2), (101, 7), (97, 33), (40, 39)])
def test_any_number_of_clusters(num_rows, num_clusters):
    x = lumps(np.random.default_rng(num_clusters), num_rows, dim=8)
    ids = mining.balanced_clusters_into(x, num_clusters, jax.random.key(0))
    counts = np.bincount(ids, minlength=num_clusters)
    assert len(counts) == num_clusters
    assert set(counts) <= {num_rows // num_clusters, -(-num_rows // num_clusters)}


@pytest.mark.parametrize(("num_clusters", "levels"), [(2, 1), (7, 3), (32, 5), (33, 6)])
def test_progress_counts_the_levels(num_clusters, levels, capsys):
    x = lumps(np.random.default_rng(0), 97, dim=8)
    mining.balanced_clusters_into(x, num_clusters, jax.random.key(0), title="cluster rows")
    assert f"cluster rows: {levels}/{levels} levels" in capsys.readouterr().err
    mining.balanced_clusters_into(x, num_clusters, jax.random.key(0))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("num_clusters", [40, 41, 1000])
def test_enough_clusters_give_each_row_its_own(num_clusters):
    ids = mining.balanced_clusters_into(np.zeros((40, 4), np.float32), num_clusters, jax.random.key(0))
    assert len(set(ids.tolist())) == 40
    assert 0 <= ids.min() <= ids.max() < num_clusters


@pytest.mark.parametrize("seed", SEEDS)
def test_as_tight_as_the_slow_reading(seed):
    rng = np.random.default_rng(seed)
    x = lumps(rng, 1000, dim=24)
    ids = mining.balanced_clusters(x, 16, jax.random.key(seed))
    ours, slow = mining.inertia(x, ids), mining.inertia(x, slow_clusters(x, 6, rng))
    chance = mining.inertia(x, rng.permutation(ids))
    assert ours < 1.2 * slow  # over many seeds: 0.99 on average, 1.09 at worst
    assert ours < 0.75 * chance


def test_clear_lumps_are_found():
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(8), 16)
    x = (np.eye(8) * 3)[truth] + 0.05 * rng.normal(size=(128, 8))
    order = rng.permutation(128)
    ids = mining.balanced_clusters(x[order].astype(np.float32), 64, jax.random.key(0))
    assert len(set(zip(ids.tolist(), truth[order].tolist(), strict=True))) == 8  # no lump is cut


@pytest.mark.parametrize("seed", SEEDS)
def test_inertia(seed):
    rng = np.random.default_rng(seed)
    x, ids = lumps(rng, 200), rng.integers(0, 9, 200)
    assert mining.inertia(x, ids) == pytest.approx(slow_inertia(x, ids), rel=1e-4)
    assert mining.inertia(7 * x, ids) == pytest.approx(mining.inertia(x, ids), rel=1e-4)


def test_the_key_decides():
    x = lumps(np.random.default_rng(0), 500)
    first = mining.balanced_clusters(x, 16, jax.random.key(1))
    np.testing.assert_array_equal(first, mining.balanced_clusters(x, 16, jax.random.key(1)))
    assert (first != mining.balanced_clusters(x, 16, jax.random.key(2))).any()


@pytest.fixture
def set_constants(monkeypatch):
    """Sets constants of two_means for a test; they are read while tracing."""

    def forget_programs():
        for function in (two_means.split_levels, two_means.split_own):
            function.clear_cache()

    def set_all(**values):
        for name, value in values.items():
            monkeypatch.setattr(two_means, name, value)
        forget_programs()

    yield set_all
    forget_programs()


@pytest.mark.parametrize("products_of", [0, 160])
@pytest.mark.parametrize("kind", ["zero", "equal", "some zero", "few different", "not a number"])
def test_degenerate_rows(set_constants, kind, products_of):
    set_constants(PRODUCTS_OF=products_of)
    rng = np.random.default_rng(0)
    x = lumps(rng, 130, dim=8)
    if kind == "zero":
        x[:] = 0
    elif kind == "equal":
        x[:] = x[0]
    elif kind == "some zero":
        x[rng.random(130) < 0.6] = 0
    elif kind == "few different":
        x = x[rng.integers(0, 3, 130)]
    else:
        x[17] = np.nan
    counts = np.bincount(mining.balanced_clusters(x, 16, jax.random.key(0)), minlength=16)
    assert len(counts) == 16
    assert set(counts) <= {8, 9}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("slots", [1, 3, 63, 64, 65, 127, 300])  # 2^n - 1: as many bits as there are slots
def test_the_highest_scores(seed, slots):
    rng = np.random.default_rng(seed)
    for size in {0, 1, slots // 2, slots}:
        for count in {0, size // 3, size}:
            scores = rng.choice([-np.inf, -1.5, -0.0, 0.0, 1e-30, 2.0, np.nan], slots).astype(np.float32)
            found = np.asarray(two_means.highest(jnp.asarray(scores), size, count))
            assert found.sum() == count
            assert not found[size:].any()
            if not np.isnan(scores[:size]).any():
                # -0.0 is below 0.0, as in the order of IEEE 754.
                order = np.lexsort((np.arange(size), np.signbit(scores[:size]), -scores[:size]))
                np.testing.assert_array_equal(np.flatnonzero(found), np.sort(order[:count]))


@pytest.mark.parametrize(
    ("sample", "at_once", "slack"),
    [(256, 64, 1.3), (4096, 4096, 1.15), (4096, 100, 1.15)],
    ids=["sampled", "together", "in pieces"],
)
def test_how_the_work_is_cut_hardly_matters(set_constants, sample, at_once, slack):
    set_constants(ROWS_OF_A_FIT=sample, ROWS_AT_ONCE=at_once)
    rng = np.random.default_rng(3)
    x = lumps(rng, 900, dim=12)
    ids = mining.balanced_clusters(x, 64, jax.random.key(0))
    counts = np.bincount(ids, minlength=16)
    assert set(counts) == {56, 57}
    assert mining.inertia(x, ids) < slack * mining.inertia(x, slow_clusters(x, 4, rng))


@pytest.mark.parametrize("num_clusters", [5, 32, 61])
def test_inner_products_give_the_clusters_that_rows_give(set_constants, num_clusters):
    x = lumps(np.random.default_rng(4), 500)
    found = []
    for products_of in (0, 70, 500):  # at no level, the lower ones, all
        set_constants(PRODUCTS_OF=products_of)
        found.append(mining.balanced_clusters_into(x, num_clusters, jax.random.key(0)))
    for ids in found[1:]:
        assert (ids == found[0]).mean() > 0.98  # what is at home in two clusters may change


@pytest.mark.parametrize(
    ("num_clusters", "sizes"),
    [
        (11, (2, 2, 2)),
        *(
            pytest.param(num_clusters, sizes, marks=pytest.mark.slow)
            for num_clusters in (3, 8, 37)
            for sizes in ((8, 1, 1), (1, 8, 1), (2, 2, 2))
        ),
    ],
    ids=str,
)
def test_rows_split_over_a_mesh(num_clusters, sizes):
    """The same clusters as on one device; fewer than devices, as many for each, and not as many for each."""
    x = lumps(np.random.default_rng(5), 200)
    expected = mining.balanced_clusters_into(x, num_clusters, jax.random.key(0))
    with sharding.use(sharding.make_mesh(*sizes)) as mesh:
        table = row_table(x, mesh)  # of more rows than count
        ids = mining.balanced_clusters_into(table, num_clusters, jax.random.key(0), num_rows=len(x))
    assert (ids == expected).mean() > 0.98  # what is at home in two clusters may change
    counts = np.bincount(ids, minlength=num_clusters)
    assert set(counts) <= {len(x) // num_clusters, len(x) // num_clusters + 1}


@pytest.mark.slow
def test_samples_split_over_a_mesh(set_constants):
    set_constants(ROWS_OF_A_FIT=64, PRODUCTS_OF=0)
    x = lumps(np.random.default_rng(5), 1024)
    expected = mining.balanced_clusters(x, 32, jax.random.key(0))
    with sharding.use(sharding.make_mesh(8)) as mesh:
        ids = mining.balanced_clusters(row_table(x, mesh), 32, jax.random.key(0))
    assert (ids == expected).mean() > 0.98


def _bytes_per_device(lowered) -> int:
    memory = lowered.compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def test_field_size_fits_eight_devices():
    """2.2M rows of 768 dimensions, clustered on eight devices: under 8 GB each, by the compiler's account.

    The programs are those of the first level, of the exchange, and of each device's own clusters at the first
    level and at two of the last together. Beside what a program takes, the table of embeddings itself stays.
    """
    rows, dim, devices = 2_249_728, 768, 8
    share = rows // devices
    table_bytes = share * dim * 4
    with sharding.use(sharding.make_mesh(devices)) as mesh:

        def split(shape, dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(mesh, len(shape)))

        def level(clusters: int, slots: int, drawn: int, shards: int = 1):
            make = jax.ShapeDtypeStruct if shards == 1 else split
            sizes, starts = make((shards, clusters), np.int32), make((shards, clusters, drawn), np.int32)
            return make((shards, clusters, slots), np.int32), [two_means.Level(sizes, sizes, starts)]

        unit = split((rows, dim), np.float32)
        sample = two_means.ROWS_OF_A_FIT
        own = devices * two_means.ROWS_AT_ONCE // devices
        exchanged = split((devices * -(-share // own) * own, dim), np.float32)
        members, first = level(2_048, 138, 2, devices)
        _, second = level(4_096, 69, 2, devices)
        needs = {
            "first": two_means.split_levels.lower(unit, *level(1, rows, sample), slots=(rows // 2,)),
            "exchange": two_means.own_rows.lower(
                unit, jax.ShapeDtypeStruct((devices, share), np.int32), mesh
            ),
            "own": two_means.split_own.lower(
                exchanged, *level(1, share, sample, devices), slots=(share // 2 + 1,), mesh=mesh
            ),
            "last": two_means.split_own.lower(
                exchanged, members, [*first, *second], slots=(69, 35), mesh=mesh
            ),
        }
        needs = {name: _bytes_per_device(lowered) + table_bytes for name, lowered in needs.items()}
    assert all(2 * table_bytes < need < 8e9 for need in needs.values()), needs


def test_bad_arguments():
    x = np.zeros((4, 2), np.float32)
    for call in (
        lambda: mining.balanced_clusters(x, 0, jax.random.key(0)),
        lambda: mining.balanced_clusters_into(x, 0, jax.random.key(0)),
        lambda: mining.balanced_clusters_into(x[0], 2, jax.random.key(0)),
        lambda: mining.balanced_clusters_into(x[:0], 2, jax.random.key(0)),
        lambda: mining.epoch_order(np.zeros(3, np.int32), 4, 0, 0),
        lambda: mining.Curriculum(every=0),
    ):
        with pytest.raises(ValueError, match=r"must be|for 4 rows"):
            call()


@pytest.mark.parametrize("seed", SEEDS)
def test_epoch_order(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 40, 333).astype(np.int32)
    order = mining.epoch_order(ids, 333, seed, 4)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(333))
    walked = ids[order]
    assert 1 + (walked[1:] != walked[:-1]).sum() == len(set(ids.tolist()))  # each cluster in one piece
    assert (np.diff(walked) < 0).any()  # and not in the order of their numbers
    np.testing.assert_array_equal(order, mining.epoch_order(ids, 333, seed, 4))
    assert (order != mining.epoch_order(ids, 333, seed, 5)).any()
    assert (order != mining.epoch_order(ids, 333, seed + 1, 4)).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_epoch_order_without_clusters(seed):
    order = mining.epoch_order(None, 500, seed, 0)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(500))
    assert (order != np.arange(500)).any()


def test_every_cluster_may_come_first():
    ids = np.repeat(np.arange(4), 3)
    firsts = {int(ids[mining.epoch_order(ids, 12, 0, epoch)[0]]) for epoch in range(60)}
    assert firsts == {0, 1, 2, 3}


def test_curriculum_of_encoders():
    curriculum = mining.Curriculum(start=10, every=5, size=16, double_at=(20, 40, 60, 80, 100, 120))
    due = {epoch: curriculum.size_after(epoch) for epoch in range(150) if curriculum.reclusters_after(epoch)}
    first = {10: 16, 15: 16, 20: 32, 25: 32, 30: 32, 35: 32, 40: 64, 45: 64}
    assert {epoch: size for epoch, size in due.items() if epoch < 50} == first
    assert list(due) == list(range(10, 150, 5))
    assert (due[60], due[80], due[100], due[120], due[145]) == (128, 256, 512, 1024, 1024)


def test_curriculum_of_decoders():
    curriculum = mining.Curriculum(start=4, every=2, size=16, double_at=(8, 12, 16, 20, 24))
    due = {epoch: curriculum.size_after(epoch) for epoch in range(15) if curriculum.reclusters_after(epoch)}
    assert due == {4: 16, 6: 16, 8: 32, 10: 32, 12: 64, 14: 64}


def test_a_doubling_between_clusterings_waits_for_the_next():
    curriculum = mining.Curriculum(start=1, every=4, size=8, double_at=(2,))
    due = {epoch: curriculum.size_after(epoch) for epoch in range(10) if curriculum.reclusters_after(epoch)}
    assert due == {1: 8, 5: 16, 9: 16}
