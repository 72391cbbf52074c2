"""The benchmarks run, at a size of seconds, and say what they compared; speed is no test's matter."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from vixml_jax import data
from vixml_jax.prepare import prepare

ROOT = Path(__file__).parent.parent
FIGURES = {
    "start_up": ["help_s", "metrics_s"],
    "retrieval": ["scann_over_exact", "scann_recall", "exact_single_p99_ms"],
    "input_pipeline": ["padding", "pipeline_over_step", "shapes"],
    "encode": ["speedup", "speedup_over_sorted"],
    "train_step": ["speedup", "ours_mfu", "last_loss_ours", "last_loss_peer"],
}


def run(name: str, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)  # one device, as a user has
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr


@pytest.mark.slow
def test_new_labels_are_taken_out_and_come_back(tmp_path):
    prepare(tiny.write_raw(tmp_path / "raw", seed=0, images=False), tmp_path / "dataset", "tiny")
    out = tmp_path / "out"
    options = [f"--dataset={tmp_path / 'dataset'}", f"--out={out}", f"--json={tmp_path / 'figures.json'}"]
    run("new_labels", *options, "--", f"--config={ROOT / 'configs' / 'own.py'}:smoke")
    figures = json.loads((tmp_path / "figures.json").read_text())
    added = [json.loads(line) for line in (out / "new_labels.jsonl").read_text().splitlines()]
    assert figures["new_labels"] == len(added) == 3
    kept = data.load(out / "dataset")
    assert len(kept.labels) == 27
    assert not {label["title"] for label in added} & set(kept.labels.titles)
    assert figures["new_ours_R@10"] == figures["new_tfidf_R@10"] == 100  # of three labels
    # Each query's labels hold its words "lamp", "red lamp": TF-IDF finds them among the first 10 of 30.
    assert figures["all_tfidf_R@10"] == 100
    assert 0 < figures["all_ours_R@100"] <= 100


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_quick_run_writes_its_figures(name, tmp_path):
    out = tmp_path / "figures.json"
    run(name, "--quick", f"--json={out}")
    figures = json.loads(out.read_text())
    assert {"machine", "cores", "date", *FIGURES[name]} <= figures.keys()
    assert all(figures[figure] >= 0 for figure in FIGURES[name])


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark's script."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> Any:
        monkeypatch.delitem(sys.modules, name, raising=False)
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_why_a_measured_process_failed_is_said(load):
    with pytest.raises(SystemExit, match="no_module_of_this_name"):
        load("start_up").call(["-m", "no_module_of_this_name"], {})


def test_opening_an_index_is_not_taken_for_building_it(load, tmp_path):
    """A run that is killed after its index is kept, and before it has written what building it took."""
    retrieval, built = load("retrieval"), []

    def build(file: Path) -> str:
        if not file.exists():
            built.append(file)
            file.write_text("index")
        return file.read_text()

    figures = {}
    retrieval.built("hnsw", tmp_path, figures, build)
    retrieval.built("hnsw", tmp_path, figures, build)
    assert len(built) == 1
    (tmp_path / "hnsw.json").unlink()
    retrieval.built("hnsw", tmp_path, figures, build)
    assert len(built) == 2


def test_the_embeddings_of_a_run_are_searched(load, tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "embeddings"
    folder.mkdir()
    labels, queries = (rng.normal(size=(count, 4)).astype(np.float32) for count in (9, 7))
    np.save(folder / "labels.npy", labels)
    np.save(folder / "test.npy", queries)
    options = argparse.Namespace(workdir=str(tmp_path), queries=1000, keep=None)
    found, both = load("retrieval").vectors(options, None)
    np.testing.assert_array_equal(found, labels)
    assert sorted(map(tuple, both)) == sorted(map(tuple, queries))
    assert (options.labels, options.dim, options.queries) == (9, 4, 3)


def test_indexes_of_drawn_vectors_are_not_taken_for_those_of_a_run(load, tmp_path, monkeypatch, capsys):
    arguments = [f"--workdir={tmp_path}", f"--keep={tmp_path / 'kept'}"]
    monkeypatch.setattr(sys, "argv", ["retrieval.py", *arguments])
    with pytest.raises(SystemExit):
        load("retrieval").main()
    assert "--keep is for drawn vectors" in capsys.readouterr().err
