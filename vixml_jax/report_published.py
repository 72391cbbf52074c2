"""The report's anchors: what was published on the run's dataset, where that is one of the paper's."""

from __future__ import annotations

from vixml_jax import recipes, tables
from vixml_jax.data.dataset import XmcDataset
from vixml_jax.errors import UserError
from vixml_jax.report_charts import bar, escape, table
from vixml_jax.report_runs import RunFiles

# Of the paper: backbones on titles, the same with pictures, other methods.
TABLES = (1, 3, 7)
METRICS = ("P@1", "P@5", "PSP@1", "R@100")


def published(runs: list[RunFiles]) -> str:
    """The runs' figures among those of the paper's tables on the same dataset; "" for any other dataset."""
    try:
        dataset = runs[-1].dataset
    except UserError:
        return ""  # the headline says what is wrong with it
    name = paper_name(dataset)
    if name is None:
        return ""
    lines = []
    for run in runs:
        try:
            found, alike = run.figures, paper_name(run.dataset) == name
        except UserError:
            continue  # other sections say so
        if alike:
            cells = [bar(found.get(metric), run.color) for metric in METRICS]
            lines.append([f"<mark>{escape(run.name)}</mark>", *cells])
    known = tables.load()
    for number in TABLES:
        for row in known[number].rows:
            if row.dataset == name:
                figures = dict(zip(known[number].metrics, row.figures, strict=True))
                cells = [bar(figures.get(metric), 1) for metric in METRICS]
                lines.append([f"{escape(row.name)} <small>Table {number}</small>", *cells])
    title = escape(recipes.DATASETS[name].title)
    heading = f"<h3>Beside what was published on {title}</h3>"
    return heading + table(["percent", *METRICS], lines, "bars")


def paper_name(dataset: XmcDataset) -> str | None:
    """Which of the paper's datasets it is, by name and by the rows of every split; None if it is another."""
    name = dataset.name.lower().replace("-", "_").replace(".", "p")  # LF-AmazonTitles-1.3M too
    wanted = recipes.DATASETS.get(name)
    if wanted is None:
        return None
    sizes = (len(dataset.train), len(dataset.test), len(dataset.labels))
    return name if sizes == (wanted.train, wanted.test, wanted.labels) else None
