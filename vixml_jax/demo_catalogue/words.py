"""Titles of the catalogue: invented brands and series, and what a shop calls its things.

A title never says what only the picture shows: no colour and no pattern stands in it, in any word used here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Thing(NamedTuple):
    """What titles say about a kind of thing.

    Attributes:
      names: words for one of them, the usual one first.
      plural: word for several.
      materials: what it can be made of.
      sizes: as shops give them.
    """

    names: tuple[str, ...]
    plural: str
    materials: tuple[str, ...]
    sizes: tuple[str, ...]


_LITRES = ("0.6 L", "0.8 L", "1 L", "1.2 L", "1.5 L", "1.8 L")
_CUPS = ("25 cl", "30 cl", "35 cl", "40 cl", "45 cl")
_BAGS = ("8 L", "10 L", "12 L", "16 L", "20 L", "24 L")
_SPANS = ("90 cm", "100 cm", "110 cm", "120 cm", "140 cm")
_BOARDS = ("5 ft", "6 ft", "7 ft", "8 ft")
_SEATS = ("70 cm", "75 cm", "80 cm", "85 cm")
_DRUMS = ("10 inch", "12 inch", "13 inch", "14 inch")
_RUGS = ("60x90", "80x150", "120x180", "160x230")
_PERSONS = ("1 Person", "2 Persons", "3 Persons", "4 Persons")
_CENTIMETRES = ("24 cm", "28 cm", "30 cm", "36 cm", "40 cm", "45 cm")
_WORN = ("Small", "Medium", "Large", "Wide Fit", "Narrow Fit", "One Size")
_SHOE_SIZES = ("Size 36", "Size 38", "Size 39", "Size 40", "Size 42", "Size 44")
_CLAY = ("Stoneware", "Porcelain", "Enamel", "Earthenware")
_CLOTH = ("Cotton", "Linen", "Canvas", "Wool")
_SHELL = ("Canvas", "Nylon", "Recycled Polyester", "Waxed Cotton")

# Departments -> kinds of things, by the keys of `icons.ICONS`. A series stays within its department.
DEPARTMENTS: dict[str, dict[str, Thing]] = {
    "kitchen": {
        "kettle": Thing(("Kettle", "Stovetop Kettle"), "Kettles", ("Enamel", "Steel", "Cast Iron"), _LITRES),
        "mug": Thing(("Mug", "Coffee Mug", "Cup"), "Mugs", _CLAY, _CUPS),
        "teapot": Thing(("Teapot", "Tea Pot"), "Teapots", _CLAY, _LITRES),
        "bowl": Thing(("Bowl", "Serving Bowl"), "Bowls", (*_CLAY, "Bamboo"), _CENTIMETRES),
        "canister": Thing(("Canister", "Storage Jar"), "Canisters", ("Enamel", "Tin", "Porcelain"), _LITRES),
        "apron": Thing(("Apron", "Bib Apron"), "Aprons", _CLOTH, _WORN),
    },
    "home": {
        "lamp": Thing(("Table Lamp", "Lamp"), "Lamps", ("Linen", "Paper", "Glass"), _CENTIMETRES),
        "vase": Thing(("Vase", "Flower Vase"), "Vases", (*_CLAY, "Glass"), _CENTIMETRES),
        "cushion": Thing(("Cushion", "Throw Pillow"), "Cushions", _CLOTH, _CENTIMETRES),
        "rug": Thing(("Rug", "Floor Mat"), "Rugs", ("Wool", "Jute", "Cotton"), _RUGS),
        "clock": Thing(("Alarm Clock", "Clock"), "Clocks", ("Steel", "Wood", "Tin"), _CENTIMETRES),
        "armchair": Thing(("Armchair", "Reading Chair"), "Armchairs", _CLOTH, _SEATS),
    },
    "wear": {
        "tote bag": Thing(("Tote Bag", "Shopper"), "Tote Bags", _SHELL, _BAGS),
        "sneaker": Thing(("Sneakers", "Trainers"), "Sneakers", ("Canvas", "Mesh", "Hemp"), _SHOE_SIZES),
        "rain boot": Thing(("Rain Boots", "Wellies"), "Rain Boots", ("Rubber", "Vinyl"), _SHOE_SIZES),
        "cap": Thing(("Cap", "Sports Cap"), "Caps", ("Cotton", "Hemp", "Mesh"), _WORN),
        "umbrella": Thing(("Umbrella", "Folding Umbrella"), "Umbrellas", _SHELL, _SPANS),
        "backpack": Thing(("Backpack", "Daypack", "Rucksack"), "Backpacks", _SHELL, _BAGS),
    },
    "leisure": {
        "guitar": Thing(("Guitar", "Acoustic Guitar"), "Guitars", ("Spruce", "Cedar"), ("1/2", "3/4", "4/4")),
        "drum": Thing(("Drum", "Snare Drum"), "Drums", ("Birch", "Maple", "Steel"), _DRUMS),
        "kite": Thing(("Kite", "Sport Kite"), "Kites", ("Nylon", "Ripstop"), _SPANS),
        "surfboard": Thing(("Surfboard", "Foam Board"), "Surfboards", ("Foam", "Epoxy"), _BOARDS),
        "tent": Thing(("Tent", "Camping Tent"), "Tents", _SHELL, _PERSONS),
        "birdhouse": Thing(("Birdhouse", "Nest Box"), "Birdhouses", ("Pine", "Cedar", "Larch"), _CENTIMETRES),
    },
}  # fmt: skip
THINGS = {key: thing for things in DEPARTMENTS.values() for key, thing in things.items()}

_EXTRAS = (
    *("for Everyday Use", "Gift Boxed", "with Care Guide", "Lightweight", "Hand Made", "Second Edition"),
    *("Family Pack", "Easy Care", "for Beginners", "Compact", "Heavy Duty", "Studio Edition", "Set of 2"),
)
_PHRASES = (
    *("{} for Small Homes", "{} for Travel", "Gift Ideas: {}", "{} under 30", "{} for Kids"),
    *("Best Rated {}", "{} for Professionals", "Storage for {}"),
)
_TEMPLATES = (
    "{brand} {series} {material} {thing}, {size}",
    "{brand} {series} {thing}, {material}, {size}, {extra}",
    "{series} {material} {thing} by {brand} ({size})",
    "{brand} {thing} {series} {size} {extra}",
    "{series} {thing} {extra}, {material}, {size}",
    "{brand} {series} Series {thing} {size}, {material}, {extra}",
)

_BRANDS = (
    ("Quor", "Veld", "Brim", "Osk", "Tarv", "Lumb", "Hesp", "Yarr", "Drev", "Plov", "Mirr", "Jost"),
    ("amo", "issel", "undra", "okken", "elby", "ando", "ivex", "oria", "umble", "ette"),
)
_SERIES = (
    ("Sund", "Ember", "Kall", "Thim", "Wex", "Norr", "Ilm", "Fjel", "Pras", "Ondr", "Gant", "Zeph", "Ulv"),
    ("era", "mark", "wick", "olin", "aster", "heim", "ura", "opia", "enza", "dale", "ison"),
)


def brand_name(number: int) -> str:
    """Returns the name of a brand; a new one for every number."""
    return _name(_BRANDS, number)


def series_name(number: int) -> str:
    """Returns the name of a series; a new one for every number."""
    return _name(_SERIES, number)


def title(brand: str, series: str, thing: str, rng: np.random.Generator) -> str:
    """Writes the title of a product; another draw may give the same one."""
    words = THINGS[thing]
    # The usual word most of the time: synonyms exist, but seldom.
    name = words.names[0] if rng.random() < 0.7 else _one_of(words.names, rng)
    return _one_of(_TEMPLATES, rng).format(
        brand=brand,
        series=series,
        thing=name,
        material=_one_of(words.materials, rng),
        size=_one_of(words.sizes, rng),
        extra=_one_of(_EXTRAS, rng),
    )


def phrases(thing: str, number: int, rng: np.random.Generator) -> list[str]:
    """Returns different phrases that shoppers use for a kind of thing, whatever it looks like."""
    chosen = rng.permutation(len(_PHRASES))[:number]
    return [_PHRASES[i].format(THINGS[thing].plural) for i in chosen]


def _name(parts: tuple[tuple[str, ...], tuple[str, ...]], number: int) -> str:
    starts, ends = parts
    # Both parts change from one number to the next, so that few names in a row look alike.
    cycle, rest = divmod(number, len(starts) * len(ends))
    row, column = divmod(rest, len(starts))
    name = starts[column] + ends[(row + column) % len(ends)]
    return name if not cycle else f"{name} {cycle + 1}"


def _one_of(values: tuple[str, ...], rng: np.random.Generator) -> str:
    return values[int(rng.integers(len(values)))]
