"""A thousand epochs in one process: memory stays flat, and nothing is compiled again."""

from __future__ import annotations

import collections
import ctypes
import gc
import os
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from vixml_jax import demo
from vixml_jax import train as train_lib

EPOCHS = 1000
# By then the first evaluation has been, and what else is compiled once.
SETTLED = 200
# What may be gained over all epochs in which nothing was compiled; a program takes some 25.
GROWTH_MIB = 8
COMPILED = "/jax/core/compile/backend_compile_duration"


MALLINFO = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class Allocations(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in MALLINFO)


def in_use_mib() -> float:
    """What is allocated and not freed: of the process's memory without what malloc keeps in reserve."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Allocations
    found = mallinfo2()
    return (found.uordblks + found.hblkhd) / 2**20


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
    seen = collections.defaultdict(list)
    programs = collections.Counter()

    def count(event: str, seconds: float, fun_name: str = "", **_: str) -> None:
        if event == COMPILED:
            programs["step" if "step" in fun_name else "other"] += 1

    def end_epoch(*what):
        gc.collect()
        seen["in use"].append(in_use_mib())
        seen["resident"].append(resident_mib())
        seen["threads"].append(threading.active_count())
        seen["open files"].append(len(os.listdir("/proc/self/fd")))
        seen["steps compiled"].append(programs["step"])
        seen["others compiled"].append(programs["other"])
        return ended(*what)

    ended = train_lib.end_epoch
    monkeypatch.setattr(train_lib, "end_epoch", end_epoch)
    jax.monitoring.register_event_duration_secs_listener(count)
    train_lib.train(config, tmp_path / "run")

    for name, values in seen.items():
        assert len(values) == EPOCHS
        print(f"{name}: {values[SETTLED]:.1f} after epoch {SETTLED}, {values[-1]:.1f} after the last")
    # A batch of another number of rows is compiled when it first comes, which may be late.
    compiled = np.diff(seen["steps compiled"])[SETTLED:] + np.diff(seen["others compiled"])[SETTLED:]
    quiet = (compiled == 0) & np.append(True, compiled[:-1] == 0)
    growth = np.diff(seen["in use"])[SETTLED:][quiet].sum()
    print(f"in use: {growth:+.1f} MiB in {quiet.sum()} epochs without a program")
    assert growth < GROWTH_MIB
    assert quiet.sum() > 0.9 * (EPOCHS - SETTLED - 1)
    for name in ("threads", "open files"):
        assert max(seen[name][-100:]) < max(seen[name][SETTLED : SETTLED + 100]) + 8, name
    assert 1 <= seen["others compiled"][SETTLED] == seen["others compiled"][-1]
    assert 1 <= seen["steps compiled"][-1] <= seen["steps compiled"][SETTLED] + 3
