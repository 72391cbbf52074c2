"""The report's examples: test queries with their pictures, what each run says of them, and what is right."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image, ImageOps

from vixml_jax.data.dataset import XmcDataset
from vixml_jax.data.pictures import decode
from vixml_jax.report_charts import bdi, escape, notes
from vixml_jax.report_runs import RunFiles, alike, positives

SEED = 0  # of the choice; fixed, so that nobody picks what looks well
EXAMPLES, FIRST = 50, 10  # of them so many are shown at once, the others when asked for
TOP, MOST_LABELS, MOST_PICTURES = 5, 15, 4
THUMBNAIL = 144  # pixels; shown at half of it


def examples(runs: list[RunFiles]) -> str:
    """Some test queries, what each run says about them, and what is right."""
    known, problems = alike(runs)
    dataset = runs[-1].dataset
    size = len(dataset.test)
    chosen = np.random.default_rng(SEED).choice(size, min(EXAMPLES, size), replace=False)
    # In the order in which they were drawn, so that those shown at once are a sample too.
    cards = [_example(dataset, known, int(row)) for row in chosen]
    more = ""
    if cards[FIRST:]:
        more = (
            f"<details><summary>{len(cards) - FIRST} more examples</summary>"
            f'<div class="examples">{"".join(cards[FIRST:])}</div></details>'
        )
    said = (
        f"{len(chosen)} of {size:,} test queries, drawn at random (seed {SEED}) and shown whatever they look "
        "like. ✓ marks a right label, ✗ a wrong one; figures are scores."
    )
    shown = f'<div class="examples">{"".join(cards[:FIRST])}</div>{more}'
    return f'{notes(problems)}<p class="note">{said}</p>{shown}'


def _example(dataset: XmcDataset, runs: list[RunFiles], row: int) -> str:
    """The card of one test query."""
    split, titles = dataset.test, dataset.labels.titles
    name, labels = split.titles[row], positives(dataset, row)
    pictures = "".join(_thumbnail(picture, name) for picture in split.images[row][:MOST_PICTURES])
    truth = [bdi(text) for text in titles[labels[:MOST_LABELS]]] or ["none"]
    if len(labels) > MOST_LABELS:
        truth.append(f"and {len(labels) - MOST_LABELS} more")
    answers = []
    for run in runs:
        best = run.best(row, TOP)
        items = []
        for label, score in best:
            kind, mark = ("hit", "✓") if label in labels else ("miss", "✗")
            items.append(
                f'<li class="{kind}"><span class="mark">{mark}</span>{bdi(titles[label])}'
                f'<span class="score">{score:.3f}</span></li>'
            )
        right = np.isin([label for label, _ in best], labels).sum()
        answers.append(
            f'<div class="answer c{run.color}"><h4>{escape(run.name)} <small>{right} of {len(best)} right'
            f"</small></h4><ol>{''.join(items)}</ol></div>"
        )
    return (
        f'<article><div class="query"><h3>{bdi(name)}</h3><p class="uid">row {row} · '
        f'{bdi(split.uids[row], 60)}</p><div class="pictures">{pictures}</div><h4>True labels</h4>'
        f'<ul class="truth">{"".join(f"<li>{text}</li>" for text in truth)}</ul></div>'
        f'<div class="answers">{"".join(answers)}</div></article>\n'
    )


def _thumbnail(picture: bytes, name: str) -> str:
    """A small picture inside the page; nothing for one that is missing or cannot be read."""
    image = decode(picture)
    if image is None:
        return ""
    small = ImageOps.contain(image, (THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.save(data, "JPEG", quality=80)
    encoded = base64.b64encode(data.getvalue()).decode()
    size = f'width="{(small.width + 1) // 2}" height="{(small.height + 1) // 2}"'
    return f'<img src="data:image/jpeg;base64,{encoded}" {size} alt="{escape(name, 80)}">'
