"""Every kind of row of the paper's tables, shrunken, trains three steps and is evaluated."""

import json

import numpy as np
import pytest
import tiny

from vixml_jax import config as config_lib
from vixml_jax import recipes, tables
from vixml_jax.prepare import prepare
from vixml_jax.train import train

ROWS = [row for table in tables.load().values() for row in table.rows if row.args]
# What makes no other kind: the dataset, how many pictures, the seed, and backbones of one family.
FAMILY = {name: backbone.smoke for name, backbone in recipes.BACKBONES.items()}


def kind_of(args: str) -> tuple:
    """Rows of one kind go through the same code."""
    values = dict(arg.partition("=")[::2] for arg in args.split(","))
    values.pop("seed", None)
    return (
        FAMILY[values.pop("backbone")],
        bool(values.pop("images", 0)),
        values.pop("epochs", None) == "0",
        *sorted(values.items()),
    )


KINDS = {kind_of(row.args): row for row in reversed(ROWS)}
# Losses that no table has are a kind each as well.
OTHERS = [
    tables.Row(loss, "lf_amazontitles_131k", f"backbone=distilbert,images=3,loss={loss}", ())
    for loss in ("info_nce", "decoupled_softmax", "sigmoid")
]
# Runs by default: what no other test trains.
QUICK = (kind_of("backbone=distilbert,images=3,fusion=late"),)


def case(row: tables.Row):
    marks = () if kind_of(row.args) in QUICK else pytest.mark.slow
    return pytest.param(row, id=row.args, marks=marks)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    prepare(tiny.write_raw(root / "raw", seed=4), root / "dataset", "tiny")
    return root / "dataset"


@pytest.mark.parametrize("row", [case(row) for row in (*KINDS.values(), *OTHERS)])
def test_a_shrunken_row_trains_three_steps(row, dataset, tmp_path, one_device):
    config = recipes.get_config(row.dataset, f"{row.args},smoke")
    whole = recipes.get_config(row.dataset, row.args)
    for field in (
        "loss.name",
        "prototype.kind",
        "text.train",
        "text.prompt",
        "vision.fusion",
        "text.pooling",
    ):
        assert config_lib.get(config, field) == config_lib.get(whole, field), field
    config.dataset.dir, config.dataset.demo_queries = str(dataset), 0
    config.train.batch_size, config.train.epochs = 32, min(config.train.epochs, 1)
    figures = train(config, tmp_path / "run")
    assert 0 <= figures["P@1"] <= 100
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert len(losses) == (3 if whole.train.epochs else 0)
    assert np.isfinite(losses).all()


def test_the_kinds_are_few_and_the_quick_ones_among_them():
    assert len(KINDS) < 40
    assert set(QUICK) <= set(KINDS)
