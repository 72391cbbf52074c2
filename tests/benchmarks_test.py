"""The benchmarks run, at a size of seconds, and say what they compared; speed is no test's matter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIGURES = {
    "start_up": ["help_s", "metrics_s"],
    "retrieval": ["scann_over_exact", "scann_recall", "exact_single_p99_ms"],
    "input_pipeline": ["padding", "pipeline_over_step", "shapes"],
    "encode": ["speedup", "speedup_over_sorted"],
    "train_step": ["speedup", "ours_mfu", "last_loss_ours", "last_loss_peer"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_quick_run_writes_its_figures(name, tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--quick", f"--json={out}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)  # one device, as a user has
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr
    figures = json.loads(out.read_text())
    assert {"machine", "cores", "date", *FIGURES[name]} <= figures.keys()
    assert all(figures[figure] >= 0 for figure in FIGURES[name])
