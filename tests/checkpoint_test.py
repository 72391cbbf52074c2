"""Checkpoints: bitwise back, onto another mesh, the newest kept, and a clear line where one does not fit."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable

import fresh
import jax
import numpy as np
import pytest
from flax import nnx

from vixml_jax import optim, sharding, train_state
from vixml_jax.checkpoint import Checkpointer
from vixml_jax.errors import UserError
from vixml_jax.models.layers import Linear
from vixml_jax.train_state import Tables, TrainState, row_table

(SEED,) = fresh.seeds(1)

# A failed load leaves coroutines of Orbax behind that nobody awaits.
leaves_coroutines = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def _state(mesh, seed: int, dim: int = 16, bias: bool = True) -> TrainState:
    """A small state with lively numbers everywhere, in the mesh that is set."""
    rng = np.random.default_rng(seed)
    net = Linear(8, dim, axes=("embed", "heads"), bias=bias, rngs=nnx.Rngs(0))
    params = nnx.split(net, nnx.Param, ...)[1]
    tables = Tables(
        label_clusters=row_table(rng.integers(0, 9, 30).astype(np.int32), mesh),
        centroids=row_table(rng.normal(size=(30, dim)).astype(np.float32), mesh),
        query_embeddings=row_table(rng.normal(size=(50, dim)).astype(np.float32), mesh),
        query_clusters=row_table(rng.integers(0, 9, 50).astype(np.int32), mesh, fill=-1),
    )
    optimizer = optim.make(
        lr=1e-3,
        vision_lr=1e-3,
        head_lr=1e-3,
        weight_decay=0.01,
        warmup_steps=2,
        total_steps=9,
        clip_norm=1.0,
        eps=1e-6,
    )

    def lively(leaf):
        if leaf.dtype == np.int32:
            values = np.asarray(leaf) if leaf.ndim else rng.integers(1, 9)
        else:
            values = rng.normal(size=leaf.shape)
        return jax.device_put(np.asarray(values, leaf.dtype), leaf.sharding)

    return jax.tree.map(lively, train_state.create(params, optimizer, tables, mesh))


def _assert_same_bits(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def _save(workdir, state: TrainState, step: int) -> None:
    with Checkpointer(workdir) as checkpointer:
        checkpointer.save(state, step)


def test_back_bitwise_and_onto_every_mesh(mesh, tmp_path):
    with sharding.use(sharding.make_mesh(1, 4, 2)) as other:
        saved = _state(other, SEED)
        _save(tmp_path, saved, 7)
    like = _state(mesh, SEED + 1)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 7
        restored = checkpointer.restore(like)
        params, tables = checkpointer.restore_model(like.params, like.tables)
    _assert_same_bits(restored, saved)
    _assert_same_bits((params, tables), (saved.params, saved.tables))
    for got, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert got.sharding.is_equivalent_to(wanted.sharding, got.ndim)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_are_kept(single_mesh, tmp_path, keep):
    states = {step: _state(single_mesh, SEED + step) for step in (2, 5, 11)}
    with Checkpointer(tmp_path, keep) as checkpointer:
        for step, state in states.items():
            checkpointer.save(state, step)
    names = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert names == [2, 5, 11][-keep:]
    with Checkpointer(tmp_path, keep) as checkpointer:
        _assert_same_bits(checkpointer.restore(states[2]), states[11])


def test_a_saved_step_is_left_alone(single_mesh, tmp_path):
    first, second = _state(single_mesh, SEED), _state(single_mesh, SEED + 1)
    _save(tmp_path, first, 3)
    _save(tmp_path, second, 3)
    with Checkpointer(tmp_path) as checkpointer:
        _assert_same_bits(checkpointer.restore(second), first)


def test_saving_copies_what_the_next_step_donates(single_mesh, tmp_path):
    state = _state(single_mesh, SEED)
    before = jax.device_get(state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, 1)
        changed = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(state)
        jax.block_until_ready(changed)
    with Checkpointer(tmp_path) as checkpointer:
        _assert_same_bits(checkpointer.restore(changed), before)


def _refusal(call: Callable[[], object]) -> str:
    """The message of the UserError that `call` raises; what it leaves behind is collected here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        with pytest.raises(UserError) as caught:
            call()
        message = str(caught.value)
        del caught
        gc.collect()
    return message


@leaves_coroutines
@pytest.mark.parametrize("other", [{"dim": 24}, {"dim": 8}, {"bias": False}], ids=str)
@pytest.mark.parametrize("whole", [True, False], ids=["restore", "restore_model"])
def test_a_checkpoint_of_another_model_is_refused(single_mesh, tmp_path, other, whole):
    _save(tmp_path, _state(single_mesh, SEED), 3)
    like = _state(single_mesh, SEED, **other)
    with Checkpointer(tmp_path) as checkpointer:
        message = _refusal(
            lambda: (
                checkpointer.restore(like) if whole else checkpointer.restore_model(like.params, like.tables)
            )
        )
    assert message.startswith(f"{tmp_path / 'checkpoints'}: the checkpoint of step 3 does not fit the model")
    assert "\n" not in message


@leaves_coroutines
def test_a_model_with_a_parameter_more_is_refused(single_mesh, tmp_path):
    _save(tmp_path, _state(single_mesh, SEED, bias=False), 3)
    like = _state(single_mesh, SEED)
    with Checkpointer(tmp_path) as checkpointer:
        assert "does not fit the model" in _refusal(lambda: checkpointer.restore(like))


def test_nothing_to_restore(single_mesh, tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None
        with pytest.raises(UserError, match="no checkpoint; train first"):
            checkpointer.restore(_state(single_mesh, SEED))
