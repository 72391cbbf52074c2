"""Disks full or read-only, a clock set back, two runs on one workdir: one line, then on to the same end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fresh
import numpy as np
import pytest
import tiny
from pipeline import (
    Pipeline,
    assert_nothing_is_half_there,
    assert_one_line,
    assert_same,
    run,
    start,
    vixml,
)

SETTINGS = {"text.layers": 1, "train.epochs": 4, "eval.every": 2, "checkpoint.every_steps": 1}
RNG = np.random.default_rng(fresh.seeds(1))


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return tiny.write_raw(tmp_path_factory.mktemp("faults") / "raw", seed=3)


@pytest.mark.parametrize("kib", [1, 10])
def test_a_full_disk_is_one_line_and_leaves_nothing(raw, tmp_path, kib):
    """No file may become larger than a limit: what a full disk looks like to those who may not mount one."""
    command = vixml("prepare", f"--raw={raw}", f"--out={tmp_path / 'dataset'}", "--name=tiny")
    failed = run(["bash", "-c", f'ulimit -f {kib}; exec "$@"', "bash", *command])
    assert_one_line(failed, "file too large")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def mounted(tmp_path) -> Iterator[Callable[..., Path]]:
    """Mounts a memory file system of some size, or mounts it again with other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        how = f"remount,{options}" if os.path.ismount(place) else options
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", how, "tmpfs", place], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.strip()}")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", place], check=True)


@pytest.mark.slow
def test_a_workdir_that_cannot_be_written_to(raw, tmp_path, mounted):
    """What writes there says so in one line; what only reads works."""
    disk = mounted("size=200m")
    pipeline = Pipeline(disk / "root", raw, SETTINGS)
    for stage in ("prepare", "train", "predict"):
        pipeline.finish(stage)
    before = pipeline.predicted.read_bytes()
    mounted("ro")
    for stage in ("train", "index", "predict"):
        assert_one_line(run(pipeline.stages[stage]), "read-only")
    elsewhere = tmp_path / "elsewhere.jsonl"
    command = [*pipeline.stages["predict"][:-1], f"--output={elsewhere}"]
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert elsewhere.read_bytes() == before
    mounted("rw")


@pytest.mark.slow
def test_a_clock_set_back_and_a_second_run(raw, tmp_path):
    """Every file is a year younger than now; and of two runs on one workdir the second is refused."""
    whole, other = (Pipeline(tmp_path / name, raw, SETTINGS) for name in ("whole", "other"))
    for stage in ("prepare", "train"):
        whole.finish(stage)
    other.finish("prepare")
    command = other.stages["train"]
    first = start(command, other.signs["train"])
    second = run(command)
    assert_one_line(second, "another run has owned it since")
    assert f"process {first.pid} on " in second.stderr
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    future = time.time() + 365 * 24 * 3600
    for path in other.root.rglob("*"):
        os.utime(path, (future, future))
    other.finish("train")
    assert_same(whole.run / "embeddings", other.run / "embeddings")
    assert (whole.run / "metrics.json").read_bytes() == (other.run / "metrics.json").read_bytes()


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory) -> Pipeline:
    """A run on a disk with room for it."""
    pipeline = Pipeline(tmp_path_factory.mktemp("whole"), raw, SETTINGS)
    for stage in ("prepare", "train"):
        pipeline.finish(stage)
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize("times", [3])
def test_a_disk_that_fills_up_while_training_runs(raw, whole, mounted, times):
    disk = mounted("size=30m")
    pipeline = Pipeline(disk / "root", raw, SETTINGS)
    pipeline.finish("prepare")
    for _ in range(times):
        process = start(pipeline.stages["train"], pipeline.signs["train"])
        time.sleep(RNG.uniform(0, 0.3))
        with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as ballast:
            while process.poll() is None:
                ballast.write(bytes(4096))
        _, errors = process.communicate(timeout=300)
        assert_one_line(
            subprocess.CompletedProcess([], process.returncode, "", errors), "no space left on device"
        )
        (disk / "ballast").unlink()
        assert_nothing_is_half_there(pipeline.root)
    pipeline.finish("train")
    assert_same(whole.root, pipeline.root)
