"""The paper's tables: `vixml tables --table=1` prints the command of each row with its published figures.

With --collect it reads the runs below a directory (their config.json, model.json and metrics.json) and fills
in what was measured: a run stands for a row if it computes what the row's config does, whatever its mesh, its
checkpoints and the place of its data are. Rows that differ in nothing are one run, also across tables.

Examples:
  vixml tables
  vixml tables --table=1
  vixml tables --table=5 --collect=runs/
  vixml tables --collect=runs/ --json=tables.json
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from vixml_jax import config_files, files
from vixml_jax.errors import UserError

# Of a run, what does not change what its figures mean: found by `tables --collect` all the same.
ANYHOW = (
    *("dataset.dir", "dataset.cache_dir", "mesh.", "checkpoint.", "eval."),
    *(
        "train.log_every",
        "train.row_length",
        "train.chunk_rows",
        "text.remat",
        "text.vocab_size",
        "vision.batch_size",
    ),
    *("retrieval.kind", "retrieval.target_recall", "retrieval.k"),
)
# Fields that name weights: a local copy of the same name will do.
WEIGHTS = ("text.checkpoint", "vision.checkpoint")
# What is read only where another field is not 0.
READ_IF = {
    "vision.": "vision.images",
    "classifier.": "classifier.epochs",
    "retrieval.classifier_weight": "classifier.epochs",
    "retrieval.modalities": "vision.images",
    "retrieval.neighbours": "retrieval.query_weight",
    "retrieval.temperature": "retrieval.query_weight",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
      name: as it is shown.
      dataset: name of its config in `configs/`, without the suffix.
      args: the config's arguments; "" for a row that is not run here.
      figures: as published, percent, one for each of the table's metrics; None where there is none.
    """

    name: str
    dataset: str
    args: str
    figures: tuple[float | None, ...]

    @property
    def config(self) -> str:
        """The config with its arguments, as --config takes it; "" for a row that is not run here."""
        return f"configs/{self.dataset}.py:{self.args}" if self.args else ""

    @property
    def workdir(self) -> str:
        """Where the printed command puts the run: the same for rows of several tables that are one run."""
        return f"runs/{self.dataset}/{self.args.removeprefix('backbone=').replace(',', '_')}"

    @property
    def command(self) -> str:
        """What to type; "" for a row that is not run here."""
        if not self.args:
            return ""
        job = "eval" if "epochs=0" in self.args.split(",") else "train"
        return f"vixml {job} --config={self.config} --workdir={self.workdir}"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: its title, the names of its metrics as in metrics.json, and its rows."""

    title: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]

    def __post_init__(self):
        for row in self.rows:
            if len(row.figures) != len(self.metrics):
                raise ValueError(f"{self.title}: {row.name} has {len(row.figures)} figures")


@dataclasses.dataclass(frozen=True)
class FoundRun:
    """A finished run.

    Attributes:
      workdir: its directory.
      fields: its config, flat, and the sizes of its dataset.
      figures: its metrics.json.
    """

    workdir: str
    fields: Mapping[str, Any]
    figures: Mapping[str, float]


def define_flags() -> None:
    """Registers the command's flags."""
    flags.DEFINE_integer("table", None, "Number of a table of the paper; all of them unless given")
    flags.DEFINE_string("collect", None, "Directory of runs, whose figures are filled in")
    flags.DEFINE_string("json", None, "File for all of it as JSON; - prints it instead of the tables")


def main() -> int:
    """Runs the command."""
    tables = load()
    number = flags.FLAGS.table
    if number is not None:
        if number not in tables:
            raise UserError(f"no table {number}", fix="there are " + ", ".join(map(str, tables)))
        tables = {number: tables[number]}
    runs = None if flags.FLAGS.collect is None else list(find_runs(Path(flags.FLAGS.collect)))
    if flags.FLAGS.json:
        result = as_json(tables, runs)
        if flags.FLAGS.json == "-":
            print(json.dumps(result, indent=2))
        else:
            files.write_json(flags.FLAGS.json, result)
        return 0
    for text in shown(tables, runs):
        print(text)
    return 0


def load() -> dict[int, Table]:
    """Returns the tables of `configs/tables.py` by their numbers."""
    return _module("configs/tables.py").TABLES


def find_runs(root: Path) -> Iterator[FoundRun]:
    """Yields the finished runs below a directory, in order of their paths.

    One whose files cannot be read is named in a warning.

    Raises:
      UserError: if there is no such directory.
    """
    if not root.is_dir():
        raise UserError("no such directory", file=root, fix="give --collect the directory of your runs")
    for directory, folders, names in os.walk(root, onerror=_left_out):
        folders.sort()
        if "config.json" not in names:
            continue
        folders.clear()  # a run holds no runs
        if {"metrics.json", "model.json"} <= set(names):
            try:
                yield _read_run(Path(directory))
            except UserError as error:
                _left_out(error)


def _left_out(error: Exception) -> None:
    logging.warning("left out: %s", error)


