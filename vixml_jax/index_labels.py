"""Builds the label index of a run, and adds or removes labels: `vixml index --workdir=runs/demo/vixml`.

Without --add and --remove it embeds all labels with the newest checkpoint, builds the index and prints what
it measured, which also stands in `index/index.json`. ScaNN's parameters are chosen so that a sample of
queries finds --target_recall of its exact neighbours among the --k best. Flags that are left out are those of
the run's config; those that are given become part of it.

--add takes JSON lines {"uid", "title", "content", "images": [paths]}; uid and title are required. Labels are
embedded and found from then on, without training. Their numbers follow those of the dataset; a uid that there
is already replaces that label and keeps its number. --remove takes uids, separated by commas, or a file with
one a line. Texts and pictures are copied into `labels_changed`, so that they outlive the next checkpoint.
While changes are few they are searched exactly beside the index; when they are many it is built anew.

Examples:
  vixml index --workdir=runs/demo/vixml --target-recall=0.95 --k=100
  vixml index --workdir=runs/demo/vixml --kind=exact --dtype=int8
  vixml index --workdir=runs/demo/vixml --add=new_labels.jsonl
  vixml index --workdir=runs/demo/vixml --remove=l17,l90
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from absl import flags

from vixml_jax import config as config_lib
from vixml_jax import config_rules
from vixml_jax.data import query_lines, text_lines
from vixml_jax.errors import UserError
from vixml_jax.search import LABELS
from vixml_jax.xmc_model import XmcModel

# Above this share of the labels, and this number, changes make the index be built anew.
MANY_SHARE, MANY = 0.1, 1000


def define_flags() -> None:
    """Registers the command's flags."""
    flags.DEFINE_string("workdir", None, "Directory of the run")
    flags.DEFINE_enum("kind", None, ["scann", "exact", "mesh"], "Of index")
    flags.DEFINE_float("target_recall", None, "Share of the exact k best that ScaNN must find")
    flags.DEFINE_integer("k", None, "Labels retrieved a query", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "int8"], "Of the embeddings; exact and mesh")
    flags.DEFINE_integer("dims", None, "Search by the first n dimensions; 0 for all", lower_bound=0)
    flags.DEFINE_string("add", None, "JSON lines of labels to add or replace")
    flags.DEFINE_string("remove", None, "uids of labels to take out, separated by commas, or a file of them")


def main() -> int:
    """Runs the command."""
    given = flags.FLAGS
    if not given.workdir:
        raise UserError("index needs --workdir", fix="give the directory that `vixml train` filled")
    workdir = Path(given.workdir)
    settings = {
        name: given[name].value
        for name in ("kind", "target_recall", "k", "dtype", "dims")
        if given[name].value is not None
    }
    records = list(query_lines.read_labels(given.add)) if given.add else []
    uids = read_uids(given.remove) if given.remove else []
    model = XmcModel.load(workdir)
    if given.add or given.remove:
        change(model, records, uids)
    if settings or not (given.add or given.remove):
        rebuild(model, workdir, settings)
    return 0


def change(model: XmcModel, records: list[dict[str, Any]], uids: list[str]) -> None:
    """Adds and removes labels, saves them, and builds the index anew when changes have become many."""
    changes = model.changes
    removed = changes.remove(uids, model.labels.uids) if uids else 0
    new, replaced = changes.add(records, model.labels.uids) if records else (0, 0)
    changes.save()
    beside = model.update_labels()
    print(
        f"{new:,} labels added, {replaced:,} replaced, {removed:,} removed; "
        f"{changes.total - len(changes.removed):,} labels, {beside:,} changes beside the index"
    )
    if beside > max(MANY, MANY_SHARE * changes.num_known):
        print("many changes: the index is built anew")
        model.build_searcher()
        model.save_searcher()
        model.update_labels()


def rebuild(model: XmcModel, workdir: Path, changed: dict[str, Any]) -> dict[str, Any]:
    """Builds and saves the index with changed settings, which become the workdir's; returns the figures."""
    config = config_lib.load(workdir / "config.json")
    for name, value in changed.items():
        config.retrieval[name] = value
    config_rules.validate(config)
    started = time.perf_counter()
    searcher = model.build_searcher(config.retrieval)
    seconds = time.perf_counter() - started
    config_lib.save(config, workdir / "config.json")
    model.save_searcher()
    model.update_labels()
    directory = workdir / LABELS
    size = sum(path.stat().st_size for path in directory.iterdir())
    figures = {
        "kind": searcher.labels.kind,
        "labels": searcher.labels.num_labels,
        "dim": searcher.labels.dim,
        **searcher.labels.measured,
        "size_mb": size / 1e6,
        "seconds_to_embed_and_build": seconds,
    }
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:.4g}" if isinstance(value, float) else f"{name:<{width}}  {value}")
    print(f"index is in {directory}")
    return figures


def read_uids(given: str) -> list[str]:
    """Reads uids from a file, one a line, or takes them from the flag itself."""
    if os.path.isfile(given):  # Path's own refuses names that are long, as lists may be
        uids = [line.strip() for _, line in text_lines.scan(given).lines()]
    else:
        uids = [uid.strip() for uid in given.split(",")]
    uids = list(dict.fromkeys(filter(None, uids)))
    if not uids:
        raise UserError("no uids", file=given, fix="give one a line, or separate them by commas")
    return uids
