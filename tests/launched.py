"""Runs by the launch script: several processes on this machine, over fake CPU devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
LOCAL = TESTS.parent / "launch" / "local.sh"


def config_file(path: Path, dataset: Path, images: int, settings: dict) -> Path:
    """A config file of the tiny config with some settings changed, for the command line."""
    path.write_text(
        f"import sys\nsys.path.insert(0, {os.fspath(TESTS)!r})\nfrom pathlib import Path\nimport tiny\n"
        f"def get_config(arg=''):\n"
        f"    config = tiny.config(Path({os.fspath(dataset)!r}), images={images})\n"
        f"    config.update_from_flattened_dict({settings!r})\n"
        f"    return config\n"
    )
    return path


def command(
    config: Path, workdir: Path, processes: int = 1, devices: int = 1, mesh: str = "-1,1,1"
) -> list[str]:
    """Trains by the launch script.

    Args:
      config: what `config_file` has written.
      workdir: of the run.
      processes: how many.
      devices: of each.
      mesh: sizes of data, fsdp, tensor.
    """
    sizes = zip(("data", "fsdp", "tensor"), mesh.split(","), strict=True)
    return [
        *(os.fspath(LOCAL), f"--processes={processes}", f"--cpu-devices={devices}", "--"),
        *("train", f"--config={config}", f"--workdir={workdir}"),
        *(f"--config.mesh.{axis}={size}" for axis, size in sizes),
    ]


def environment() -> dict[str, str]:
    """Of `command`."""
    return {
        **os.environ,
        "PYTHON": sys.executable,
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }


def train(*what, **where) -> subprocess.CompletedProcess:
    """Runs `command` to its end."""
    return subprocess.run(
        command(*what, **where), env=environment(), capture_output=True, text=True, check=False
    )


def curve(workdir: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}
