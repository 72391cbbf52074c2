"""Tuning retrieval-augmented inference: what it measures, what it chooses, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import tiny

from vixml_jax import cli, data, retrieval, tune
from vixml_jax import config as config_lib
from vixml_jax.train import train

# ml_collections loads config files in a way that Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(autouse=True)
def _quick(one_device):
    """Every test of this file."""


@pytest.fixture(scope="module")
def held_out(tiny_run, tmp_path_factory):
    """A run like `tiny_run` but for its hold-out."""
    workdir = tmp_path_factory.mktemp("held_out") / "run"
    config = tiny.config(tiny_run / "dataset", images=2)
    config.dataset.holdout = 0.3
    with tiny.only_devices(1):
        train(config, workdir)
    return workdir


@pytest.fixture
def run(tiny_run, tmp_path):
    return shutil.copytree(tiny_run / "run", tmp_path / "run")


def slowly(run, dataset, setting) -> dict[str, float]:
    """P@1 and R@3 of a setting, label by label."""
    queries, labels = (np.load(run / "embeddings" / f"{of}.npy") for of in ("test", "labels"))
    known = retrieval.load(run / "index_queries")
    logs = np.log1p(dataset.train_targets.getnnz(axis=0))
    first, recalled = [], []
    for query, relevant in zip(queries, dataset.test_targets, strict=True):
        scores = labels @ query + setting["prior_weight"] * (logs - logs.mean())
        entries = [(score, "label", i) for i, score in enumerate(scores)]
        ids, scores = known.search(query[None], int(setting["neighbours"]))
        entries += [(s, "query", i) for i, s in zip(ids[0], scores[0], strict=True) if i >= 0]
        whole = sum(math.exp(score / setting["temperature"]) for score, _, _ in entries)
        final = [0.0] * len(labels)
        for score, kind, i in entries:
            weight = math.exp(score / setting["temperature"]) / whole
            if kind == "label":
                final[i] += (1 - setting["query_weight"]) * weight
            else:
                for label in dataset.train_targets[i].indices:
                    final[label] += setting["query_weight"] * weight
        order = sorted(range(len(labels)), key=lambda label: (-final[label], label))
        first.append(order[0] in relevant.indices)
        recalled.append(np.isin(relevant.indices, order[:3]).sum() / max(relevant.nnz, 1))
    return {"P@1": 100 * np.mean(first), "R@3": 100 * np.mean(recalled)}


def test_what_is_measured_is_what_eval_gives(held_out, tmp_path, capsys):
    workdir = shutil.copytree(held_out, tmp_path / "run")
    assert not cli.run(["tune", f"--workdir={workdir}", "--query_weights=0.2,0.8", "--neighbours=3,20"])
    tuning = json.loads((workdir / tune.TUNING).read_text())
    chosen, measured = tuning["chosen"], tuning["measured"]
    assert len(measured) == 2 * (1 + 2 * 4 * 2 * 4)
    assert [row["modalities"] for row in measured if not row["query_weight"]] == [
        ["text+image"],
        ["text", "image", "text+image"],
    ]
    assert chosen["P@1"] + chosen["R@100"] == max(row["P@1"] + row["R@100"] for row in measured)
    settings = config_lib.load(workdir / "config.json").retrieval
    assert {name: settings[name] for name in tune.Setting._fields} == {
        name: chosen[name] for name in tune.Setting._fields
    } | {"modalities": tuple(chosen["modalities"])}
    assert not cli.run(["eval", f"--workdir={workdir}"])
    figures = json.loads((workdir / "metrics.json").read_text())
    assert {name: chosen[name] for name in figures} == pytest.approx(figures, abs=1e-4)
    assert f"{chosen['P@1']:.4g}" in capsys.readouterr().out


@pytest.mark.parametrize("modalities", [("text+image",), ("text", "image", "text+image")])
def test_each_setting_against_a_loop(held_out, tmp_path, modalities):
    workdir = shutil.copytree(held_out, tmp_path / "run")
    flags = ["--query_weights=0.5", "--temperatures=0.1", "--neighbours=4", "--prior_weights=0.3"]
    # What is measured after another choice of modalities is not of that choice's embeddings.
    flags += ["--maximise=P@3", "--modalities=image", f"--modalities={','.join(modalities)}"]
    assert not cli.run(["tune", f"--workdir={workdir}", *flags])
    config = config_lib.load(workdir / "config.json")
    # Whatever was chosen: `eval` then keeps the training queries.
    config.retrieval.query_weight, config.retrieval.prior_weight = 0.5, 0.3
    config.retrieval.modalities = modalities
    config_lib.save(config, workdir / "config.json")
    assert not cli.run(["eval", f"--workdir={workdir}"])
    dataset = data.holdout(data.load(config.dataset.dir), 0.3, seed=0)
    alone, mixed = json.loads((workdir / tune.TUNING).read_text())["measured"][2:]
    assert tuple(mixed["modalities"]) == modalities
    assert {name: mixed[name] for name in ("P@1", "R@3")} == pytest.approx(slowly(workdir, dataset, mixed))
    wanted = slowly(workdir, dataset, {**alone, "neighbours": 1})
    assert {name: alone[name] for name in ("P@1", "R@3")} == pytest.approx(wanted)


def test_another_run_is_measured(run, held_out, caplog):
    before = config_lib.flat(config_lib.load(run / "config.json"))
    theirs = (held_out / "config.json").read_bytes()
    command = ["tune", f"--workdir={run}", f"--held_out={held_out}", "--query_weights=0.9", "--neighbours=5"]
    assert not cli.run([*command, "--temperatures=1"])
    assert not caplog.records
    after = config_lib.flat(config_lib.load(run / "config.json"))
    changed = {name for name in after if after[name] != before[name]}
    assert changed <= {f"retrieval.{name}" for name in tune.Setting._fields}
    assert (held_out / "config.json").read_bytes() == theirs
    assert json.loads((run / tune.TUNING).read_text())["held_out"] == str(held_out)
    assert not (held_out / tune.TUNING).exists()


def test_runs_that_differ_are_told(run, held_out):
    ours, theirs = (config_lib.load(workdir / "config.json") for workdir in (run, held_out))
    assert tune.differences(ours, theirs) == []
    ours.train.epochs, ours.retrieval.neighbours = 7, 7
    assert tune.differences(ours, theirs) == ["train.epochs"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "a run without a hold-out"),
        (["--held_out=nowhere"], "nowhere: not a run's directory"),
        (["--query_weights=1"], "--query_weights=1; give shares between 0 and 1"),
        (["--temperatures=0.1,cold"], "--temperatures=0.1,cold; give numbers above 0"),
        (["--neighbours="], "--neighbours=; give whole numbers"),
        (["--modalities=text,sound"], "--modalities=text,sound; give some of text, image, text+image"),
        (["--prior_weights=-1"], "--prior_weights=-1; give numbers of at least 0"),
    ],
)
def test_what_is_refused(run, flags, problem, capsys):
    before = (run / "config.json").read_bytes()
    assert cli.run(["tune", f"--workdir={run}", *flags]) == 2
    assert problem in capsys.readouterr().err
    assert (run / "config.json").read_bytes() == before


def test_a_figure_that_is_not_there():
    rows = [{"query_weight": 0.0, "temperature": 0.1, "neighbours": 1, "P@1": 3.0}]
    assert tune.best(rows, ["P@1"]) == rows[0]
    with pytest.raises(tune.UserError, match=r"names P@7; give some of P@1"):
        tune.best(rows, ["P@7"])
