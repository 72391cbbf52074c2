from __future__ import annotations

import jax
import numpy as np
import pytest
from brute_force import assert_same, whole

from vixml_jax import retrieval, sharding
from vixml_jax.errors import UserError
from vixml_jax.retrieval import mesh_index
from vixml_jax.retrieval.mesh_index import MeshIndex

# (labels, columns, queries, k, query_block, label_block): of one label, of fewer than devices, not divisible,
# of k above a device's rows and above all labels, in blocks of one, in many, and with groups within a block.
CASES = [
    (1, 3, 1, 1, 1, 1),
    (5, 2, 3, 4, 8, 2),
    (61, 4, 17, 9, 4, 3),
    (61, 4, 17, 50, 64, 5),
    (61, 4, 5, 70, 64, 100),
    (2000, 3, 20, 1, 8, 64),
    (9001, 3, 9, 7, 1024, 1024),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_a_stable_sort_on_eight_devices(case):
    num_labels, dim, num_queries, k, query_block, label_block = case
    rng = np.random.default_rng(num_labels)
    labels, queries = whole(rng, num_labels, dim), whole(rng, num_queries, dim)
    index = MeshIndex(labels, query_block, label_block, mesh=sharding.make_mesh(2, 2, 2))
    assert_same(index, queries, labels, k)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_compressed_banks(dtype):
    """These numbers are exact in bfloat16; in int8 where each row's largest magnitude is 127."""
    rng = np.random.default_rng(0)
    labels, queries = whole(rng, 333, 4), whole(rng, 9, 5)
    labels = np.concatenate([labels, np.full((333, 1), 127, np.float32)], axis=1)
    assert_same(MeshIndex(labels, 16, 64, dtype=dtype), queries, labels, 40)


@pytest.mark.parametrize(("groups", "k"), [(1, 5), (9, 4), (10, 5)])
def test_the_best_of_a_block_lie_in_the_best_groups(groups, k):
    """Also where nearly all scores are equal."""
    find = jax.jit(mesh_index._best_places, static_argnums=1)
    for seed, values in enumerate((1, 2, 3, 10, 100, 1000)):
        scores = np.random.default_rng(seed).integers(0, values, (30, groups * mesh_index.GROUP)) * 1.0
        places, best = find(np.float32(scores), k)
        wanted = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(places, wanted)
        np.testing.assert_array_equal(best, np.take_along_axis(scores, wanted, axis=1))


def test_real_numbers_agree_with_the_search_on_the_cpu():
    rng = np.random.default_rng(1)
    labels, queries = (rng.standard_normal((rows, 32), np.float32) for rows in (4000, 50))
    ids, scores = MeshIndex(labels, 64, 128).search(queries, 20)
    wanted_ids, wanted_scores = retrieval.build(labels, kind="exact").search(queries, 20)
    np.testing.assert_allclose(scores, wanted_scores, rtol=1e-5)
    assert (ids == wanted_ids).mean() > 0.999


def test_an_index_of_many_devices_opens_on_one(tmp_path):
    labels, queries = np.random.default_rng(2).standard_normal((2, 100, 8)).astype(np.float32)
    built = retrieval.build(labels, kind="mesh", dtype="int8")
    built.save(tmp_path / "index")
    with sharding.use(sharding.make_mesh(devices=jax.devices()[:1])):
        loaded = retrieval.load(tmp_path / "index")
    assert isinstance(loaded, MeshIndex)
    assert loaded._mesh.size == 1
    for got, wanted in zip(loaded.search(queries, 9), built.search(queries, 9), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_query_more_compiles_nothing():
    index = MeshIndex(np.eye(40, 8), query_block=64)
    compiled = mesh_index.searcher(index._mesh, 40, index._label_block, 5)
    before = compiled._cache_size()
    for count in range(9, 17):
        index.search(np.ones((count, 8)), 5)
    assert compiled._cache_size() == before + 1


@pytest.mark.parametrize(("codes", "bytes_each"), [("uint16", 2), ("int8", 1)])
def test_memory_of_1300000_labels_is_that_of_one_block(codes, bytes_each):
    """Compiled, not run: a device holds its labels, and blocks of scores; never a score of every label."""
    num_labels, dim, k, queries = 1_305_265, 384, 100, 1024
    mesh = sharding.make_mesh()
    block, rows = mesh_index.blocks(num_labels, mesh.size, 16_384)
    where = jax.sharding.NamedSharding(mesh, jax.P(tuple(mesh.axis_names)))
    labels = jax.ShapeDtypeStruct((rows * mesh.size, dim), codes, sharding=where)
    scales = (
        jax.ShapeDtypeStruct((rows * mesh.size,), np.float32, sharding=where) if codes == "int8" else None
    )
    queries_QD = jax.ShapeDtypeStruct((queries, dim), np.float32)
    compiled = mesh_index.searcher(mesh, num_labels, block, k).lower(queries_QD, labels, scales).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 4 * queries * block
    assert 4 * 4 * queries * block < 4 * queries * num_labels / mesh.size  # what the bound rules out
    assert memory.argument_size_in_bytes < 1.1 * rows * dim * bytes_each + 4 * queries * dim
    assert memory.output_size_in_bytes < 1.1 * 8 * queries * k


def test_blocks_hold_something():
    for sizes in ((0, 5), (5, 0)):
        with pytest.raises(UserError, match="at least 1"):
            MeshIndex(np.ones((3, 2)), *sizes)
