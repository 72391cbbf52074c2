"""The train loop keeps the device busy: a program for each shape, nothing fetched but what is logged."""

from __future__ import annotations

import fresh
import jax
import numpy as np
import pytest
import tiny

from vixml_jax import train
from vixml_jax.prepare import prepare

(SEED,) = fresh.seeds(1)
LOG_EVERY, EPOCHS, BATCH, QUERIES = 3, 2, 32, 230
STEPS = EPOCHS * -(-QUERIES // BATCH)


class Figure:
    """A step's figure that says when somebody wants its value."""

    def __init__(self, value: jax.Array, step: int, watch: Watch):
        self._value, self._step, self._watch = value, step, watch

    def block_until_ready(self) -> Figure:
        self._watch.waited[self._step] = len(self._watch.shapes)
        return self

    def __array__(self, *args, **kwargs) -> np.ndarray:
        self._watch.fetched[self._step] = len(self._watch.shapes)
        return np.asarray(self._value, *args, **kwargs)


class Watch:
    """Stands around the compiled step: keeps shapes and programs, and forbids transfers while it runs."""

    def __init__(self):
        self.shapes: list[tuple[int, ...]] = []
        # Of each step whose figures were wanted, how many steps had been handed to the device by then.
        self.fetched: dict[int, int] = {}
        self.waited: dict[int, int] = {}  # the same of those that were waited for, values or not
        self.step_fn, self.text = None, ""

    def compile_step(self, *args, **kwargs):
        self.step_fn = self._compile(*args, **kwargs)
        return self

    def __call__(self, state, frozen, batch):
        self.shapes.append(batch.tokens.token_ids.shape)
        if not self.text:
            self.text = self.step_fn.lower(state, frozen, batch).compile().as_text()
        with jax.transfer_guard("disallow"):
            state, figures = self.step_fn(state, frozen, batch)
        number = len(self.shapes)
        return state, {name: Figure(value, number, self) for name, value in figures.items()}

    def around(self, monkeypatch) -> None:
        self._compile = train.compile_step
        monkeypatch.setattr(train, "compile_step", self.compile_step)


@pytest.fixture(scope="module")
def watch(tmp_path_factory):
    root = tmp_path_factory.mktemp("watched")
    prepare(
        tiny.write_raw(root / "raw", seed=SEED, num_train=QUERIES, images=False), root / "dataset", "tiny"
    )
    config = tiny.config(root / "dataset")
    config.train.epochs, config.train.batch_size, config.train.log_every = EPOCHS, BATCH, LOG_EVERY
    config.checkpoint.every_steps = 0
    watch = Watch()
    with tiny.only_devices(1), pytest.MonkeyPatch.context() as patch:
        watch.around(patch)
        train.train(config, root / "run")
    return watch


def test_the_step_compiles_once_for_each_shape(watch):
    assert len(watch.shapes) == STEPS
    assert watch.step_fn._cache_size() == len(set(watch.shapes)) <= 6


def test_the_loop_runs_one_step_ahead_of_the_device(watch):
    """So that it is never idle, and a run that is told to stop has not many steps to wait for."""
    per_epoch = STEPS // EPOCHS
    within = [step for step in range(1, STEPS + 1) if step % per_epoch]
    assert watch.waited == {step: step + 1 for step in within}


def test_figures_are_fetched_where_they_are_logged(watch):
    """Those of all steps since the last time, when the next step is under way or the epoch ends."""
    per_epoch = STEPS // EPOCHS
    expected, waiting = {}, []
    for step in range(1, STEPS + 1):
        waiting.append(step)
        ends = step % per_epoch == 0
        if ends or step % LOG_EVERY == 0:
            expected |= dict.fromkeys(waiting, step if ends else step + 1)
            waiting = []
    assert watch.fetched == expected


def test_the_program_talks_to_no_host(watch):
    assert "ENTRY" in watch.text
    for word in ("infeed", "outfeed", "send(", "recv(", "callback"):
        assert word not in watch.text, word


def test_a_watched_step_may_not_be_handed_numpy(single_mesh):
    """The guard above does forbid: what is not on the device yet has to be placed by the pipeline."""
    step = jax.jit(lambda x: x + 1)
    step(jax.numpy.ones(3))
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match=r"[Dd]isallowed host-to-device"):
        step(np.ones(3, np.float32))
