"""How long a user waits: commands that need no JAX, in processes of their own, and the first training step.

  python benchmarks/start_up.py
  python benchmarks/start_up.py --json=start_up.json

`help` is `vixml --help`; `metrics` scores a small prediction file, beginning to end; `python` is an
interpreter that does nothing, for comparison. They run in turn, --rounds times; medians count. `first_step`
is what `train_step.py --ours_only` needs from the start of the process to its end, two steps of a tiny run
with nothing compiled before; `first_step_again` the same with JAX's cache of compiled programs filled.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import scipy.sparse
import timing

from vixml_jax.data import predictions_file, sparse_text


def main() -> None:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="JSON file for the figures")
    parser.add_argument("--quick", action="store_true", help="one round and no training step")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        timing.report(
            measure(Path(folder), 1 if options.quick else options.rounds, options.quick), options.json
        )


def measure(folder: Path, rounds: int, quick: bool) -> dict[str, float]:
    """Returns the figures."""
    rng = np.random.default_rng(0)
    truth = scipy.sparse.random(100, 50, 0.1, format="csr", dtype=np.float32, rng=rng)
    truth.data[:] = 1
    predictions = scipy.sparse.random(100, 50, 0.4, format="csr", dtype=np.float32, rng=rng)
    sparse_text.write_sparse_text(folder / "truth.txt", truth)
    predictions_file.write_npz(folder / "predictions.npz", predictions)
    vixml = ["-m", "vixml_jax"]
    files = [f"--predictions={folder / 'predictions.npz'}", f"--truth={folder / 'truth.txt'}"]
    commands = {"python": ["-c", ""], "help": [*vixml, "--help"], "metrics": [*vixml, "metrics", *files]}
    call(commands["metrics"], {})  # byte code is compiled once
    seconds = timing.in_turn(
        {name: lambda arguments=arguments: call(arguments, {}) for name, arguments in commands.items()},
        rounds,
    )
    figures = {f"{name}_s": value for name, value in timing.medians(seconds).items()}
    if not quick:
        step = [str(Path(__file__).with_name("train_step.py")), "--quick", "--ours_only"]
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
                 "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # fmt: skip
        for name in ("first_step_s", "first_step_again_s"):
            figures[name] = timing.timed(lambda: call(step, cache))[0]
    return figures


def call(arguments: list[str], environment: dict[str, str]) -> None:
    """Runs a process to its end."""
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")


if __name__ == "__main__":
    main()
