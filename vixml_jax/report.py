"""One page about a run, beside others: `vixml report --workdir=runs/demo/vixml --compare=runs/demo/text`.

The page needs no other file and no network: figures, learning curves, examples with their pictures, where the
run is right, a map of its embeddings, its config. What a run has not written yet, the page says is missing.

Examples:
  vixml report --workdir=runs/demo/vixml
  vixml report --workdir=runs/demo/vixml --compare=runs/demo/text --out=report.html
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import string
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from absl import flags

from vixml_jax import __version__, files, metrics
from vixml_jax.errors import UserError
from vixml_jax.report_charts import (
    MOST_POINTS,
    Series,
    bar,
    escape,
    legend,
    line_chart,
    notes,
    scatter,
    table,
)
from vixml_jax.report_examples import examples
from vixml_jax.report_published import published
from vixml_jax.report_runs import RUN_FILES, RunFiles, alike, positives, split_off

MAIN_FIGURES = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@5", "R@10", "R@100", "MRR")
# name in metrics.jsonl, heading, decimals where one points at it.
CURVES = (
    ("train/loss", "Training loss", 4),
    ("eval/P@1", "P@1, percent", 2),
    ("train/violators", "Violators, share of hard negatives", 3),
    ("train/lr", "Learning rate of the text tower", 6),
    ("perf/examples_per_s", "Examples a second", 0),
)
SEED = 0  # of the choice of points on the map; fixed, so that nobody picks what looks well
MAP_QUERIES, MAP_LABELS = 800, 1200
MOST_GROUP = 4  # queries with so many pictures or more are one group


def define_flags() -> None:
    """Registers the command's flags."""
    flags.DEFINE_string("workdir", None, "Directory of the run")
    flags.DEFINE_list("compare", [], "Directories of runs to set beside it, separated by commas")
    flags.DEFINE_string("out", None, "Page to write; report.html in the workdir by default")
    flags.DEFINE_string("title", None, "Heading of the page; the workdir's name by default")


def main() -> int:
    """Runs the command."""
    if not flags.FLAGS.workdir:
        raise UserError("report needs --workdir", fix="give the directory that `vixml train` filled")
    workdir = Path(flags.FLAGS.workdir)
    out = Path(flags.FLAGS.out or workdir / "report.html")
    workdirs = [*map(Path, flags.FLAGS.compare), workdir]
    write_report(workdirs, out, flags.FLAGS.title or workdir.resolve().name)
    print(f"the report is in {out}")
    return 0


