"""The loss of the global batch, in blocks and on meshes, against the whole matrix on one device."""

from __future__ import annotations

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vixml_jax import global_batch, loss_terms, losses, sharding
from vixml_jax.models.two_tower import l2_normalize
from vixml_jax.train_step import make_loss

SEEDS = fresh.seeds(2)
NAMES = ("prime", "triplet", "info_nce", "decoupled_softmax", "sigmoid")
SETTINGS = {
    "negatives": 4,
    "margin_min": 0.1,
    "margin_max": 0.3,
    "temperature": 0.1,
    "reg_weight": 0.2,
    "reg_margin": 0.1,
}
B, E = 32, 6


def draw(seed: int):
    rng = np.random.default_rng(seed)
    embeddings = [rng.normal(size=(B, E)).astype(np.float32) for _ in range(3)]
    targets = (rng.random((B, B)) < 0.15).astype(np.uint8)
    targets[:, 1], targets[3] = 0, 0  # an empty slot, a query without labels
    return embeddings, targets


def plain(name: str, embeddings, targets, key, pair_logits):
    """What the public functions say of whole matrices."""
    queries, labels, texts = (l2_normalize(x) for x in embeddings)
    s_z, s_u = queries @ labels.T, queries @ texts.T
    triplet = {"k": 4, "margin_min": 0.1, "margin_max": 0.3, "temperature": 0.1}
    value = {
        "prime": lambda: losses.prime(s_u, targets, s_z, key=key, reg_weight=0.2, reg_margin=0.1, **triplet),
        "triplet": lambda: losses.triplet(s_z, targets, key=key, **triplet),
        "info_nce": lambda: losses.info_nce(s_z, targets, temperature=0.1),
        "decoupled_softmax": lambda: losses.decoupled_softmax(s_z, targets, temperature=0.1),
        "sigmoid": lambda: losses.sigmoid(s_z, targets, *pair_logits),
    }[name]()
    return value, losses.violation_rate(s_z, targets)


def in_blocks(name: str, embeddings, targets, key, pair_logits):
    """What a step computes."""
    queries, labels, texts = (l2_normalize(x) for x in embeddings)
    loss = make_loss(name, **SETTINGS)
    return global_batch.value(loss, queries, labels, texts, targets, targets.T, key, pair_logits)


def all_values_and_gradients(compute, embeddings, targets, key):
    """Of every loss, in one program: (values, violators, gradients)."""

    @jax.jit
    def run(embeddings, targets):
        results = {}
        for name in NAMES:

            def value(embeddings, logits, name=name):
                return compute(name, embeddings, targets, key, logits)

            logits = (jnp.float32(7.0), jnp.float32(-2.0))
            results[name] = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(embeddings, logits)
        return results

    return run(embeddings, targets)


def assert_same(found, expected):
    for name in NAMES:
        (value, violators), gradients = found[name]
        (wanted, wanted_violators), wanted_gradients = expected[name]
        assert float(value) == pytest.approx(float(wanted), rel=1e-5), name
        assert float(violators) == float(wanted_violators), name
        for gradient, reference in zip(
            jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True
        ):
            np.testing.assert_allclose(gradient, reference, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module", params=SEEDS)
def expected(request):
    seed = request.param
    embeddings, targets = draw(seed)
    key = jax.random.key(seed)
    with sharding.use(sharding.make_mesh(devices=jax.devices()[:1])):
        return seed, all_values_and_gradients(plain, embeddings, targets, key)


def test_every_mesh_gives_the_same(expected, mesh):
    seed, wanted = expected
    embeddings, targets = draw(seed)
    rows = sharding.rows(mesh)
    split = [jax.device_put(x, rows) for x in embeddings], jax.device_put(targets, rows)
    assert_same(all_values_and_gradients(in_blocks, *split, jax.random.key(seed)), wanted)


def test_blocks_of_every_size_give_the_same(expected, monkeypatch):
    seed, wanted = expected
    embeddings, targets = draw(seed)
    for pairs in (B * B // 4, B * 3):  # blocks of eight rows; of three, which do not divide 32, so of two
        monkeypatch.setattr(global_batch, "PAIRS_AT_ONCE", pairs)
        with sharding.use(sharding.make_mesh(devices=jax.devices()[:1])):
            assert_same(
                all_values_and_gradients(in_blocks, embeddings, targets, jax.random.key(seed)), wanted
            )


def test_block_count(monkeypatch):
    assert global_batch.block_count(2048, 2048) == 1
    assert global_batch.block_count(16_384, 16_384) == 16
    monkeypatch.setattr(global_batch, "PAIRS_AT_ONCE", 10)
    assert global_batch.block_count(12, 3) == 4
    assert global_batch.block_count(7, 3) == 7
    assert global_batch.block_count(5, 100) == 5


@pytest.mark.parametrize("name", NAMES)
def test_no_device_holds_the_matrix_of_all_pairs(name, monkeypatch):
    """Of a large batch on eight devices: it is no array of the program and nothing that travels."""
    batch, width = 4096, 16
    monkeypatch.setattr(global_batch, "PAIRS_AT_ONCE", 64 * batch)
    with sharding.use(sharding.make_mesh()) as mesh:
        rows = sharding.rows(mesh)
        embeddings = [jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=rows)] * 3
        targets = [jax.ShapeDtypeStruct((batch, batch), jnp.uint8, sharding=rows)] * 2
        loss = make_loss(name, **SETTINGS)

        def value(embeddings, targets):
            logits = (jnp.float32(7.0), jnp.float32(-2.0))
            return global_batch.value(loss, *embeddings, *targets, jax.random.key(0), logits)[0]

        compiled = jax.jit(jax.grad(value)).lower(embeddings, targets).compile()
    text = compiled.as_text()
    for shape in (f"[{batch},{batch}]", f"f32[{batch // 8},{batch}]"):
        assert shape not in text, shape
    # Beside its arguments a device needs a few blocks and the gathered embeddings.
    assert compiled.memory_analysis().temp_size_in_bytes < 40 * 64 * batch + 60 * batch * width


def test_draws_are_one_a_row():
    loss = loss_terms.prime(loss_terms.Triplets(4, 0.1, 0.3, 0.1), 0.1, 0.1)
    rows, columns = loss_terms.draws(loss, jax.random.key(0), 5, 7)
    assert (rows.shape, columns.shape) == ((3, 5), (1, 7))
    assert len(np.unique(rows)) == 15
