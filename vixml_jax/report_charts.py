"""Pieces of the report's page: escaped text, tables, and charts as inline SVG."""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

# Size of a chart in its own units: about the pixels it gets, so that its letters stay readable.
WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 60, 22, 30, 42
MAP_WIDTH, MAP_HEIGHT, MAP_MARGIN = 720, 520, 14
# Points of a curve that are drawn; of more, neighbours are averaged.
MOST_POINTS = 120


def escape(text: object, most: int = 300) -> str:
    """Makes any text safe in HTML and its attributes: escaped, cut at `most` characters, no control codes."""
    plain = str(text).encode("utf-8", "replace").decode()
    plain = "".join(c if c.isprintable() else " " for c in plain)
    return html.escape(plain if len(plain) <= most else plain[: most - 1] + "…")


def bdi(text: object, most: int = 300) -> str:
    """A title of the data: escaped, and kept from turning the text around it to the other direction."""
    return f"<bdi>{escape(text, most)}</bdi>"


def notes(problems: Sequence[Exception]) -> str:
    """What is wrong or missing, a line each."""
    return "".join(f'<p class="missing">{escape(problem)}</p>' for problem in problems)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], classes: str = "") -> str:
    """Lays out cells of HTML; the first of a row names it, and a narrow screen scrolls sideways."""
    heads = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>\n'
        for row in rows
    )
    opened = f'<div class="scroll"><table class="{classes}">'
    return f"{opened}<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"


def bar(percent: float | None, color: int) -> str:
    """A cell's figure in percent, over a bar of that length; `color` as in `legend`."""
    if percent is None:
        return '<span class="none">–</span>'
    width = min(max(percent, 0.0), 100.0)
    return f'{percent:.2f}<span class="bar c{color}"><i style="width:{width:.1f}%"></i></span>'


def legend(names: Sequence[tuple[str, int]]) -> str:
    """Names with their colours: number 0 is the accent, the others are grey."""
    items = "".join(f'<li class="c{color}"><i></i>{escape(name)}</li>' for name, color in names)
    return f'<ul class="legend">{items}</ul>'


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
      name: of its run.
      color: as in `legend`.
      points: float [n, 2], by rising x.
    """

    name: str
    color: int
    points: np.ndarray


def line_chart(series: Sequence[Series], heading: str, x_label: str, decimals: int) -> str:
    """Draws curves over common axes; pointing at a place shows the figures there."""
    shown = [s for s in series if len(s.points)]
    xs = np.unique(np.concatenate([s.points[:, 0] for s in shown]))
    bins = xs if len(xs) <= MOST_POINTS else np.linspace(xs[0], xs[-1], MOST_POINTS + 1)[:-1]
    curves = [(s, _averaged(s.points, bins)) for s in shown]
    values = np.concatenate([points[:, 1] for _, points in curves])
    y_ticks = _ticks(0.0 if 0 <= values.min() < 0.5 * values.max() else values.min(), values.max(), 5)
    x_ticks = _ticks(min(xs[0], 0.0), xs[-1], 5)
    x_low, x_high = x_ticks[0], x_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(heading)}">']
    for y in y_ticks:
        at = place(x_low, y)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_tick(y, y_ticks)}</text>')
    for x in x_ticks:
        at = place(x, y_ticks[0])[0]
        parts.append(
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_tick(x, x_ticks)}</text>'
        )
    parts.append(f'<text class="axis" x="{LEFT - 8}" y="14" text-anchor="start">{escape(heading)}</text>')
    parts.append(
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_label)}</text>'
    )
    for s, points in reversed(curves):  # the accent on top
        line = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
        parts.append(f'<polyline class="line c{s.color}" points="{line}"/>')
        if len(points) <= 20:
            for x, y in points:
                cx, cy = place(x, y)
                parts.append(f'<circle class="point c{s.color}" cx="{cx:.1f}" cy="{cy:.1f}" r="2.5"/>')
    parts += _readouts(curves, bins, place, x_label, decimals)
    return "".join([*parts, "</svg>"])


def scatter(points_N2: np.ndarray, kinds: Sequence[str], titles: Sequence[str], links: Sequence[str]) -> str:
    """Draws a map of points, both axes to one scale.

    Args:
      points_N2: places.
      kinds: class of each point.
      titles: shown where one points.
      links: for each point the numbers of points that belong to it, separated by blanks; may be empty.
    """
    low, high = points_N2.min(0), points_N2.max(0)
    room = np.array([MAP_WIDTH, MAP_HEIGHT]) - 2 * MAP_MARGIN
    scale = float((room / np.maximum(high - low, 1e-9)).min())
    places = (points_N2 - (low + high) / 2) * scale * [1, -1] + np.array([MAP_WIDTH, MAP_HEIGHT]) / 2
    dots = []
    for (x, y), kind, name, linked in zip(places, kinds, titles, links, strict=True):
        data = f' data-links="{linked}"' if linked else ""
        dots.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"{data}>'
            f"<title>{escape(name, 120)}</title></circle>"
        )
    opened = f'<svg id="map" viewBox="0 0 {MAP_WIDTH} {MAP_HEIGHT}" role="img" aria-label="Embedding map">'
    return opened + "\n".join(dots) + "</svg>"


def _averaged(points: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Means of the points in each bin (given by their starts), bins without a point left out."""
    place = np.searchsorted(bins, points[:, 0], side="right") - 1
    counts = np.bincount(place, minlength=len(bins))
    sums = np.stack([np.bincount(place, column, len(bins)) for column in points.T], axis=1)
    return sums[counts > 0] / counts[counts > 0, None]


def _readouts(
    curves: Sequence[tuple[Series, np.ndarray]],
    bins: np.ndarray,
    place: Callable[[float, float], tuple[float, float]],
    x_label: str,
    decimals: int,
) -> list[str]:
    """A column of each bin that shows its figures while it is pointed at; styles do the work, no script."""
    columns: list[list[tuple[Series, float, float]]] = [[] for _ in bins]
    for s, points in curves:
        for x, y in points:
            columns[int(np.searchsorted(bins, x, side="right")) - 1].append((s, x, y))
    filled = [column for column in columns if column]
    centres = [place(float(np.mean([x for _, x, _ in column])), 0.0)[0] for column in filled]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(centres)]
    parts = []
    for column, at, start, stop in zip(
        filled, centres, [LEFT, *middles], [*middles, WIDTH - RIGHT], strict=True
    ):
        text = f"{x_label} {column[0][1]:,.0f}"
        text += "".join(f" · {escape(s.name, 24)} {y:.{decimals}f}" for s, _, y in column)
        dots = "".join(
            f'<circle class="c{s.color}" cx="{place(x, y)[0]:.1f}" cy="{place(x, y)[1]:.1f}" r="4"/>'
            for s, x, y in column
        )
        parts.append(
            f'<g class="readout"><rect x="{start:.1f}" y="0" width="{max(stop - start, 1):.1f}" '
            f'height="{HEIGHT}"/><line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>{dots}'
            f'<text x="{WIDTH - RIGHT}" y="14" text-anchor="end">{text}</text></g>'
        )
    return parts


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers, about so many, of which the outer ones enclose `low` and `high`."""
    if high <= low:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _tick(value: float, ticks: Sequence[float]) -> str:
    """A tick's label, with as many decimals as its axis needs; 1.5e-4 where that would be many."""
    step = ticks[1] - ticks[0]
    if step < 1e-3 and max(map(abs, ticks)) < 1e-2:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}" if value else "0"
    decimals = next(d for d in range(8) if d == 7 or abs(round(step, d) - step) < 1e-9)
    return f"{value:,.{decimals}f}"
