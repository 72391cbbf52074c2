"""A thousand epochs in one process: memory stays flat, and nothing is compiled again."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from vixml_jax import demo
from vixml_jax import train as train_lib

EPOCHS = 1000
# Between the means of epochs 100-200 and 900-1000.
GROWTH_MIB = 16
COMPILED = "/jax/core/compile/backend_compile_duration"


def resident_mib() -> float:
    """What this process holds of the machine's memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
def test_a_thousand_epochs_in_one_process(one_device, tmp_path, monkeypatch):
    """The demo, shrunk; each epoch clusters, refreshes centroids and saves a checkpoint."""
    config = demo.get_config(images=1, smoke=True)
    config.dataset.dir = str(tmp_path / "dataset")
    config.text.layers = 1
    config.train.epochs = EPOCHS
    config.eval.every = 100
    resident, compiled, programs, step_sizes = [], [], 0, []

    def count(event: str, seconds: float, **_: str) -> None:
        nonlocal programs
        programs += event == COMPILED

    def end_epoch(*what):
        resident.append(resident_mib())
        compiled.append(programs)
        step_sizes.append(steps[0]._cache_size())
        return ended(*what)

    def compile_step(*what):
        steps.append(made(*what))
        return steps[-1]

    steps, ended, made = [], train_lib.end_epoch, train_lib.compile_step
    monkeypatch.setattr(train_lib, "end_epoch", end_epoch)
    monkeypatch.setattr(train_lib, "compile_step", compile_step)
    jax.monitoring.register_event_duration_secs_listener(count)
    train_lib.train(config, tmp_path / "run")

    assert len(resident) == EPOCHS
    before, after = np.mean(resident[100:200]), np.mean(resident[900:])
    print(
        f"resident MiB: {before:.1f} in epochs 100-200, {after:.1f} in 900-1000, at most "
        f"{max(resident):.1f}; programs: {compiled[100]} by epoch 100, {compiled[-1]} by the last"
    )
    assert after - before < GROWTH_MIB
    assert step_sizes == [1] * EPOCHS
    assert compiled[0] > 0
    assert compiled[-1] == compiled[100]
