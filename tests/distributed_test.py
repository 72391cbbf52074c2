"""Two processes as one run: what they agree on, and that they compute what one process does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import launched
import numpy as np
import pytest
import tiny
from launched import curve

from vixml_jax import distributed
from vixml_jax.errors import UserError
from vixml_jax.prepare import prepare

AGREE = """
    import sys
    import numpy as np
    from vixml_jax import distributed, files, progress, sharding
    from vixml_jax.errors import UserError
    from vixml_jax.train_state import row_table

    distributed.initialize()
    import jax
    me = jax.process_index()
    assert jax.process_count() == 2 and distributed.is_lead() == (me == 0)

    # What the lead does is done once, and known to all.
    calls = []
    result = distributed.on_lead(lambda: calls.append(me) or {"text": "é" * 3000, "number": 1.5})
    assert result == {"text": "é" * 3000, "number": 1.5} and calls == [0] * (me == 0)
    seen = distributed.lead_first(lambda: files.write_json(sys.argv[1], "lead") if me == 0 else
                                  files.read_json(sys.argv[1]))
    assert seen == (None if me == 0 else "lead")

    # A mistake is everybody's, and so is a failure.
    def fail(error):
        raise error
    for error, expected in ((UserError("wrong", file="f"), UserError), (OSError("disk"), RuntimeError)):
        try:
            distributed.on_lead(lambda: fail(error))
        except Exception as caught:
            assert str(error) in str(caught)
            assert isinstance(caught, type(error) if me == 0 else expected), caught
        else:
            raise AssertionError("no error")

    # Rows of tables, read by who wants them.
    mesh = sharding.make_mesh(fsdp=2)
    values = np.arange(1500 * 3, dtype=np.float32).reshape(1500, 3)
    table = row_table(values, mesh)
    assert sharding.local_row_shards(mesh) == ((0, 1), (2, 3))[me]
    sharding.FETCHED_BYTES = 1000
    np.testing.assert_array_equal(sharding.fetch(table, 1500), values)
    wanted = sharding.fetch(table, 1500, here=me == 0)
    assert wanted.shape == ((1500, 3), (0, 3))[me]
    np.testing.assert_array_equal(sharding.everywhere(table)[:1500], values)
    own = np.split(np.pad(values, [(0, 548), (0, 0)]), 2)[me]
    np.testing.assert_array_equal(sharding.everywhere(sharding.from_local_rows(own, mesh))[:1500], values)
    distributed.wait_for_all()
    print("agreed", me)
"""


def both(code: str, *arguments: str, devices: int) -> list[str]:
    """Runs a program in two processes that know of each other; returns what they print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), *arguments],
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "VIXML_COORDINATOR": f"127.0.0.1:{port}",
                "VIXML_PROCESSES": "2",
                "VIXML_PROCESS": str(number),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in (0, 1)
    ]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    return printed


def test_two_processes_agree(tmp_path):
    printed = both(AGREE, str(tmp_path / "file.json"), devices=2)
    for number, text in enumerate(printed):
        assert f"agreed {number}" in text


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    prepare(tiny.write_raw(root / "raw", seed=0), root / "dataset", "tiny")
    return root / "dataset"


def assert_same_run(workdir: Path, expected: Path) -> None:
    """Loss curves agree within what rounding in another order does, figures are equal."""
    assert curve(workdir).keys() == curve(expected).keys()
    np.testing.assert_allclose(list(curve(workdir).values()), list(curve(expected).values()), rtol=1e-5)
    figures, wanted = (json.loads((path / "metrics.json").read_text()) for path in (workdir, expected))
    assert figures == pytest.approx(wanted, abs=1e-9)


def test_two_processes_train_as_one(dataset, tmp_path):
    """The quick one: a small model, one epoch, evaluation."""
    settings = {
        "text.layers": 1,
        "prototype.kind": "none",
        "loss.name": "info_nce",
        "train.epochs": 1,
        "checkpoint.every_steps": 0,
    }
    config = launched.config_file(tmp_path / "config.py", dataset, 0, settings)
    for processes in (1, 2):
        done = launched.train(config, tmp_path / f"{processes}x1", processes)
        assert not done.returncode, done.stderr
    assert_same_run(tmp_path / "2x1", tmp_path / "1x1")
    # Written once, and owned by nobody any more.
    names = {path.name for path in (tmp_path / "2x1").iterdir()}
    assert {"metrics.json", "predictions.npz", "checkpoints", "index"} <= names
    assert "owner.json" not in names


@pytest.mark.slow
def test_every_number_of_processes_and_devices_gives_the_same_run(dataset, tmp_path):
    """Twenty-one steps with pictures, prototypes, dropout, clusters and evaluations between epochs."""
    settings = {"train.epochs": 7, "eval.every": 3}
    config = launched.config_file(tmp_path / "config.py", dataset, 2, settings)
    runs = [
        (1, 1, "1,1,1"),
        (1, 8, "8,1,1"),
        (1, 8, "1,8,1"),
        (1, 8, "2,2,2"),
        (2, 4, "2,2,2"),
        (2, 4, "8,1,1"),
    ]
    for processes, devices, mesh in runs:
        workdir = tmp_path / f"{processes}-{mesh}"
        done = launched.train(config, workdir, processes, devices, mesh)
        assert not done.returncode, done.stderr
        assert_same_run(workdir, tmp_path / "1-1,1,1")


def test_a_mistake_ends_all_processes_with_one_line(dataset, tmp_path):
    config = launched.config_file(tmp_path / "config.py", tmp_path / "nowhere", 0, {})
    done = launched.train(config, tmp_path / "run", 2)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 2
    assert all("nowhere" in line for line in errors)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("wrong", [{}, {"VIXML_PROCESSES": "two"}, {"VIXML_PROCESSES": "2"}], ids=str)
def test_a_launcher_that_says_half_is_one_line(monkeypatch, wrong):
    for name in ("VIXML_PROCESSES", "VIXML_PROCESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"VIXML_COORDINATOR": "127.0.0.1:1", **wrong}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"VIXML_PROCESS(ES)?='(two)?' beside VIXML_COORDINATOR; set it"):
        distributed.initialize()


def test_no_processes_to_join_is_one_line(monkeypatch):
    def alone():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.delenv("VIXML_COORDINATOR", raising=False)
    monkeypatch.setenv("VIXML_DISTRIBUTED", "1")
    monkeypatch.setattr(jax.distributed, "initialize", alone)
    with pytest.raises(UserError, match="coordinator_address should be defined"):
        distributed.initialize()
