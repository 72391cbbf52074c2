"""The paper's tables: their rows, and finding the runs that stand for them."""

import json
import os
from pathlib import Path

import pytest

from vixml_jax import cli, config_files, config_rules, recipes, tables
from vixml_jax import config as config_lib
from vixml_jax.errors import UserError

TABLES = tables.load()
ROWS = [row for table in TABLES.values() for row in table.rows if row.args]
# Of our notes of the paper: table, row, dataset, metric, figure.
PROBES = [
    (1, "BERT", "mm_amazontitles_300k", "PSP@1", 36.85),
    (3, "Qwen2.5-3B", "lf_amazon_131k", "R@100", 87.73),
    (4, "late, SigLIP2", "mm_amazontitles_300k", "R@10", 50.18),
    (5, "DEXA, images", "lf_amazontitles_131k", "P@5", 23.19),
    (6, "V + E + EOS", "lf_amazontitles_131k", "P@1", 46.12),
    (13, "Qwen2.5-7B, text", "lf_amazontitles_131k", "R@100", 75.89),
    (14, "ViXML, Qwen2.5-3B", "lf_amazontitles_1p3m", "PSP@1", 35.40),
]


def write_run(workdir: Path, row: tables.Row, figures, **changes) -> Path:
    """Writes what a finished run of a row leaves, without running it."""
    config = recipes.get_config(row.dataset, row.args)
    config.dataset.dir = "/elsewhere/data"
    for name, value in changes.items():
        section, field = name.split("__")
        config[section][field] = value
    facts = recipes.DATASETS[row.dataset]
    config_lib.save(config, workdir / "config.json")
    (workdir / "model.json").write_text(json.dumps({"num_queries": facts.train, "num_labels": facts.labels}))
    (workdir / "metrics.json").write_text(json.dumps(figures))
    return workdir


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.dataset}:{row.args}")
def test_every_row_is_a_valid_config(row):
    config = recipes.get_config(row.dataset, row.args)
    config_rules.validate(config)
    facts, backbone = recipes.DATASETS[row.dataset], recipes.BACKBONES[config_arg(row, "backbone")]
    assert config.text.checkpoint == backbone.checkpoint
    assert config.text.train == ("lora" if backbone.decoder else "full")
    assert config.vision.images == int(config_arg(row, "images") or 0)
    assert config.dataset.dir == f"data/{row.dataset}"
    assert config.text.max_tokens == (128 if facts.full_text else 32)


def config_arg(row, name):
    """Value of one of a row's arguments, None where it is not given."""
    return dict(arg.partition("=")[::2] for arg in row.args.split(",")).get(name)


def test_the_figures_are_those_of_our_notes():
    for number, name, dataset, metric, figure in PROBES:
        table = TABLES[number]
        (row,) = [row for row in table.rows if (row.name, row.dataset) == (name, dataset)]
        assert row.figures[table.metrics.index(metric)] == figure, (number, name)
    assert [len(TABLES[number].rows) for number in (1, 2, 3, 4, 5, 6, 10, 11, 12, 13)] == [
        *(21, 8, 21, 5, 6, 7, 5, 5, 5, 16)
    ]


def test_recipes_are_those_of_the_paper():
    of = recipes.get_config
    distilbert = of("lf_amazontitles_131k", "backbone=distilbert,images=3")
    assert (distilbert.train.epochs, distilbert.train.batch_size, distilbert.optimizer.lr) == (
        150,
        2048,
        2e-4,
    )
    assert of("lf_amazontitles_131k", "backbone=distilbert").train.epochs == 300
    bert = of("lf_amazon_131k", "backbone=bert")
    assert (bert.train.batch_size, bert.optimizer.lr) == (512, 5e-5)
    minilm = of("lf_amazon_131k", "backbone=minilm-l3")
    assert (minilm.train.batch_size, minilm.optimizer.lr) == (2048, 5e-4)
    large = of("lf_amazontitles_1p3m", "backbone=qwen2.5-3b,images=3,rae")
    assert (large.train.epochs, large.mining.start, large.mining.every) == (40, 4, 2)
    assert (large.optimizer.clip_norm, large.optimizer.head_lr, large.text.lora_rank) == (1.0, 1e-4, 256)
    assert (large.retrieval.query_weight, large.retrieval.neighbours) == (0.1, 100)
    assert of("lf_amazontitles_131k", "backbone=qwen2.5-7b").train.batch_size == 1024
    ngame = of("lf_amazontitles_131k", "loss=ngame").loss
    assert (ngame.name, ngame.margin_min, ngame.margin_max) == ("triplet", 0.3, 0.3)


def test_one_workdir_for_each_config_and_one_config_for_each_workdir():
    def computed(row):
        return tuple(sorted(tables._fields_of(row).items(), key=lambda item: item[0]))

    by_workdir = {}
    for row in ROWS:
        assert by_workdir.setdefault(row.workdir, computed(row)) == computed(row)
    assert len(set(by_workdir.values())) == len(by_workdir)


@pytest.mark.parametrize(
    ("arg", "message"),
    [("backbone=gpt", "one of minilm-l3"), ("loss=hinge", "ngame"), ("prompt=t3", "t1"), ("vision=x", "vit")],
)
def test_a_wrong_argument_names_the_right_ones(arg, message):
    with pytest.raises(UserError, match=message):
        recipes.get_config("lf_amazontitles_131k", arg)


