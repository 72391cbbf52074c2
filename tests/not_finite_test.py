"""Loss or gradients that are no longer numbers: the run ends, says where, and keeps what was good."""

from __future__ import annotations

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vixml_jax import cli, data, train, train_step
from vixml_jax.checkpoint import steps_in
from vixml_jax.errors import NotFinite
from vixml_jax.prepare import prepare

BAD = 5  # the second step of the second epoch


@pytest.fixture(autouse=True)
def _quick(one_device):
    """One device is enough."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    prepare(tiny.write_raw(root / "raw", seed=0, images=False), root / "dataset", "tiny")
    return root / "dataset"


def small(dataset, **settings):
    config = tiny.config(dataset)
    config.text.layers = 1
    config.prototype.kind = "none"
    config.loss.name = "info_nce"
    config.update_from_flattened_dict(settings)
    return config


def spoil(monkeypatch, at: int, spoilt: dict[str, float]) -> list[np.ndarray]:
    """Makes some figures of one step not finite, where the step has computed them; returns all rows seen."""
    seen: list[np.ndarray] = []
    compile_step = train_step.compile_step

    def compiled(*args, **options):
        step_fn = compile_step(*args, **options)

        def step(state, frozen, batch):
            seen.append(np.asarray(batch.query_rows))
            state, figures = step_fn(state, frozen, batch)
            return state, {**figures, **spoilt} if len(seen) == at else figures

        return step

    monkeypatch.setattr(train, "compile_step", compiled)
    return seen


@pytest.mark.parametrize(
    ("spoilt", "log_every", "every_steps", "kept"),
    [
        ({"train/loss": jnp.float32("nan")}, 1, 1, 4),
        # Found only when figures are fetched: at the epoch's end, and before anything is saved.
        ({"train/grad_norm": jnp.float32("inf")}, 1000, 0, 3),
        ({"train/grad_norm": jnp.float32("-inf")}, 1000, 2, 4),
    ],
)
def test_a_run_stops_at_the_first_bad_step(
    dataset, tmp_path, monkeypatch, spoilt, log_every, every_steps, kept
):
    settings = {"train.log_every": log_every, "checkpoint.every_steps": every_steps}
    seen = spoil(monkeypatch, BAD, spoilt)
    workdir = tmp_path / "run"
    ((name, value),) = spoilt.items()
    with pytest.raises(NotFinite) as caught:
        train.train(small(dataset, **settings), workdir)
    line = str(caught.value)
    assert f"{name} is {float(value)} at step {BAD}" in line
    assert f"the checkpoint of step {kept} is kept" in line
    assert "optimizer.lr" in line
    assert "another --workdir" in line
    assert "\n" not in line
    assert max(steps_in(workdir / "checkpoints")) == kept

    found = json.loads((workdir / "not_finite.json").read_text())
    assert found["step"] == BAD
    assert found["epoch"] == 1
    assert found["checkpoint"] == kept
    assert found["figures"][name] == repr(float(value))
    assert found["query_rows"] == seen[BAD - 1].tolist()
    loaded = data.load(dataset)
    assert found["query_uids"] == [loaded.train.uids[row] for row in found["query_rows"]]
    targets = loaded.train_targets[np.array(found["query_rows"])].toarray()
    assert all(row[label] for row, label in zip(targets, found["label_ids"], strict=True))
    assert found["label_uids"] == [f"l{label}" for label in found["label_ids"]]
    logged = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(list(record.values())).all() for record in logged)


@pytest.mark.slow
def test_the_same_command_goes_on_from_what_was_kept(dataset, tmp_path, monkeypatch):
    """Where the fault was none of the run's own, such as a machine's memory."""
    spoil(monkeypatch, BAD, {"train/loss": jnp.float32("nan")})
    with pytest.raises(NotFinite):
        train.train(small(dataset), tmp_path / "run")
    monkeypatch.undo()
    assert train.train(small(dataset), tmp_path / "run") == train.train(small(dataset), tmp_path / "whole")


def test_weights_that_really_overflow_end_with_one_line(dataset, tmp_path, capsys):
    """A learning rate beyond reason."""
    config = small(dataset, **{"optimizer.lr": 1e38, "optimizer.head_lr": 1e38})
    job = types.ModuleType("job", "Trains.")
    job.define_flags = lambda: None
    job.main = lambda: train.train(config, tmp_path / "run")
    assert cli.run_job(job, "job", []) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("job: error: train/")
    assert f"{tmp_path / 'run' / 'not_finite.json'} names the queries" in line
    assert (tmp_path / "run" / "not_finite.json").exists()
