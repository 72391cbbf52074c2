"""A run that is killed again and again, and continued on other devices, ends as one that was left alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import launched
import numpy as np
import pytest
import tiny
from launched import curve

from vixml_jax.checkpoint import steps_in
from vixml_jax.prepare import prepare

SETTINGS = {"train.epochs": 6, "eval.every": 2, "checkpoint.every_steps": 1, "checkpoint.keep_every": 6}
# Processes, devices of each, and the mesh.
PLACES = [(1, 1, "1,1,1"), (2, 1, "2,1,1"), (1, 8, "2,2,2"), (1, 2, "1,2,1"), (2, 4, "1,8,1")]
KILLS = 10


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    prepare(tiny.write_raw(root / "raw", seed=0), root / "dataset", "tiny")
    return launched.config_file(root / "config.py", root / "dataset", 2, SETTINGS)


def start(*what, **where) -> subprocess.Popen:
    return subprocess.Popen(
        launched.command(*what, **where),
        env=launched.environment(),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def last_step(workdir: Path) -> int:
    """The last step that is logged; the file may be written to just now."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return max(map(int, re.findall(r'^{"step": (\d+),.*"train/loss"', text, re.MULTILINE)), default=0)


def trainers(launcher: int) -> list[int]:
    """The processes that a launch script has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = (stat.parent / "cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        if parent == launcher and b"vixml_jax" in command:
            found.append(int(stat.parent.name))
    return sorted(found)


def stop(run: subprocess.Popen, how: str) -> None:
    if how == "SIGTERM":
        run.send_signal(signal.SIGTERM)
    elif how == "one of them":
        os.kill(trainers(run.pid)[-1], signal.SIGKILL)
    else:
        os.killpg(run.pid, signal.SIGKILL)


@pytest.mark.slow
def test_killed_at_random_moments_on_other_devices_each_time(config, tmp_path):
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    rng = np.random.default_rng(seed)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    printed = start(config, whole, *PLACES[0]).communicate(timeout=1200)[0]
    assert (whole / "metrics.json").exists(), printed

    finished_epochs = 0
    for number in range(KILLS):
        run = start(config, killed, *PLACES[number % len(PLACES)])
        begun = last_step(killed)
        while run.poll() is None and last_step(killed) <= begun:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 2))
        how = rng.choice(["SIGTERM", "SIGKILL", "one of them"])
        if run.poll() is None:
            stop(run, how)
        printed = run.communicate(timeout=1200)[0]
        print(number, how, run.returncode, last_step(killed))
        if run.returncode == 0:
            break  # it was quicker
        if how == "SIGTERM":
            assert run.returncode in (75, 0), printed
        # Nothing of a finished epoch is lost.
        steps = steps_in(killed / "checkpoints")
        assert max(steps, default=0) // 3 >= finished_epochs
        finished_epochs = max(steps) // 3
    printed = start(config, killed, *PLACES[0]).communicate(timeout=1200)[0]
    assert (killed / "metrics.json").exists(), printed
    figures, expected = (json.loads((path / "metrics.json").read_text()) for path in (killed, whole))
    assert figures == pytest.approx(expected, abs=1e-9)
    assert curve(killed).keys() == curve(whole).keys()
    np.testing.assert_allclose(list(curve(killed).values()), list(curve(whole).values()), rtol=1e-4)


def test_sigterm_saves_and_ends(tmp_path):
    """In the middle of an epoch; what is saved is the step that was the last."""
    prepare(tiny.write_raw(tmp_path / "raw", seed=0), tmp_path / "dataset", "tiny")
    settings = {
        "text.layers": 1,
        "prototype.kind": "none",
        "loss.name": "info_nce",
        "train.epochs": 1000,
        "train.batch_size": 8,
        "checkpoint.every_steps": 0,
    }
    config = launched.config_file(tmp_path / "config.py", tmp_path / "dataset", 0, settings)
    workdir = tmp_path / "run"
    run = start(config, workdir)
    while run.poll() is None and last_step(workdir) < 14:  # twelve an epoch
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    printed = run.communicate(timeout=300)[0]
    assert run.returncode == 75, printed
    assert "stopped by SIGTERM" in printed
    assert "Traceback" not in printed
    assert max(steps_in(workdir / "checkpoints")) == last_step(workdir)
    assert not (workdir / "owner.json").exists()