def _read_run(workdir: Path) -> FoundRun:
    from vixml_jax import config as config_lib  # only those who collect wait for it

    model = files.read_object(workdir / "model.json")
    sizes = {f"dataset {key}": model.get(f"num_{key}") for key in ("queries", "labels")}
    config = config_lib.flat(config_lib.load(workdir / "config.json"))
    return FoundRun(str(workdir), {**config, **sizes}, files.read_figures(workdir / "metrics.json"))


def differences(row: Row, run: FoundRun) -> dict[str, tuple[Any, Any]]:
    """Returns in what a run departs from a row: field -> (the row's value, the run's)."""
    fields = _fields_of(row)
    seeded = any(arg.startswith("seed=") for arg in row.args.split(","))
    found = {}
    for name, value in fields.items():
        if name.startswith(ANYHOW) or (name == "train.seed" and not seeded):
            continue
        if any(name.startswith(read) and name != if_not_0 and not fields[if_not_0]
               for read, if_not_0 in READ_IF.items()):  # fmt: skip
            continue
        other = run.fields.get(name)
        same = value == other or (name in WEIGHTS and Path(str(value)).name == Path(str(other)).name)
        if not same:
            found[name] = (value, other)
    return found


def measured(row: Row, runs: list[FoundRun]) -> list[FoundRun]:
    """Returns the runs that stand for a row."""
    return [run for run in runs if not differences(row, run)] if row.args else []


def shown(tables: dict[int, Table], runs: list[FoundRun] | None) -> Iterator[str]:
    """Yields each table as text, and then which runs stand for no row."""
    rows = [row for table in tables.values() for row in table.rows]
    width = max(len(row.name) for row in rows)
    sets = max(len(row.dataset) for row in rows)
    for number, table in tables.items():
        head = "".join(f"{name:>8}" for name in table.metrics)
        lines = [f"Table {number}. {table.title} (percent)", f"{'':<{width}}  {'':<{sets}}{head}"]
        for row in table.rows:
            lines.append(f"{row.name:<{width}}  {row.dataset:<{sets}}{_numbers(row.figures)}")
            found = measured(row, runs or [])
            if found:
                means = [_mean(found, name) for name in table.metrics]
                label = "  measured" + (f", mean of {len(found)} runs" if len(found) > 1 else "")
                lines.append(f"{label:<{width + 2 + sets}}{_numbers(means)}")
                lines += [f"    {run.workdir}" for run in found]
            elif row.command:
                lines.append(f"    {row.command}")
        yield "\n".join(lines) + "\n"
    for run in runs or []:
        if not any(row.args and not differences(row, run) for row in rows):
            yield f"{run.workdir} is no row of these tables: {_nearest(rows, run)}"


def as_json(tables: dict[int, Table], runs: list[FoundRun] | None) -> dict[str, Any]:
    """Returns the tables as JSON: number -> title, metrics, rows (with `measured` where runs are given)."""

    def row_json(table: Table, row: Row) -> dict[str, Any]:
        result: dict[str, Any] = {
            **{"name": row.name, "dataset": row.dataset, "config": row.config, "command": row.command},
            "published": dict(zip(table.metrics, row.figures, strict=True)),
        }
        if runs is not None:
            found = measured(row, runs)
            result["runs"] = [run.workdir for run in found]
            result["measured"] = {name: _mean(found, name) for name in table.metrics} if found else None
        return result

    return {
        str(number): {
            "title": table.title,
            "metrics": list(table.metrics),
            "rows": [row_json(table, row) for row in table.rows],
        }
        for number, table in tables.items()
    }


@functools.cache
def _fields_of(row: Row) -> dict[str, Any]:
    """The row's config, flat, and the sizes of its dataset."""
    from vixml_jax import config as config_lib
    from vixml_jax import recipes

    facts = recipes.DATASETS[row.dataset]
    config = _module(f"configs/{row.dataset}.py").get_config(row.args)
    return {
        **config_lib.flat(config),
        "dataset queries": facts.train,
        "dataset labels": facts.labels,
    }


@functools.cache
def _module(path: str) -> Any:
    """Runs a file of `configs/`."""
    found = config_files.find(path)
    spec = importlib.util.spec_from_file_location(f"vixml_config_{Path(path).stem}", found)
    if spec is None or spec.loader is None or not Path(found).is_file():
        raise UserError("no such file", file=path, fix="run from a checkout, or install the package anew")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _nearest(rows: list[Row], run: FoundRun) -> str:
    """Says which row a run comes nearest to, and in what it departs from it."""
    row, found = min(
        ((row, differences(row, run)) for row in rows if row.args), key=lambda pair: len(pair[1])
    )
    shown = ", ".join(f"{name} is {run!r}, not {row!r}" for name, (row, run) in list(found.items())[:3])
    more = f", and {len(found) - 3} more" if len(found) > 3 else ""
    return f"nearest is {row.config}, but {shown}{more}"


def _mean(runs: list[FoundRun], metric: str) -> float | None:
    values = [run.figures[metric] for run in runs if metric in run.figures]
    return sum(values) / len(values) if values else None


def _numbers(values: Any) -> str:
    return "".join(f"{'-':>8}" if value is None else f"{value:>8.2f}" for value in values)
