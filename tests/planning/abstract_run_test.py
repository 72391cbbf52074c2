"""Shapes that nothing was allocated for, against those of real runs."""

from __future__ import annotations

import fresh
import jax
import numpy as np
import pytest
import tiny

from vixml_jax import model_factory, sharding
from vixml_jax.data.pipeline import block_multiples, expected_size
from vixml_jax.errors import UserError
from vixml_jax.models import hub
from vixml_jax.planning import useful
from vixml_jax.planning.abstract_run import Workload, abstract_run
from vixml_jax.planning.capacity import nbytes


def config_of(checkpoint: str, train: str, images: int):
    config = tiny.config("nowhere", images=images)
    config.text.checkpoint, config.text.train = checkpoint, train
    config.text.dtype, config.text.lora_rank = "bfloat16", 4
    return config


@pytest.mark.parametrize(
    ("checkpoint", "train", "images"),
    [("random:bert-tiny", "full", 2), ("random:qwen2-tiny", "lora", 0), ("random:gemma3-tiny", "none", 2)],
)
def test_shapes_are_those_of_a_model_that_is_built(checkpoint, train, images):
    with sharding.use(sharding.make_mesh(2, 2, 2)):
        check_shapes(checkpoint, train, images)


def check_shapes(checkpoint, train, images):
    config = config_of(checkpoint, train, images)
    features = np.random.default_rng(fresh.SESSION).normal(size=(8, 192)).astype(np.float32)
    model, spec = model_factory.create(
        config, vocab_size=256, num_labels=3000, num_queries=5000, dataset="", base_fingerprint="",
        vision_fingerprint="", layout={}, longest=20, image_features=features if images else None,
    )  # fmt: skip
    text = hub.text_config(checkpoint, 256)
    vision = hub.vision_config("random:vit-tiny") if images else None
    abstract_spec, graphdef, params, frozen = model_factory.abstract(
        config, text, vision, num_labels=3000, num_queries=5000
    )
    real_graphdef, real_params, real_frozen = model_factory.split(model, train)
    for real, shapes in ((real_params, params), (real_frozen, frozen)):
        described = [
            (path, leaf.shape, leaf.dtype, leaf.sharding.spec)
            for path, leaf in jax.tree_util.tree_leaves_with_path(real)
        ]
        assert described == [
            (path, leaf.shape, leaf.dtype, leaf.sharding.spec)
            for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        ]
        assert nbytes(shapes) == sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(real))
    assert abstract_spec.dim == spec.dim
    assert abstract_spec.image_dim == spec.image_dim
    del graphdef, real_graphdef


def make(config, mesh, labels=3000, queries=5000, tokens=8.0, images=0.0):
    return abstract_run(config, Workload(labels, queries, 100, tokens, images), mesh)


def test_a_batch_has_as_many_slots_as_its_items(single_mesh):
    config = config_of("random:qwen2-tiny", "lora", 2)
    run = make(config, single_mesh, tokens=9.5, images=1.25)
    text, pictures = run.item_slots - run.item_images, run.item_images
    assert pictures.mean() == pytest.approx(1.25, abs=0.02)
    # "This product text" and the end for all; "and its image" where there are pictures.
    assert (text - 3 - 1 - 3 * (pictures > 0)).mean() == pytest.approx(9.5, abs=1e-3)
    rows, length = run.train_batch().tokens.token_ids.shape
    assert length == config.train.row_length
    assert run.useful_slots(2 * config.train.batch_size) <= rows * length
    assert run.train_batch().tokens.images.shape[1] == 192


def test_a_batch_is_rounded_up_as_the_pipeline_does(single_mesh):
    """Of items few of which have pictures, drawn batches differ by more than the share of a usual one."""
    run = make(config_of("random:bert-tiny", "full", 2), single_mesh, images=0.05)
    size = run.config.train.batch_size
    counts = [(run.item_slots, run.item_images)] * 2  # of the queries, and of the labels
    multiples = block_multiples(*expected_size(counts, size, run.config.train.row_length), 1)
    assert multiples["image_multiple"] > 1
    tokens = run.train_batch().tokens
    assert len(tokens.images) % multiples["image_multiple"] == 0
    assert len(tokens.token_ids) % multiples["row_multiple"] == 0


def test_tables_alone_grow_with_the_labels(mesh):
    config = config_of("random:bert-tiny", "full", 0)
    config.prototype.free_vectors = 1024
    small, large = make(config, mesh), make(config, mesh, labels=300_000)
    shards = sharding.num_row_shards(mesh)
    rows = sharding.table_rows(300_000) - sharding.table_rows(3000)
    assert nbytes(large.state.tables) - nbytes(small.state.tables) == rows * (64 + 1) * 4 // shards
    assert nbytes(large.state.params) == nbytes(small.state.params)
    assert nbytes(large.state.opt_state) == nbytes(small.state.opt_state)


def test_useful_operations_by_hand(single_mesh):
    """Two layers of width 64, items of exactly 16 slots, batches of 32: 64 items."""
    config = config_of("random:bert-tiny", "full", 0)
    config.loss.name, config.prototype.kind = "triplet", "none"
    run = make(config, single_mesh, tokens=16.0)
    assert set(run.item_slots) == {16}
    linear = 2 * (4 * 64 * 64 + 2 * 64 * 128) * 64 * 16 * 2
    attention = 2 * (2 * 16 * 16 * 64 * 2) * 64
    similarities = 2 * 32 * 32 * 64
    assert useful.step_flops(run) == (3 * (linear + attention + similarities), 0)
    assert useful.encoding_flops(run, 64) == linear + attention
    config.text.remat = "full"
    assert useful.step_flops(make(config, single_mesh, tokens=16.0))[1] == linear + attention


def test_frozen_weights_want_no_gradient(single_mesh):
    config = config_of("random:qwen2-tiny", "lora", 0)
    config.loss.name, config.prototype.kind = "triplet", "none"
    config.text.prompt = "{text}"
    run = make(config, single_mesh, tokens=16.0)
    matrices = 3 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
    adapters = 3 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    slots = 64 * 16
    attention = 3 * (2 * 2 * 16 * 16 * 64) * 64
    expected = 2 * slots * (2 * matrices + 3 * adapters) + 3 * attention + 3 * 2 * 32 * 32 * 64
    assert useful.step_flops(run)[0] == expected


def test_impossible_loads_are_refused(single_mesh):
    config = config_of("random:bert-tiny", "full", 0)
    with pytest.raises(UserError, match=r"--tokens=40 with config\.text\.max_tokens=16; give the mean"):
        make(config, single_mesh, tokens=40)