def test_collect_finds_the_runs_of_a_row(tmp_path, capsys, caplog):
    text, pictures = (row for row in TABLES[5].rows if row.name in ("PRIME, text", "PRIME, images"))
    figures = {"P@1": 44.5, "P@5": 21.5, "PSP@1": 39.25, "R@100": 68.0, "R@10": 60.0}
    write_run(tmp_path / "a" / "text", text, figures)
    # Another seed, a local copy of the weights, another mesh: the same row all the same.
    write_run(
        *(tmp_path / "b", text, {**figures, "P@1": 45.5}),
        **{"train__seed": 7, "text__checkpoint": "/models/msmarco-distilbert-base-v4", "mesh__fsdp": 2},
    )
    write_run(tmp_path / "other", pictures, figures, optimizer__lr=1e-3)
    write_run(tmp_path / "classified", pictures, figures, classifier__epochs=10)
    damaged = write_run(tmp_path / "damaged", text, figures)
    (damaged / "config.json").write_text('{"train": {"epocks": 3}}')
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text("{}")
    capsys.readouterr()
    assert not cli.run(["tables", "--table=5", f"--collect={tmp_path}", "--json=-"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["5"]["rows"]}
    assert rows["PRIME, text"]["measured"]["P@1"] == 45.0
    assert rows["PRIME, text"]["measured"]["PSP@1"] == 39.25
    assert rows["PRIME, text"]["published"]["P@1"] == 44.86
    assert len(rows["PRIME, text"]["runs"]) == 2
    assert rows["PRIME, images"]["measured"] is None

    assert not cli.run(["tables", "--table=5", f"--collect={tmp_path}"])
    out = capsys.readouterr().out
    assert "measured, mean of 2 runs" in out
    assert "45.00" in out
    assert "other is no row of these tables" in out
    assert "optimizer.lr is 0.001, not 0.0002" in out
    assert "classifier.epochs is 10, not 0" in out
    assert "damaged" in caplog.text


@pytest.mark.parametrize(("name", "data"), [("model.json", "[]"), ("metrics.json", '{"P@1": "high"}')])
def test_collect_names_what_is_broken(tmp_path, capsys, caplog, name, data):
    row = TABLES[5].rows[0]
    (write_run(tmp_path / "broken", row, {"P@1": 44.5}) / name).write_text(data)
    assert not cli.run(["tables", "--table=5", f"--collect={tmp_path}"])
    assert f"broken/{name}: " in caplog.text


def test_collect_names_what_cannot_be_looked_into(tmp_path, capsys, caplog, monkeypatch):
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert not cli.run(["tables", "--table=5", f"--collect={tmp_path}"])
    assert "left out: [Errno 13] Permission denied" in caplog.text


def test_a_seed_that_a_row_names_counts(tmp_path):
    first, second = TABLES[12].rows[:2]
    write_run(tmp_path / "run", second, {"P@1": 44.0})
    runs = list(tables.find_runs(tmp_path))
    assert tables.measured(second, runs) == runs
    assert not tables.measured(first, runs)
    (text,) = [
        row for row in TABLES[1].rows if row.args == "backbone=qwen2.5-0.5b" and "131k" in row.workdir
    ][:1]
    assert tables.measured(text, runs) == runs


def test_the_dataset_of_a_run_counts(tmp_path):
    (small,) = [row for row in TABLES[1].rows if row.workdir == "runs/lf_amazontitles_131k/bert"]
    (large,) = [row for row in TABLES[1].rows if row.workdir == "runs/lf_amazontitles_1p3m/bert"]
    write_run(tmp_path / "run", small, {"P@1": 44.0})
    runs = list(tables.find_runs(tmp_path))
    assert tables.differences(small, runs[0]) == {}
    assert set(tables.differences(large, runs[0])) == {"dataset queries", "dataset labels"}


def test_the_printed_commands(capsys):
    assert not cli.run(["tables", "--table=2"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    commands = [line for line in lines if line.startswith("vixml ")]
    assert commands[0].startswith(
        "vixml eval --config=configs/lf_amazontitles_131k.py:backbone=qwen3-embedding-4b,prompt=bare,epochs=0"
    )
    assert all(" --workdir=runs/lf_amazontitles_131k/" in command for command in commands)
    assert len(commands) == 7  # one of eight is published only


def test_mistakes_take_one_line(tmp_path, capsys):
    assert cli.run(["tables", "--table=9"]) == 2
    assert "there are 1, 2, 3" in capsys.readouterr().err
    assert cli.run(["tables", f"--collect={tmp_path / 'nothing'}"]) == 2
    assert "no such directory" in capsys.readouterr().err


def test_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = config_files.find("configs/lf_amazon_131k.py:backbone=bert,images=3")
    path, _, args = found.partition(":")
    assert Path(path).is_file()
    assert args == "backbone=bert,images=3"
    assert config_files.find("mine/lf_amazon_131k.py") == "mine/lf_amazon_131k.py"
    assert config_files.find("configs/nothing.py:x") == "configs/nothing.py:x"
    own = tmp_path / "configs" / "lf_amazon_131k.py"
    own.parent.mkdir()
    own.touch()
    assert config_files.find("configs/lf_amazon_131k.py") == "configs/lf_amazon_131k.py"
