"""Tunes retrieval-augmented inference on held-out training queries: `vixml tune --workdir=runs/picto`.

Which weight near training queries have beside labels, at which temperature, how many of them are found, how
far frequent labels are preferred, and whether a query with text and pictures searches by one embedding or by
the mean of itself as text, as pictures and as both is measured on training queries that a run has set aside
(--config.dataset.holdout): test labels are never looked at. --held_out names that run, a copy of the one in
--workdir but for its hold-out; without it the run of --workdir is one itself. The best setting by the mean
of the figures in --maximise becomes that of --workdir, for `vixml eval`, `predict`, `index` and `serve` from
then on; `tuning.json` there has all that was measured.

Examples:
  vixml train --config=configs/picto_tags.py --config.dataset.holdout=0.12 --workdir=runs/picto_held_out
  vixml train --config=configs/picto_tags.py --workdir=runs/picto
  vixml tune --workdir=runs/picto --held_out=runs/picto_held_out
  vixml eval --workdir=runs/picto
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vixml_jax import classifier_stage, config_rules, distributed, evaluate, files, sharding
from vixml_jax import config as config_lib
from vixml_jax import run as run_lib
from vixml_jax.embedding import AS_IT_IS
from vixml_jax.errors import UserError
from vixml_jax.progress import Progress
from vixml_jax.retrieval.augment import Found, augment
from vixml_jax.retrieval.priors import add_priors
from vixml_jax.search import Searcher
from vixml_jax.types import Predictions

TUNING = "tuning.json"
# What a run and its copy with a hold-out may differ in.
HOLD_OUT_FIELDS = ("dataset.holdout", "dataset.max_test")

Number = TypeVar("Number", int, float)

logger = logging.getLogger(__name__)


class Setting(NamedTuple):
    """What is tuned; fields of `config.retrieval`."""

    query_weight: float
    temperature: float
    neighbours: int
    prior_weight: float
    modalities: tuple[str, ...]


def define_flags() -> None:
    """Registers the command's flags."""
    flags.DEFINE_string("workdir", None, "Directory of the run that gets the settings")
    flags.DEFINE_string("held_out", None, "Directory of the run with a hold-out; --workdir unless given")
    flags.DEFINE_list("query_weights", ["0.01", "0.05", "0.1", "0.3", "0.5", "0.9"], "Tried")
    flags.DEFINE_list("temperatures", ["0.03", "0.05", "0.07", "0.1"], "Tried, in units of cosine")
    flags.DEFINE_list("neighbours", ["100", "300", "1000"], "Tried: training queries found a query")
    flags.DEFINE_list("prior_weights", ["0", "0.01", "0.02", "0.05"], "Tried: of labels' log frequencies")
    flags.DEFINE_multi_string(
        "modalities",
        ["text+image", "text,image,text+image"],
        "Tried, where the run has pictures: a query with text and pictures searches by the mean of its "
        "embeddings as each of these. Repeat the flag for each choice",
    )
    flags.DEFINE_list("maximise", ["P@1", "R@100"], "Figures whose mean is made as high as it gets")


def main() -> int:
    """Runs the command."""
    given = flags.FLAGS
    if not given.workdir:
        raise UserError("tune needs --workdir", fix="give the directory that `vixml train` filled")
    workdir = Path(given.workdir)
    held_out = Path(given.held_out or workdir)
    settings = grid(
        given.query_weights, given.temperatures, given.neighbours, given.prior_weights, given.modalities
    )
    distributed.initialize()
    target, config = (_config_of(directory) for directory in (workdir, held_out))
    _check(config, held_out)
    if not config.vision.images:  # one embedding is all that a query has
        settings = list(dict.fromkeys(setting._replace(modalities=AS_IT_IS) for setting in settings))
    if differing := differences(target, config):
        logger.warning(
            "%s and %s differ in %s: what is best for one may not be for the other",
            workdir,
            held_out,
            ", ".join(differing),
        )
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with sharding.use(mesh):
        rows = measure(config, held_out, mesh, settings)
    distributed.on_lead(lambda: _write(workdir, held_out, rows, given.maximise))
    return 0


def grid(
    weights: Sequence[str],
    temperatures: Sequence[str],
    neighbours: Sequence[str],
    priors: Sequence[str],
    modalities: Sequence[str],
) -> list[Setting]:
    """Returns every combination, as the flags spell them.

    Raises:
      UserError: if a value is no number, or none that `config.retrieval` takes.
    """
    several = [tuple(names.split(",")) for names in modalities]
    for names in several:
        if set(names) - set(config_rules.MODALITIES):
            known = ", ".join(config_rules.MODALITIES)
            raise UserError(
                f"--modalities={','.join(names)}", fix=f"give some of {known}; repeat the flag to try several"
            )
    return [
        Setting(*values, modalities=names)
        for names in several
        for values in itertools.product(
            _numbers("query_weights", weights, float, lambda x: 0 < x < 1, "shares between 0 and 1"),
            _numbers("temperatures", temperatures, float, lambda x: 0 < x < math.inf, "numbers above 0"),
            _numbers("neighbours", neighbours, int, lambda x: x > 0, "whole numbers of at least 1"),
            _numbers("prior_weights", priors, float, lambda x: 0 <= x < math.inf, "numbers of at least 0"),
        )
    ]


def differences(run: ConfigDict, held_out: ConfigDict) -> list[str]:
    """Names the fields in which two runs differ though training depends on them, hold-outs left out."""
    ours, theirs = config_lib.flat(run), config_lib.flat(held_out)
    free = (*config_lib.FREE_TO_CHANGE, *HOLD_OUT_FIELDS)
    return [name for name in ours if ours[name] != theirs[name] and not name.startswith(free)]