def write_report(workdirs: list[Path], out: Path, title: str) -> None:
    """Writes the page. The same runs give the same bytes.

    Args:
      workdirs: of the runs; the page is about the last one, and sets the others beside it.
      out: the HTML file.
      title: heading of the page.

    Raises:
      UserError: if one of them is not a run's directory.
    """
    for workdir in workdirs:
        files.check_run(workdir, *RUN_FILES)
    names = [workdir.resolve().name for workdir in workdirs]
    runs = [
        RunFiles(workdir, name if names.count(name) == 1 else str(workdir), len(workdirs) - 1 - number)
        for number, (workdir, name) in enumerate(zip(workdirs, names, strict=True))
    ]
    template = resources.files("vixml_jax").joinpath("report_template.html").read_text(encoding="utf-8")
    script = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)[0]
    sections: dict[str, Callable[[list[RunFiles]], str]] = {
        "headline": headline,
        "figures": figures,
        "published": published,
        "curves": curves,
        "breakdown": breakdown,
        "examples": examples,
        "map": embedding_map,
        "config": configs,
        "files": places,
    }
    page = string.Template(template).substitute(
        {name: _or_missing(section, runs) for name, section in sections.items()},
        title=escape(title),
        legend=legend([(run.name, run.color) for run in runs]),
        version=escape(__version__),
        # Nothing but the template's own script may run, whatever a title holds.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    with files.atomic_file(out, "w") as file:
        file.write(page)


def headline(runs: list[RunFiles]) -> str:
    """The dataset in one line, and each run's P@1 in large type."""
    try:
        dataset = runs[-1].dataset
        sizes = {
            "training queries": len(dataset.train),
            "test queries": len(dataset.test),
            "labels": len(dataset.labels),
        }
        counted = ", ".join(f"{size:,} {what}" for what, size in sizes.items())
        lead = f'<p class="lead">{escape(dataset.name)}: {counted}</p>'
    except UserError as error:
        lead = notes([error])
    tiles = []
    for run in runs:
        try:
            value = f"{run.figures['P@1']:.2f}"
        except (UserError, KeyError):
            value = "–"
        tiles.append(f'<div class="tile c{run.color}"><b>{value}</b><span>{escape(run.name)}</span></div>')
    return f'{lead}<div class="tiles"><p>P@1, percent</p>{"".join(tiles)}</div>'


def figures(runs: list[RunFiles]) -> str:
    """All runs' figures side by side: the usual ones, and all of them folded away."""
    known, problems = split_off(runs, lambda run: run.figures)
    names = list(dict.fromkeys(name for run in known for name in run.figures))

    def rows(chosen: Sequence[str], cell: Callable[[float | None, int], str]) -> list[list[str]]:
        lines = []
        for name in chosen:
            values = [run.figures.get(name) for run in known]
            lines.append([escape(name), *(cell(v, run.color) for v, run in zip(values, known, strict=True))])
            if len(known) == 2:
                first, last = values
                lines[-1].append("" if first is None or last is None else _signed(last - first))
        return lines

    head = ["percent", *(escape(run.name) for run in known), *(["difference"] if len(known) == 2 else [])]
    shown = table(head, rows([name for name in MAIN_FIGURES if name in names], bar), "bars")
    everything = table(head, rows(names, lambda value, _: "–" if value is None else f"{value:.2f}"))
    return (
        f"{notes(problems)}{shown}<details><summary>All {len(names)} figures</summary>{everything}</details>"
    )


def curves(runs: list[RunFiles]) -> str:
    """Loss, P@1, violators, learning rate and speed over the steps."""
    known, problems = split_off(runs, lambda run: run.records)
    charts, said = [], ""
    if any(len(run.records) > MOST_POINTS for run in known):
        said = '<p class="note">Where there are many records, neighbours are averaged.</p>'
    for name, heading, decimals in CURVES:
        series = [Series(run.name, run.color, run.curve(name)) for run in known]
        if any(len(s.points) for s in series):
            charts.append(f"<figure>{line_chart(series, heading, 'step', decimals)}</figure>")
        else:
            charts.append(f'<p class="missing">metrics.jsonl has no {name} yet.</p>')
    return f'{notes(problems)}{said}<div class="charts">{"".join(charts)}</div>'


def breakdown(runs: list[RunFiles]) -> str:
    """Figures by how often labels occur in training, and by how many pictures a query has."""
    known, problems = alike(runs)
    dataset = runs[-1].dataset
    truth, pairs = dataset.test_targets, dataset.filter_pairs_test
    torso, head = metrics.TORSO_FROM, metrics.HEAD_FROM
    meanings = {
        "head": f"in {head} or more",
        "torso": f"in {torso} to {head - 1}",
        "tail": f"in 1 to {torso - 1}",
        "unseen": "in none",
    }
    by_frequency = [
        metrics.by_label_frequency(run.predictions, truth, dataset.train_targets, filter_pairs=pairs)
        for run in known
    ]
    rows = [
        [
            f"{name} <small>{meanings[name]}</small>",
            f"{counts['labels']:,.0f}",
            f"{counts['positives']:,.0f}",
            *(
                bar(found[name][figure], run.color)
                for figure in ("P@1", "R@10")
                for found, run in zip(by_frequency, known, strict=True)
            ),
        ]
        for name, counts in by_frequency[-1].items()
    ]
    named = [f"{figure} {escape(run.name)}" for figure in ("P@1", "R@10") for run in known]
    parts = [notes(problems), "<h3>By the number of training queries of a label</h3>"]
    parts.append(table(["", "labels", "positives", *named], rows, "bars"))
    parts.append(
        '<p class="note">P@1 is the part of the whole that hits among these labels make up, so that lines '
        "add up; R@10 is of these labels alone.</p>"
    )
    parts.append("<h3>By the number of pictures of a query</h3>")
    pictures_N = np.minimum(dataset.test.images.counts(), MOST_GROUP)
    if not pictures_N.any():
        return "".join([*parts, '<p class="missing">No test query has a picture.</p>'])
    by_pictures = [metrics.by_group(run.predictions, truth, pictures_N, filter_pairs=pairs) for run in known]
    rows = [
        [
            f"{count} or more" if count == MOST_GROUP else f"{count}",
            f"{values['rows']:,.0f}",
            *(bar(found[count]["P@1"], run.color) for found, run in zip(by_pictures, known, strict=True)),
        ]
        for count, values in by_pictures[-1].items()
    ]
    named = [f"P@1 {escape(run.name)}" for run in known]
    return "".join([*parts, table(["pictures", "queries", *named], rows, "bars")])


def embedding_map(runs: list[RunFiles]) -> str:
    """Labels and test queries of the last run in the plane of their first two principal components."""
    run = runs[-1]
    dataset, rng = run.dataset, np.random.default_rng(SEED)
    rows, parts = [], []
    for of, most in (("test", MAP_QUERIES), ("labels", MAP_LABELS)):
        values = run.embeddings(of)
        rows.append(np.sort(rng.choice(len(values), min(most, len(values)), replace=False)))
        parts.append(np.asarray(values[rows[-1]], np.float64))
    queries, labels = rows
    points_N2, share = _principal_plane(np.concatenate(parts))
    place_of = {label: len(queries) + place for place, label in enumerate(labels.tolist())}
    links = [
        " ".join(str(place_of[label]) for label in positives(dataset, row).tolist() if label in place_of)
        for row in queries.tolist()
    ]
    drawn = scatter(
        points_N2,
        ["query"] * len(queries) + ["label"] * len(labels),
        [*dataset.test.titles[queries], *dataset.labels.titles[labels]],
        links + [""] * len(labels),
    )
    said = (
        f"{escape(run.name)}: {len(queries):,} of {len(dataset.test):,} test queries and {len(labels):,} of "
        f"{len(dataset.labels):,} labels (seed {SEED}), projected on their first two principal components, "
        f"which hold {100 * share:.1f} % of the variance."
    )
    kinds = '<li class="query"><i></i>query</li><li class="label"><i></i>label</li>'
    return (
        f'<p class="note">{said}</p><ul class="legend">{kinds}</ul><figure class="map">{drawn}'
        '<figcaption id="pointed" aria-live="polite">Point at a dot to read its title; a query lights up its '
        "labels.</figcaption></figure>"
    )


def configs(runs: list[RunFiles]) -> str:
    """Every field of the runs' configs, those that differ marked, folded away."""
    known, problems = split_off(runs, lambda run: run.config)
    rows, differing = [], 0
    for name in dict.fromkeys(name for run in known for name in run.config):
        values = [escape(json.dumps(run.config.get(name), ensure_ascii=False)) for run in known]
        differs = len(set(values)) > 1
        differing += differs
        cells = [f"<code>{value}</code>" for value in values]
        rows.append([f"<code>{escape(name)}</code>", *(f"<mark>{c}</mark>" if differs else c for c in cells)])
    counted = f"{len(rows)} fields" + (f", {differing} differing" if len(known) > 1 else "")
    shown = table(["field", *(escape(run.name) for run in known)], rows, "text")
    return f"{notes(problems)}<details><summary>{counted}</summary>{shown}</details>"


def places(runs: list[RunFiles]) -> str:
    """Where everything lies."""
    parts = []
    for run in runs:
        found = [
            (run.workdir / name, what if (run.workdir / name).exists() else "missing")
            for name, what in RUN_FILES.items()
        ]
        with contextlib.suppress(UserError, KeyError):
            found.append((run.config["dataset.dir"], "the prepared dataset"))
        rows = [[f"<code>{escape(path)}</code>", what] for path, what in found]
        parts.append(f"<h3>{escape(run.name)}</h3>{table(['path', 'what it is'], rows, 'text')}")
    return "".join(parts)


def _or_missing(section: Callable[[list[RunFiles]], str], runs: list[RunFiles]) -> str:
    try:
        return section(runs)
    except UserError as error:
        return notes([error])


def _principal_plane(values_ND: np.ndarray) -> tuple[np.ndarray, float]:
    """Projects rows onto their first two principal components; also the share of variance these hold."""
    centred_ND = values_ND - values_ND.mean(0)
    _, spread, axes = np.linalg.svd(centred_ND, full_matrices=False)
    axes_2D = np.zeros((2, values_ND.shape[1]))
    axes_2D[: len(axes)] = axes[:2]
    # A component may point either way; the same one each time, so that the page does not change.
    largest = np.abs(axes_2D).argmax(1)
    axes_2D *= np.where(axes_2D[[0, 1], largest] < 0, -1, 1)[:, None]
    share = float((spread[:2] ** 2).sum() / max((spread**2).sum(), 1e-30))
    return centred_ND @ axes_2D.T, share


def _signed(difference: float) -> str:
    shown = f"{difference:+.2f}"
    kind = "same" if float(shown) == 0 else "better" if difference > 0 else "worse"
    return f'<span class="{kind}">{shown}</span>'
