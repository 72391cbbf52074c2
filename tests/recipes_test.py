"""Every kind of row of the paper's tables, shrunken, trains three steps and is evaluated."""

import json

import jax
import numpy as np
import pytest
import tiny

from vixml_jax import config as config_lib
from vixml_jax import config_rules, plan, recipes, sharding, tables
from vixml_jax.planning.abstract_run import abstract_run
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


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


# Rows that differ only in the dataset differ only in the sizes of tables: one of them has its step traced.
TRACED = {row.args: row for row in reversed(ROWS)}


@pytest.mark.parametrize(
    "row",
    {(row.dataset, row.args): row for row in ROWS}.values(),
    ids=lambda row: f"{row.dataset}:{row.args}",
)
def test_every_row_builds_at_its_full_size(row, mesh):
    """Model, optimizer, tables and a packed batch of a row as it is, as shapes; the step, or the encoder."""
    config = recipes.get_config(row.dataset, row.args)
    config_rules.validate(config)
    workload = plan.workload_of(config, None, None, None, None)
    run = abstract_run(config, workload, mesh)
    known = recipes.DATASETS[row.dataset]
    assert (workload.labels, workload.queries) == (known.labels, known.train)
    tables_of = run.state.tables
    assert known.labels <= tables_of.centroids.shape[0] < known.labels + sharding.TABLE_ROWS_MULTIPLE
    assert known.train <= tables_of.query_embeddings.shape[0] < known.train + sharding.TABLE_ROWS_MULTIPLE
    batch = run.train_batch()
    assert batch.tokens.token_ids.shape[1] == config.train.row_length
    assert batch.query_rows.shape == (config.train.batch_size,)
    assert (batch.tokens.images is not None) == (config.vision.images > 0)
    if TRACED[row.args] is not row:
        return
    if config.train.epochs:
        state, figures = run.trace_step().out_info
        shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
        assert shapes(state) == shapes(run.state)
        assert figures["train/loss"].shape == ()
        assert figures["train/loss"].dtype == np.float32
    else:
        assert run.trace_encoding().out_info.shape == (run.items_per_call, run.spec.dim)
