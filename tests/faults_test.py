"""Processes killed, disks full or read-only, a clock set back: the next run goes on to the same end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import launched
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny

from vixml_jax.prepare import prepare

SETTINGS = {"text.layers": 1, "train.epochs": 4, "eval.every": 2, "checkpoint.every_steps": 1}
# TFDS's notes about a dataset, and its records, whose fields it writes in any order: compared as read.
NOTES = ("dataset_info.json", ".array_record-")


def vixml(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "vixml_jax", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**launched.environment(), "JAX_PLATFORMS": "cpu"}


def run(arguments: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments, env=environment(), capture_output=True, text=True, check=False, timeout=900, **options
    )


# Something that changes when a command has begun.
Sign = Callable[[], int]


def newest(root: Path, pattern: str) -> Sign:
    """The time of the newest of some files, which an earlier run may have left as well."""

    def look() -> int:
        with contextlib.suppress(FileNotFoundError):
            return max((path.stat().st_mtime_ns for path in root.glob(pattern)), default=0)
        return 0

    return look


def killed_after(arguments: list[str], sign: Sign, seconds: float) -> bool:
    """Starts a command and kills it some time after it has begun; False if it was quicker."""
    before = sign()
    process = subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and sign() == before:
        time.sleep(0.005)
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode != 0


def content(path: Path) -> object:
    """The bytes of a file; of archives, which note times, those of what they hold."""
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as packed:
            return {member: packed.read(member) for member in packed.namelist()}
    return path.read_bytes()


def contents(root: Path) -> dict[str, object]:
    """Every file that counts, below a directory, or the file itself."""
    paths = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    found: dict[str, object] = {
        path.relative_to(root).as_posix(): content(path)
        for path in paths
        if not any(note in path.name for note in NOTES)
    }
    if (root / "dataset_info.json").is_file():
        builder: Any = tfds.builder_from_directory(str(root))
        for split in builder.info.splits:
            found[split] = [repr(sorted(record.items())) for record in builder.as_data_source(split)]
    return found


def assert_same(one: Path, other: Path) -> None:
    left, right = contents(one), contents(other)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == []


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return tiny.write_raw(tmp_path_factory.mktemp("faults") / "raw", seed=3)


def test_preparing_is_killed_and_goes_on(raw, tmp_path):
    (seed,) = np.random.SeedSequence().generate_state(1).tolist()
    print("seed", seed)
    rng = np.random.default_rng(seed)
    prepare(raw, tmp_path / "whole", "tiny")
    command = vixml("prepare", f"--raw={raw}", f"--out={tmp_path / 'killed'}", "--name=tiny")
    # From the moment that something is written, which is less than a second before the end.
    for _ in range(2):
        killed_after(command, newest(tmp_path, ".killed.*"), rng.uniform(0, 0.3))
    assert run(command).returncode == 0
    assert_same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("kib", [1, 10])
def test_a_full_disk_is_one_line_and_leaves_nothing(raw, tmp_path, kib):
    """No file may become larger than a limit: what a full disk looks like to those who may not mount one."""
    command = vixml("prepare", f"--raw={raw}", f"--out={tmp_path / 'dataset'}", "--name=tiny")
    failed = run(["bash", "-c", f'ulimit -f {kib}; exec "$@"', "bash", *command])
    assert_one_line(failed, "file too large")
    assert list(tmp_path.iterdir()) == []


def assert_one_line(failed: subprocess.CompletedProcess, problem: str) -> None:
    assert failed.returncode == 2, failed.stderr
    assert "Traceback" not in failed.stderr
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("vixml: error: ")
    assert problem in last.lower(), failed.stderr


class Pipeline:
    """The commands from a raw folder to predictions, below one root."""

    def __init__(self, root: Path, raw: Path):
        self.root, self.run, self.dataset = root, root / "run", root / "dataset"
        root.mkdir(exist_ok=True)
        self.config = launched.config_file(root / "config.py", self.dataset, 2, SETTINGS)
        queries = root / "queries.jsonl"
        queries.write_text("".join(json.dumps({"title": f"lamp number {i}"}) + "\n" for i in range(40)))
        self.predicted = root / "predicted.jsonl"
        predict = vixml("predict", f"--workdir={self.run}", f"--input={queries}")
        self.stages: dict[str, list[str]] = {
            "prepare": vixml("prepare", f"--raw={raw}", f"--out={self.dataset}", "--name=tiny"),
            "train": vixml("train", f"--config={self.config}", f"--workdir={self.run}"),
            "index": vixml("index", f"--workdir={self.run}", "--kind=exact", "--k=7"),
            "predict": [*predict, f"--output={self.predicted}"],
        }

    def finish(self, stage: str) -> None:
        """Runs a stage to its end."""
        done = run(self.stages[stage])
        assert done.returncode == 0, done.stderr


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
    pipeline = Pipeline(disk / "root", raw)
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
    whole, other = Pipeline(tmp_path / "whole", raw), Pipeline(tmp_path / "other", raw)
    for stage in ("prepare", "train"):
        whole.finish(stage)
    other.finish("prepare")
    command, sign = other.stages["train"], newest(other.run, "metrics.jsonl")
    before = sign()
    first = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True)
    while first.poll() is None and sign() == before:
        time.sleep(0.01)
    second = run(command)
    assert_one_line(second, "another run has owned it since")
    assert f"process {first.pid} on " in second.stderr
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    future = time.time() + 365 * 24 * 3600
    for path in other.root.rglob("*"):
        os.utime(path, (future, future))
    other.finish("train")
    assert_same(whole.run / "embeddings", other.run / "embeddings")
    assert (whole.run / "metrics.json").read_bytes() == (other.run / "metrics.json").read_bytes()
