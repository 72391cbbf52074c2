"""Checkpoints: bitwise back, onto another mesh, the newest kept, and a clear line where one does not fit."""

from __future__ import annotations

import errno
import gc
import logging
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import fresh
import jax
import numpy as np
import pytest
from absl import logging as absl_logging
from flax import nnx

from vixml_jax import checkpoint, optim, sharding, train_state
from vixml_jax.checkpoint import MODEL_PARTS, Checkpointer, steps_in
from vixml_jax.errors import UserError
from vixml_jax.models.layers import Linear
from vixml_jax.train_state import Tables, TrainState, row_table

(SEED,) = fresh.seeds(1)

# A failed load leaves coroutines of Orbax behind that nobody awaits.
leaves_coroutines = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


OPTIMIZER = optim.make(
    lr=1e-3,
    head_lr=1e-3,
    vision_lr=1e-3,
    weight_decay=0.01,
    warmup_steps=2,
    total_steps=9,
    clip_norm=1.0,
    eps=1e-6,
)


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

    def lively(leaf):
        if leaf.dtype == np.int32:
            values = np.asarray(leaf) if leaf.ndim else rng.integers(1, 9)
        else:
            values = rng.normal(size=leaf.shape)
        return jax.device_put(np.asarray(values, leaf.dtype), leaf.sharding)

    return jax.tree.map(lively, train_state.create(params, OPTIMIZER, tables, mesh))


def _shapes(state: TrainState, mesh) -> TrainState:
    """What is known of a state before there is one."""
    tables = train_state.abstract_tables(30, 50, state.tables.centroids.shape[1], mesh)
    return train_state.abstract(state.params, OPTIMIZER, tables, mesh)


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
        restored = checkpointer.restore(_shapes(like, mesh))
        params, tables = checkpointer.restore_model(like.params, like.tables)
    _assert_same_bits(restored, saved)
    _assert_same_bits((params, tables), (saved.params, saved.tables))
    for got, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert got.sharding.is_equivalent_to(wanted.sharding, got.ndim)


@pytest.mark.parametrize(("keep", "every", "kept"), [(1, 0, [11]), (2, 0, [8, 11]), (1, 4, [4, 8, 11])])
def test_what_is_kept(single_mesh, tmp_path, keep, every, kept):
    states = {step: _state(single_mesh, SEED + step) for step in (4, 5, 8, 11)}
    with Checkpointer(tmp_path, keep, every) as checkpointer:
        for step, state in states.items():
            checkpointer.save(state, step)
    assert steps_in(tmp_path / "checkpoints") == kept[::-1]
    assert sorted(int(path.stem) for path in (tmp_path / "checkpoint_sums").iterdir()) == kept
    with Checkpointer(tmp_path, keep, every) as checkpointer:
        _assert_same_bits(checkpointer.restore(states[4]), states[11])