def measure(
    config: ConfigDict, workdir: Path, mesh: Mesh, settings: Sequence[Setting]
) -> list[dict[str, Any]]:
    """Scores settings on the test split of a run, which its config says is held out.

    Must be called inside the mesh, and by all processes.

    Returns:
      The settings and their figures in percent, a row each; the first row of each choice of modalities has a
      weight of 0, labels alone. Nothing in a process that does not search.
    """
    config.retrieval.query_weight = settings[0].query_weight  # not 0: training queries are searched
    config.retrieval.neighbours = max(setting.neighbours for setting in settings)
    run, model = run_lib.load(config, workdir, mesh)
    vectors_LD = classifier_stage.load(config, workdir, model.spec, model.step, mesh)
    labels_LD = evaluate.embed_labels(run, model.params, model.tables)
    rows = []
    for modalities, group in itertools.groupby(settings, lambda setting: setting.modalities):
        config.retrieval.modalities = modalities
        train_queries_ND = evaluate.embed_train_queries(run, model.params, model.tables)
        queries_ND = evaluate.embed_queries(run, model.params, run.banks.test, "embed held-out queries")
        searcher = evaluate.make_searcher(run, labels_LD, train_queries_ND, vectors_LD)
        if searcher is not None:
            rows += _score(run, searcher, queries_ND, list(group))
        distributed.wait_for_all()  # before devices do more together
    return rows


def _score(
    run: run_lib.Run, searcher: Searcher, queries_ND: np.ndarray, settings: Sequence[Setting]
) -> list[dict[str, Any]]:
    """Scores settings of the same embeddings, labels alone first."""
    k = evaluate.labels_needed(run, run.spec.num_labels)
    labels, neighbours = searcher.candidates(queries_ND, k)
    assert neighbours is not None
    alone = Predictions(labels[0][:, :k], labels[1][:, :k])
    nothing = settings[0]._replace(query_weight=0.0, prior_weight=0.0)
    rows = [{**nothing._asdict(), **evaluate.scored(run, alone)}]
    weights = {setting.prior_weight for setting in settings}
    preferred = {weight: add_priors(labels, searcher.log_priors_L, weight) for weight in weights}
    with Progress(len(settings), "tune", "settings") as progress:
        for setting in settings:
            found = augment(
                preferred[setting.prior_weight],
                _first(neighbours, setting.neighbours),
                searcher.train_targets,
                k=k,
                query_weight=setting.query_weight,
                temperature=setting.temperature,
            )
            rows.append({**setting._asdict(), **evaluate.scored(run, Predictions(*found))})
            progress.update()
    return rows


def best(rows: Sequence[dict[str, Any]], maximise: Sequence[str]) -> dict[str, Any]:
    """Returns the row with the highest mean of these figures, the first of equal ones.

    Raises:
      UserError: if a figure is not measured.
    """
    if not maximise or (unknown := [name for name in maximise if name not in rows[0]]):
        shown = ", ".join(unknown) if maximise else "nothing"
        known = [name for name in rows[0] if name not in Setting._fields]
        raise UserError(f"--maximise names {shown}", fix="give some of " + ", ".join(known))
    return max(rows, key=lambda row: sum(row[name] for name in maximise))


def _write(workdir: Path, held_out: Path, rows: list[dict[str, Any]], maximise: Sequence[str]) -> None:
    """Writes `tuning.json`, makes the best setting that of the workdir, and prints it beside labels alone."""
    chosen = best(rows, maximise)
    config = _config_of(workdir)
    for name in Setting._fields:
        config.retrieval[name] = chosen[name]
    config_rules.validate(config)
    files.write_json(
        workdir / TUNING,
        {"held_out": str(held_out), "maximise": list(maximise), "chosen": chosen, "measured": rows},
    )
    config_lib.save(config, workdir / "config.json")
    shown = list(dict.fromkeys([*maximise, "P@1", "P@5", "R@100"]))
    shown = [name for name in shown if name in chosen]
    print("".join(f"{name:>14}" for name in (*Setting._fields[:-1], *shown)) + "  modalities")
    for row in (rows[0], chosen):
        numbers = (row[name] for name in (*Setting._fields[:-1], *shown))
        print("".join(f"{number:>14.4g}" for number in numbers) + "  " + ",".join(row["modalities"]))
    print(f"{len(rows)} settings are in {workdir / TUNING}, the best in {workdir / 'config.json'}")


def _numbers(
    flag: str, given: Sequence[str], kind: type[Number], right: Callable[[Number], bool], what: str
) -> list[Number]:
    try:
        numbers = [kind(text) for text in given]
    except ValueError:
        numbers = []
    if not numbers or not all(map(right, numbers)):
        raise UserError(f"--{flag}={','.join(given)}", fix=f"give {what}, separated by commas")
    return numbers


def _first(found: Found, count: int) -> Found:
    return found[0][:, :count], found[1][:, :count]


def _config_of(workdir: Path) -> ConfigDict:
    files.check_run(workdir, "config.json")
    return config_lib.load(workdir / "config.json")


def _check(config: ConfigDict, workdir: Path) -> None:
    if not config.dataset.holdout:
        raise UserError(
            "a run without a hold-out: its test labels must not choose settings",
            file=workdir,
            fix="train another with --config.dataset.holdout=0.1, and give it as --held_out",
        )
