"""What the catalogue holds: products, and which of them belong together.

A series is sold in a few finishes, a finish being a colour with a pattern. Shoppers of a product look for the
other things of its series in its own finish, and now and then for the same thing with the same pattern
elsewhere. Titles name the series and the thing; only pictures show the finish. So titles alone narrow the
labels down to a series, and guess by what sells best; titles with pictures find the right ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vixml_jax.demo_catalogue import words
from vixml_jax.demo_catalogue.drawing import COLOURS, PATTERNS

QUERIES_PER_SERIES = 75
FINISHES_PER_SERIES = 5
PHRASES_PER_THING = 4
SERIES_PER_BRAND = 2
# Exponents of Zipf's law: how much more often the first of a kind sells than the n-th.
ZIPF_SERIES, ZIPF_FINISHES, ZIPF_LABELS, ZIPF_PHRASES = 0.6, 1.2, 1.2, 1.0
# Of all items: how many have no picture; of those with pictures: how many have one, two, three.
WITHOUT_IMAGES, IMAGES = 0.1, (0.5, 0.3, 0.2)
# Share of queries that are products of the label set themselves, as in a shop's log.
ALSO_LABELS = 0.1


class Finish(NamedTuple):
    """How a product looks; keys of `drawing.COLOURS` and `drawing.PATTERNS`."""

    colour: str
    pattern: str


class Series(NamedTuple):
    """A series of products of one brand.

    Attributes:
      brand: name of the brand.
      name: of the series.
      things: kinds of things in it.
      finishes: in which they are sold, best-selling first, each in another colour.
    """

    brand: str
    name: str
    things: tuple[str, ...]
    finishes: tuple[Finish, ...]


@dataclasses.dataclass
class Item:
    """A query or a label.

    Attributes:
      uid: of the product; a query that is also a label has the same in both.
      title: text.
      series: number of its series; -1 for phrases.
      thing: kind of thing.
      finish: None for phrases, which have no pictures.
      images: how many pictures it has.
      targets: labels that are relevant to it, increasing; empty for labels.
    """

    uid: str
    title: str
    series: int
    thing: str
    finish: Finish | None
    images: int
    targets: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Catalogue:
    """Everything but the pictures.

    Attributes:
      train, test: queries.
      labels: labels; each is relevant to at least one query of `train`.
      filter_train, filter_test: pairs (row, label) of queries that are labels themselves.
    """

    train: list[Item]
    test: list[Item]
    labels: list[Item]
    filter_train: list[tuple[int, int]]
    filter_test: list[tuple[int, int]]


def make(num_train: int, num_test: int, seed: int) -> Catalogue:
    """Makes up a catalogue; the same arguments give the same one.

    Args:
      num_train, num_test: number of queries.
      seed: of all choices.
    """
    maker = _Maker(max(4, round(num_train / QUERIES_PER_SERIES)), np.random.default_rng(seed))
    train = [maker.query() for _ in range(num_train)]
    known = {target for query in train for target in query.targets}
    test: list[Item] = []
    while len(test) < num_test:
        query = maker.query(known)
        if query.targets:
            test.append(query)
    # Labels that no training query has are left out, as in the field's sets; the others in random order.
    kept = maker.rng.permutation(sorted(known)).tolist()
    rows = {label: row for row, label in enumerate(kept)}
    for query in train + test:
        query.targets = sorted(rows[target] for target in query.targets)
    labels = [maker.labels[label] for label in kept]
    by_uid = {label.uid: row for row, label in enumerate(labels)}
    filters = [
        [(row, by_uid[query.uid]) for row, query in enumerate(queries) if query.uid in by_uid]
        for queries in (train, test)
    ]
    return Catalogue(train, test, labels, *filters)


class _Maker:
    """Draws labels once, then queries one by one.

    Args:
      num_series: how many series there are; labels grow with it.
      rng: decides everything.
    """

    def __init__(self, num_series: int, rng: np.random.Generator):
        self.rng = rng
        self._titles: set[str] = set()
        self._num_products = 0
        self._series = [self._new_series(number) for number in range(num_series)]
        self._series_shares = _zipf(num_series, ZIPF_SERIES)
        self.labels: list[Item] = []
        # Labels by what makes them relevant, each list with the best-selling first.
        self._by_series: dict[tuple[int, Finish], list[int]] = {}
        self._by_look: dict[tuple[str, str], list[int]] = {}
        self._phrases: dict[str, list[int]] = {}
        self._add_labels()
        self._unused = {
            (label.series, label.thing, label.finish): number for number, label in enumerate(self.labels)
        }

    def query(self, known: set[int] | None = None) -> Item:
        """Draws a query with its labels, those outside `known` left out."""
        number = self._draw(self._series_shares)
        series = self._series[number]
        finish = series.finishes[self._draw(_zipf(len(series.finishes), ZIPF_FINISHES))]
        thing = series.things[int(self.rng.integers(len(series.things)))]
        own = None
        if self.rng.random() < ALSO_LABELS:
            own = self._unused.pop((number, thing, finish), None)
        query = self._product(number, thing, finish)
        if own is not None:
            query = dataclasses.replace(query, uid=self.labels[own].uid, title=self.labels[own].title)
        group = [label for label in self._by_series[number, finish] if label != own]
        chosen = self._choose(group, 1 + self.rng.binomial(4, 0.45))
        same_look = self._by_look[thing, finish.pattern]
        elsewhere = [label for label in same_look if self.labels[label].series != number]
        chosen |= self._choose(elsewhere, self.rng.binomial(2, 0.3))
        chosen |= self._choose(self._phrases[thing], self.rng.binomial(1, 0.35))
        query.targets = sorted(chosen if known is None else chosen & known)
        return query

    def _new_series(self, number: int) -> Series:
        departments = list(words.DEPARTMENTS.values())
        colours = self.rng.permutation(list(COLOURS))[:FINISHES_PER_SERIES]
        patterns = self.rng.choice(PATTERNS, size=FINISHES_PER_SERIES)
        return Series(
            words.brand_name(number // SERIES_PER_BRAND),
            words.series_name(number),
            tuple(departments[number % len(departments)]),
            tuple(
                Finish(str(colour), str(pattern)) for colour, pattern in zip(colours, patterns, strict=True)
            ),
        )

    def _add_labels(self) -> None:
        for number, series in enumerate(self._series):
            for finish in series.finishes:
                group = self._by_series[number, finish] = []
                for thing in self.rng.permutation(series.things).tolist():
                    group.append(len(self.labels))
                    self._by_look.setdefault((thing, finish.pattern), []).append(len(self.labels))
                    self.labels.append(self._product(number, thing, finish))
        for thing in words.THINGS:
            numbers = self._phrases[thing] = []
            for phrase in words.phrases(thing, PHRASES_PER_THING, self.rng):
                numbers.append(len(self.labels))
                self._titles.add(phrase)
                self.labels.append(Item(self._uid(), phrase, -1, thing, None, 0))

    def _product(self, number: int, thing: str, finish: Finish) -> Item:
        """Draws a product with a title that no other one has."""
        series = self._series[number]
        for _ in range(20):
            title = words.title(series.brand, series.name, thing, self.rng)
            if title not in self._titles:
                break
        else:  # all but used up, as in a large catalogue
            title = f"{title} No. {self._num_products}"
        self._titles.add(title)
        images = 1 + self._draw(IMAGES) if self.rng.random() >= WITHOUT_IMAGES else 0
        return Item(self._uid(), title, number, thing, finish, images)

    def _uid(self) -> str:
        self._num_products += 1
        return f"P{self._num_products:07d}"

    def _choose(self, labels: Sequence[int], number: int) -> set[int]:
        """Draws up to `number` different ones of `labels`, the first ones more often."""
        number = min(number, len(labels))
        if not number:
            return set()
        shares = _zipf(len(labels), ZIPF_LABELS)
        return set(self.rng.choice(labels, size=number, replace=False, p=shares).tolist())

    def _draw(self, shares: Sequence[float] | np.ndarray) -> int:
        return int(self.rng.choice(len(shares), p=shares))


def _zipf(number: int, exponent: float) -> np.ndarray:
    """Returns shares that fall with the rank, float64 [number], their sum 1."""
    shares = np.arange(1, number + 1) ** -exponent
    return shares / shares.sum()