def _largest_file(directory) -> Path:
    return max(
        (path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a bit": _flip,
    "cut": lambda path: os.truncate(path, 17),
    "empty": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(single_mesh, tmp_path, damage, caplog):
    states = {step: _state(single_mesh, SEED + step) for step in (2, 5)}
    with Checkpointer(tmp_path, 2) as checkpointer:
        for step, state in states.items():
            checkpointer.save(state, step)
    damage(_largest_file(tmp_path / "checkpoints" / "5" / "tables"))

    with Checkpointer(tmp_path, only=("params",)) as checkpointer:  # what it reads is sound
        assert checkpointer.latest_step() == 5
    with Checkpointer(tmp_path, only=MODEL_PARTS) as checkpointer:
        params, tables = checkpointer.restore_model(states[2].params, states[2].tables)
    _assert_same_bits((params, tables), (states[2].params, states[2].tables))
    assert "damaged" in caplog.text
    assert steps_in(tmp_path / "checkpoints") == [5, 2]  # a reader moves nothing

    with Checkpointer(tmp_path, 2) as checkpointer:
        assert checkpointer.latest_step() == 2
        _assert_same_bits(checkpointer.restore(states[5]), states[2])
        checkpointer.save(states[5], 5)  # the run comes to that step again
    with Checkpointer(tmp_path, 2) as checkpointer:
        _assert_same_bits(checkpointer.restore(states[2]), states[5])


def test_without_its_sums_a_checkpoint_is_taken_as_it_is(single_mesh, tmp_path):
    states = {step: _state(single_mesh, SEED + step) for step in (2, 5)}
    with Checkpointer(tmp_path, 2) as checkpointer:
        for step, state in states.items():
            checkpointer.save(state, step)
    (tmp_path / "checkpoint_sums" / "5.json").write_text('{"cut')
    with Checkpointer(tmp_path, 2) as checkpointer:
        _assert_same_bits(checkpointer.restore(states[2]), states[5])


@pytest.mark.parametrize(
    "sums", ["", "[]", "null", "3", '{"a": 3}', '{"a": [1]}', '{"a": ["1", 2]}', "[" * 50_000, "\0"]
)
def test_sums_that_are_none_count_as_missing(tmp_path, sums):
    (tmp_path / "3").mkdir()
    (tmp_path / "3.json").write_text(sums)
    assert checkpoint.damage(tmp_path / "3", tmp_path / "3.json") is None


def test_sums_that_cannot_be_written_are_no_secret(single_mesh, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_sums", full)
    state = _state(single_mesh, SEED)
    with pytest.raises(OSError, match="No space left"):
        _save(tmp_path, state, 3)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state, 4)
    checkpointer.save(state, 5)  # has 4 summed
    with pytest.raises(OSError, match="No space left"):
        checkpointer.save(state, 6)
    with pytest.raises(OSError, match="No space left"):
        checkpointer.close()


def test_only_numbers_are_steps(tmp_path):
    for name in ("7", "3", "07x", "\u00b2", "7.tmp", "\u0663"):
        (tmp_path / name).mkdir()
    assert steps_in(tmp_path) == [7, 3]


def test_what_a_killed_save_leaves_does_not_count(single_mesh, tmp_path):
    state = _state(single_mesh, SEED)
    _save(tmp_path, state, 3)
    half = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "3", half)
    _largest_file(half).unlink()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 3
        _assert_same_bits(checkpointer.restore(state), state)


def test_a_saved_step_is_left_alone(single_mesh, tmp_path):
    first, second = _state(single_mesh, SEED), _state(single_mesh, SEED + 1)
    _save(tmp_path, first, 3)
    _save(tmp_path, second, 3)
    with Checkpointer(tmp_path) as checkpointer:
        _assert_same_bits(checkpointer.restore(second), first)


def test_saves_leave_no_thread_and_no_open_file(single_mesh, tmp_path):
    state = _state(single_mesh, SEED)
    threads, open_files = [], []
    with Checkpointer(tmp_path) as checkpointer:
        for step in range(1, 21):
            checkpointer.save(state, step)
            threads.append(threading.active_count())
            open_files.append(len(os.listdir("/proc/self/fd")))
    # A save that is under way has some of both.
    assert min(threads[-5:]) - min(threads[:5]) < 8
    assert min(open_files[-5:]) - min(open_files[:5]) < 24


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
@pytest.mark.parametrize("damage", ["cut", "gone", "without notes"])
def test_a_checkpoint_that_cannot_be_read_is_not_said_to_be_another_models(single_mesh, tmp_path, damage):
    """One without sums, of which nothing is known before."""
    state = _state(single_mesh, SEED)
    _save(tmp_path, state, 3)
    shutil.rmtree(tmp_path / "checkpoint_sums")
    part = tmp_path / "checkpoints" / "3" / "tables"
    DAMAGES[damage](_largest_file(part)) if damage in DAMAGES else (part / "_METADATA").unlink()
    with Checkpointer(tmp_path) as checkpointer:
        message = _refusal(lambda: checkpointer.restore(state))
    assert message.startswith(f"{tmp_path / 'checkpoints' / '3'}: the checkpoint cannot be read (")
    assert "move it away" in message
    assert "\n" not in message


@leaves_coroutines
def test_a_machine_that_is_short_of_something_is_no_fault_of_the_checkpoint(
    single_mesh, tmp_path, monkeypatch
):
    state = _state(single_mesh, SEED)
    _save(tmp_path, state, 3)
    with Checkpointer(tmp_path) as checkpointer:

        def short(*_, **__):
            raise KeyError("incompatible handler") from OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr(checkpointer._orbax, "load_checkpointables", short)
        with pytest.raises(OSError, match="Too many open files"):
            checkpointer.restore(state)


def test_a_process_of_somebody_else_keeps_its_hooks(single_mesh, tmp_path):
    def hooks():
        return sys.excepthook, list(warnings.filters), list(absl_logging.get_absl_logger().filters)

    before = hooks()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(_state(single_mesh, SEED), 1)
        assert hooks() == before
    assert hooks() == before


def test_the_command_line_says_failures_once():
    program = (
        "import sys, vixml_jax.cli as cli; sys.argv = ['vixml', 'index']; code = cli.run(); "
        "sys.exit(code if sys.excepthook is not sys.__excepthook__ else 1)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr


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


@pytest.fixture
def hooks_of_its_own(monkeypatch):
    """What the test makes of Orbax's logger goes with it."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(absl_logging.get_absl_logger(), "filters", [])


@pytest.mark.usefixtures("hooks_of_its_own")
def test_hooks_for_uncaught_errors_that_there_are_are_kept(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "excepthook", lambda *what: seen.append(what))
    for _ in range(2):  # the second changes nothing
        checkpoint.say_failures_once()
    error, closed = ValueError("a bug"), RuntimeError("Event loop is closed")
    sys.excepthook(ValueError, error, None)
    sys.excepthook(RuntimeError, closed, None)  # of the main thread
    assert [what[1] for what in seen] == [error, closed]
    thread = threading.Thread(target=sys.excepthook, args=(RuntimeError, closed, None))
    thread.start()
    thread.join()
    assert len(seen) == 2


@pytest.mark.parametrize(("level", "is_said"), [(logging.WARNING, True), (logging.ERROR, False)])
@pytest.mark.usefixtures("hooks_of_its_own")
def test_of_orbax_only_what_it_raises_as_well_is_silent(level, is_said):
    checkpoint.say_failures_once()
    failure = (OSError, OSError("full"), None)
    record = logging.LogRecord("absl", level, "site/orbax/checkpoint/x.py", 1, "failed", (), failure)
    assert bool(absl_logging.get_absl_logger().filter(record)) == is_said
