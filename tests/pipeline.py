"""The commands in a row, each in a process of its own: run to the end, killed, and their outputs compared."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import launched
import numpy as np
import tensorflow_datasets as tfds
from orbax.checkpoint import v1 as ocp
from PIL import Image

from vixml_jax import checkpoint as checkpoint_lib

# TFDS's notes about a dataset, and its records, whose fields it writes in any order: compared as read.
NOTES = ("dataset_info.json", ".array_record-")
# Names the place; holds times; checkpoints are compared by their arrays.
PASSED_OVER = ("config.py", "events", checkpoint_lib.DIRECTORY, checkpoint_lib.SUMS)
# What differs between two runs of the same: figures of time, and where they lie.
DIFFERS = ("perf/examples_per_s", "milliseconds_per_query", "dataset.dir")


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


def start(arguments: list[str], sign: Sign | None = None) -> subprocess.Popen:
    """Starts a command, and returns when its sign has come, or it has ended."""
    before = sign() if sign else None
    process = subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    while sign and process.poll() is None and sign() == before:
        time.sleep(0.005)
    return process


def killed_after(arguments: list[str], seconds: float, sign: Sign | None = None) -> bool:
    """Starts a command and kills it some time after it has begun; False if it was quicker."""
    process = start(arguments, sign)
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode != 0


def timed(arguments: list[str], sign: Sign) -> tuple[float, float]:
    """Runs a command to its end; the seconds until its sign has come, and from then on."""
    started = time.monotonic()
    process = start(arguments, sign)
    begun = time.monotonic()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return begun - started, time.monotonic() - begun


class Pipeline:
    """The commands from a raw folder to predictions, below one root.

    Attributes:
      stages: name -> command.
      signs: name -> what shows that it has begun to write what the next ones read.
    """

    def __init__(self, root: Path, raw: Path, settings: dict[str, Any]):
        self.root, self.run, self.dataset = root, root / "run", root / "dataset"
        root.mkdir(exist_ok=True)
        self.config = launched.config_file(root / "config.py", self.dataset, 2, settings)
        self.predicted = root / "predicted.jsonl"
        train = vixml("train", f"--config={self.config}", f"--workdir={self.run}")
        self.stages: dict[str, list[str]] = {
            "prepare": vixml("prepare", f"--raw={raw}", f"--out={self.dataset}", "--name=tiny"),
            "train": train,
            "index": index_command(self.run),
            "predict": predict_command(self.run, root),
        }
        self.signs: dict[str, Sign] = {
            "prepare": newest(root, ".dataset.*"),
            "train": newest(self.run, "metrics.jsonl"),
            "index": newest(self.run, "config.json"),
            "predict": newest(root, ".predicted.jsonl.*"),
        }

    def finish(self, stage: str) -> None:
        """Runs a stage to its end."""
        done = run(self.stages[stage])
        assert done.returncode == 0, done.stderr

    def finish_all(self) -> None:
        """Runs every stage to its end."""
        for stage in self.stages:
            self.finish(stage)


def index_command(workdir: Path) -> list[str]:
    return vixml("index", f"--workdir={workdir}", "--kind=exact", "--k=7")


def predict_command(workdir: Path, root: Path) -> list[str]:
    """Predicts labels of queries that are written below `root`."""
    queries = root / "queries.jsonl"
    queries.write_text("".join(json.dumps({"title": f"lamp number {i}"}) + "\n" for i in range(40)))
    return vixml(
        "predict", f"--workdir={workdir}", f"--input={queries}", f"--output={root / 'predicted.jsonl'}"
    )


def give_every_picture_its_own_content(raw: Path, rng: np.random.Generator) -> None:
    """So that the image bank has as many rows as there are pictures."""
    for path in sorted((raw / "images").iterdir()):
        pixels = np.asarray(Image.open(path), np.int64)
        noisy = np.clip(pixels + rng.integers(-9, 10, pixels.shape), 0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(path)


def content(path: Path) -> object:
    """The bytes of a file; of those with times in them, what they hold but these."""
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as packed:
            return {member: packed.read(member) for member in packed.namelist()}
    if path.name in ("metrics.jsonl", "index.json", "config.json"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return [_without_what_differs(json.loads(line)) for line in lines]
    return path.read_bytes()


def _without_what_differs(value: Any, name: str = "") -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _without_what_differs(item, f"{name}{key}.") for key, item in value.items()}
    return {key: item for key, item in inner.items() if not f"{name}{key}".endswith(DIFFERS)}


def contents(root: Path) -> dict[str, object]:
    """Every file that counts, below a directory, or the file itself."""
    if root.is_file():
        return {".": content(root)}
    found: dict[str, object] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        inside = path.relative_to(root)
        if any(note in path.name for note in NOTES) or any(
            part.startswith(".") or part in PASSED_OVER for part in inside.parts
        ):
            continue
        found[inside.as_posix()] = content(path)
    for notes in root.rglob("dataset_info.json"):
        builder: Any = tfds.builder_from_directory(str(notes.parent))
        for split in builder.info.splits:
            found[split] = [repr(sorted(record.items())) for record in builder.as_data_source(split)]
    for checkpoints in root.rglob(checkpoint_lib.DIRECTORY):
        for step in checkpoint_lib.steps_in(checkpoints):
            found[f"checkpoint of step {step}"] = arrays(checkpoints / str(step))
    return found


def arrays(checkpoint: Path) -> dict[str, bytes]:
    """Everything in a checkpoint: Orbax draws the names of its files."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sharding info not provided")
        leaves, _ = jax.tree.flatten_with_path(ocp.load_checkpointables(checkpoint))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def assert_same(one: Path, other: Path) -> None:
    left, right = contents(one), contents(other)
    assert left.keys() == right.keys()
    differing = [name for name in left if left[name] != right[name]]
    assert not differing, differing


def assert_one_line(failed: subprocess.CompletedProcess, problem: str) -> None:
    assert failed.returncode == 2, failed.stderr
    assert "Traceback" not in failed.stderr
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("vixml: error: ")
    assert problem in last.lower(), failed.stderr


def assert_nothing_is_half_there(root: Path) -> None:
    """Whatever has its final name can be read to its end, but for what is appended to."""
    for path in root.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if hidden or not path.is_file():
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".npy":
            np.load(path, allow_pickle=False)
        elif path.suffix == ".npz":
            with zipfile.ZipFile(path) as packed:
                assert packed.testzip() is None, path
        elif path.name == "predicted.jsonl":
            assert [json.loads(line)["uid"] for line in path.read_text().splitlines()]
