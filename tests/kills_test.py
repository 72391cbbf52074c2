"""Every command killed at random moments and run again: nothing half-written is read, the end is the same."""

from __future__ import annotations

import collections
import os
import shutil
import time

import fresh
import numpy as np
import pipeline as commands
import pytest
import tiny
from pipeline import Pipeline, assert_nothing_is_half_there, assert_same, killed_after, newest, run

from vixml_jax.prepare import prepare

SETTINGS = {
    "text.layers": 1,
    "vision.batch_size": 8,
    "train.epochs": 4,
    "eval.every": 2,
    "checkpoint.every_steps": 1,
    "retrieval.query_weight": 0.2,
}
KILLS, IN_A_ROW = 50, 2
RNG = np.random.default_rng(fresh.seeds(1))


def test_preparing_is_killed_and_goes_on(tmp_path):
    raw = tiny.write_raw(tmp_path / "raw", seed=3)
    prepare(raw, tmp_path / "whole", "tiny")
    command = commands.vixml("prepare", f"--raw={raw}", f"--out={tmp_path / 'killed'}", "--name=tiny")
    # From the moment that something is written, which is less than a second before the end.
    for _ in range(2):
        killed_after(command, RNG.uniform(0, 0.3), newest(tmp_path, ".killed.*"))
    assert run(command).returncode == 0
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_building_an_index_and_predicting_are_killed_and_go_on(tiny_run, tmp_path):
    roots = {}
    for name in ("whole", "killed"):
        roots[name] = root = tmp_path / name
        shutil.copytree(tiny_run / "run", root / "run")
        index, predict = commands.index_command(root / "run"), commands.predict_command(root / "run", root)
        for command, sign in (
            (index, newest(root / "run", "config.json")),
            (predict, newest(root, ".predicted.jsonl.*")),
        ):
            if name == "killed":
                killed_after(command, RNG.uniform(0, 0.1), sign)
                assert_nothing_is_half_there(root)
            done = run(command)
            assert done.returncode == 0, done.stderr
    assert (roots["whole"] / "predicted.jsonl").read_text().count("\n") == 40
    assert_same(roots["whole"], roots["killed"])


class Moments:
    """When the stages of a run that nobody kills begin to write, and end."""

    def __init__(self, whole: Pipeline):
        self._seconds = {
            stage: commands.timed(whole.stages[stage], whole.signs[stage]) for stage in whole.stages
        }
        bank = [path.stat().st_mtime for path in whole.dataset.glob("derived/images-*/*")]
        self._bank = max(bank) - min(bank)

    def draw(self, pipeline: Pipeline, stage: str) -> tuple[list[str], float, commands.Sign | None]:
        """A command, how long it may run, and from when on: its start, or when it begins to write."""
        if stage == "bank":
            sign = newest(pipeline.dataset, "derived/images-*/*")
            return pipeline.stages["train"], RNG.uniform(0, self._bank), sign
        before, after = self._seconds[stage]
        if RNG.random() < 0.5:
            return pipeline.stages[stage], RNG.uniform(0, before + after), None
        return pipeline.stages[stage], RNG.uniform(0, after), pipeline.signs[stage]


@pytest.mark.slow
def test_fifty_kills_over_all_commands(tmp_path, monkeypatch):
    # Of its own, since a kill may leave half a program there.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.fspath(tmp_path / "xla"))
    raw = tiny.write_raw(tmp_path / "raw", seed=3)
    commands.give_every_picture_its_own_content(raw, RNG)
    Pipeline(tmp_path / "compiled", raw, SETTINGS).finish_all()
    whole = Pipeline(tmp_path / "whole", raw, SETTINGS)
    moments, started = Moments(whole), time.monotonic()
    kills = collections.Counter()
    while kills.total() < KILLS:
        pipeline = Pipeline(tmp_path / "killed", raw, SETTINGS)
        for stage in ("prepare", "bank", "train", "index", "predict"):
            for _ in range(IN_A_ROW):
                kills[stage] += killed_after(*moments.draw(pipeline, stage))
                assert_nothing_is_half_there(pipeline.root)
            if stage != "bank":
                pipeline.finish(stage)
        assert_same(whole.root, pipeline.root)
        print(f"{dict(kills)}, {time.monotonic() - started:.0f} s", flush=True)
        shutil.rmtree(pipeline.root)
    assert min(kills.values()) >= 3
