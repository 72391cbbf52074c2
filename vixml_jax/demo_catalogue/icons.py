"""Shapes of the things, as data: a table from a thing to the parts it is drawn of, back to front.

A part is (ink, form, coordinates, size) in a square of 100 x 100, y pointing down:

* `box`: x0 y0 x1 y1, size = radius of its corners;
* `oval`: x0 y0 x1 y1;
* `poly`: x y of each corner;
* `blob`: x y of points that a closed smooth curve runs through;
* `turned`: y and half width of points of a profile, smooth and mirrored about x = 50, as turned on a lathe;
* `line`: x y of each point, size = width;
* `arc`: x0 y0 x1 y1 of an oval, first and last angle in degrees clockwise from the right, size = width.

Inks are those of `drawing.inks`; only `body` carries the pattern, so it is the largest part of each thing.
"""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """One shape of an icon; the module's docstring says what the fields mean."""

    ink: str
    form: str
    at: tuple[float, ...]
    size: float = 0


P = Part

ICONS: dict[str, tuple[Part, ...]] = {
    # ---- kitchen
    "kettle": (
        P("ink", "arc", (24, 4, 76, 68, 200, 340), 7),
        P("trim", "poly", (70, 60, 92, 34, 99, 38, 84, 76)),
        P("body", "turned", (30, 16, 36, 27, 58, 38, 80, 40, 90, 36)),
        P("trim", "box", (13, 86, 87, 94), 4),
        P("trim", "oval", (33, 25, 67, 37)),
        P("ink", "oval", (44, 17, 56, 29)),
    ),
    "mug": (
        P("trim", "arc", (58, 28, 98, 74, 0, 360), 9),
        P("body", "box", (8, 12, 78, 92), 12),
        P("pale", "oval", (8, 5, 78, 23)),
        P("ink", "oval", (14, 8, 72, 20)),
    ),
    "teapot": (
        P("trim", "arc", (66, 30, 100, 74, 0, 360), 8),
        P("trim", "blob", (26, 70, 10, 52, 1, 34, 10, 30, 22, 44, 34, 48)),
        P("body", "blob", (50, 24, 72, 32, 84, 56, 74, 82, 50, 88, 26, 82, 16, 56, 28, 32)),
        P("trim", "box", (32, 83, 68, 92), 4),
        P("pale", "oval", (32, 21, 68, 33)),
        P("ink", "oval", (43, 10, 57, 24)),
    ),
    "bowl": (
        P("trim", "box", (32, 80, 68, 92), 4),
        P("body", "poly", (2, 32, 98, 32, 93, 54, 84, 70, 70, 82, 58, 86, 42, 86, 30, 82, 16, 70, 7, 54)),
        P("pale", "oval", (2, 18, 98, 46)),
        P("trim", "oval", (9, 22, 91, 42)),
        P("white", "oval", (22, 30, 78, 42)),
    ),
    "canister": (
        P("body", "box", (17, 20, 83, 96), 10),
        P("wood", "box", (21, 8, 79, 24), 5),
        P("wood", "box", (43, 2, 57, 12), 4),
        P("white", "box", (32, 46, 68, 70), 4),
        P("ink", "line", (39, 55, 61, 55), 3),
        P("ink", "line", (43, 62, 57, 62), 3),
    ),
    "apron": (
        P("ink", "arc", (34, -8, 66, 32, 165, 375), 4),
        P("ink", "line", (14, 48, 2, 60), 4),
        P("ink", "line", (86, 48, 98, 60), 4),
        P("body", "poly", (33, 16, 67, 16, 70, 36, 88, 48, 90, 97, 10, 97, 12, 48, 30, 36)),
        P("trim", "box", (33, 13, 67, 21), 3),
        P("trim", "box", (30, 58, 70, 82), 5),
        P("pale", "line", (30, 63, 70, 63), 3),
    ),
    # ---- home
    "lamp": (
        P("ink", "line", (50, 56, 50, 92), 6),
        P("trim", "oval", (26, 86, 74, 99)),
        P("body", "poly", (30, 4, 70, 4, 96, 62, 4, 62)),
        P("trim", "line", (6, 61, 94, 61), 5),
        P("trim", "line", (31, 5, 69, 5), 4),
        P("ink", "line", (74, 64, 74, 76), 2),
        P("ink", "oval", (71, 74, 77, 80)),
    ),
    "vase": (
        P("leaf", "line", (50, 30, 36, 6), 3),
        P("leaf", "line", (50, 30, 66, 4), 3),
        P("leaf", "oval", (25, 0, 42, 14)),
        P("leaf", "oval", (60, -2, 78, 13)),
        P("leaf", "oval", (44, 4, 58, 20)),
        P("body", "turned", (24, 15, 34, 14, 52, 32, 72, 34, 90, 22, 97, 20)),
        P("trim", "oval", (34, 20, 66, 29)),
        P("trim", "box", (29, 92, 71, 98), 3),
    ),
    "cushion": (
        P("trim", "blob", (4, 6, 50, 13, 96, 6, 89, 50, 96, 94, 50, 87, 4, 94, 11, 50)),
        P("body", "blob", (9, 11, 50, 17, 91, 11, 85, 50, 91, 89, 50, 83, 9, 89, 15, 50)),
        P("white", "oval", (45, 45, 55, 55)),
    ),
    "rug": (
        *(P("pale", "line", (x, 6, x, 94), 2.5) for x in range(12, 90, 8)),
        P("trim", "box", (4, 13, 96, 87), 3),
        P("body", "box", (9, 19, 91, 81), 2),
        P("white", "line", (10, 22, 90, 22), 2.5),
        P("white", "line", (10, 78, 90, 78), 2.5),
    ),
    "clock": (
        P("ink", "line", (28, 82, 20, 97), 7),
        P("ink", "line", (72, 82, 80, 97), 7),
        P("trim", "oval", (10, 4, 38, 32)),
        P("trim", "oval", (62, 4, 90, 32)),
        P("body", "oval", (5, 8, 95, 94)),
        P("white", "oval", (28, 30, 72, 74)),
        P("ink", "line", (50, 52, 50, 36), 4),
        P("ink", "line", (50, 52, 62, 58), 4),
    ),
    "armchair": (
        P("wood", "line", (22, 84, 16, 98), 7),
        P("wood", "line", (78, 84, 84, 98), 7),
        P("body", "box", (18, 6, 82, 72), 18),
        P("trim", "box", (20, 52, 80, 70), 6),
        P("body", "box", (14, 64, 86, 90), 6),
        P("body", "box", (1, 40, 25, 90), 10),
        P("body", "box", (75, 40, 99, 90), 10),
        P("trim", "line", (25, 50, 25, 88), 2.5),
        P("trim", "line", (75, 50, 75, 88), 2.5),
    ),
    # ---- wear
    "tote bag": (
        P("wood", "arc", (29, 0, 71, 66, 180, 360), 6),
        P("body", "poly", (12, 30, 88, 30, 95, 96, 5, 96)),
        P("trim", "poly", (12, 29, 88, 29, 89, 39, 11, 39)),
        P("wood", "oval", (26, 30, 35, 39)),
        P("wood", "oval", (65, 30, 74, 39)),
    ),
    "sneaker": (
        P(
            "body",
            "blob",
            (5, 34, 14, 24, 30, 26, 42, 34, 56, 46, 80, 54, 96, 64, 97, 78, 60, 82, 20, 82, 4, 80),
        ),
        P("trim", "blob", (4, 38, 12, 26, 20, 30, 22, 60, 18, 80, 4, 80)),
        P("white", "box", (2, 76, 99, 91), 7),
        P("trim", "line", (6, 86, 95, 86), 3),
        P("white", "line", (38, 40, 50, 32), 4.5),
        P("white", "line", (47, 47, 58, 38), 4.5),
        P("white", "line", (56, 53, 67, 44), 4.5),
    ),
    "rain boot": (
        P("body", "poly", (24, 4, 64, 4, 64, 54, 88, 64, 95, 76, 95, 88, 22, 88)),
        P("body", "oval", (68, 61, 96, 95)),
        P("trim", "box", (20, 2, 68, 15), 4),
        P("ink", "box", (19, 85, 97, 96), 4),
        P("trim", "poly", (20, 72, 38, 72, 38, 86, 20, 86)),
    ),
    "cap": (
        P("body", "blob", (4, 66, 8, 40, 24, 20, 46, 14, 66, 22, 78, 42, 80, 66, 42, 72)),
        P("trim", "blob", (34, 64, 62, 60, 86, 64, 99, 78, 80, 80, 56, 74, 36, 76)),
        P("trim", "oval", (37, 8, 51, 20)),
        P("trim", "line", (44, 16, 46, 64), 2.5),
    ),
    "umbrella": (
        P("ink", "line", (50, 4, 50, 84), 5),
        P("wood", "arc", (50, 72, 70, 98, 0, 180), 6),
        P(
            "body",
            "poly",
            (
                *(1, 58, 4, 42, 12, 28, 24, 17, 38, 11, 50, 9, 62, 11, 76, 17, 88, 28, 96, 42, 99, 58),
                *(91, 52, 83, 51, 75, 53, 67, 58, 59, 52, 50, 50, 41, 52, 33, 58, 25, 53, 17, 51, 9, 52),
            ),
        ),
        P("trim", "line", (50, 10, 40, 24, 34, 42, 33, 57), 2.5),
        P("trim", "line", (50, 10, 60, 24, 66, 42, 67, 57), 2.5),
    ),
    "backpack": (
        P("ink", "arc", (36, 0, 64, 24, 180, 360), 6),
        P("trim", "box", (6, 46, 24, 88), 8),
        P("trim", "box", (76, 46, 94, 88), 8),
        P("body", "box", (14, 10, 86, 96), 26),
        P("trim", "line", (20, 42, 80, 42), 4),
        P("trim", "box", (26, 56, 74, 90), 8),
        P("pale", "line", (30, 66, 70, 66), 3),
        P("ink", "box", (46, 38, 54, 50), 2),
    ),
    # ---- leisure
    "guitar": (
        P("ink", "box", (42, -2, 58, 12), 3),
        P("wood", "box", (45, 6, 55, 60), 1),
        P("body", "turned", (34, 20, 42, 29, 54, 22, 66, 32, 80, 39, 92, 30, 97, 14)),
        P("ink", "oval", (41, 48, 59, 66)),
        P("wood", "box", (45, 20, 55, 50), 1),
        P("ink", "box", (36, 80, 64, 86), 2),
        P("white", "line", (48.5, 8, 48.5, 82), 0.8),
        P("white", "line", (51.5, 8, 51.5, 82), 0.8),
    ),
    "drum": (
        P("body", "box", (6, 24, 94, 88), 10),
        P("trim", "box", (3, 76, 97, 90), 6),
        P("trim", "oval", (3, 12, 97, 40)),
        P("white", "oval", (9, 15, 91, 36)),
        P("wood", "line", (30, 4, 58, 28), 5),
        P("wood", "line", (84, 2, 54, 24), 5),
    ),
    "kite": (
        P("ink", "line", (50, 72, 58, 80, 46, 88, 56, 98), 2.5),
        P("body", "poly", (50, 1, 92, 34, 50, 80, 8, 34)),
        P("ink", "line", (50, 1, 50, 80), 2.5),
        P("ink", "line", (8, 34, 92, 34), 2.5),
        P("trim", "poly", (46, 84, 56, 92, 40, 92)),
        P("trim", "poly", (60, 78, 66, 88, 52, 86)),
    ),
    "surfboard": (
        P("trim", "blob", (50, 1, 68, 18, 77, 48, 72, 80, 50, 99, 28, 80, 23, 48, 32, 18)),
        P("body", "blob", (50, 6, 65, 20, 73, 48, 68, 78, 50, 94, 32, 78, 27, 48, 35, 20)),
        P("white", "line", (50, 4, 50, 96), 3),
        P("ink", "poly", (50, 74, 55, 86, 45, 86)),
    ),
    "tent": (
        P("ink", "line", (50, 16, 42, 4), 3),
        P("ink", "line", (50, 16, 58, 4), 3),
        P("body", "poly", (50, 12, 99, 90, 1, 90)),
        P("ink", "poly", (50, 42, 70, 90, 30, 90)),
        P("pale", "poly", (50, 42, 38, 70, 28, 90, 20, 90)),
        P("trim", "line", (3, 90, 97, 90), 5),
    ),
    "birdhouse": (
        P("wood", "line", (50, 82, 50, 100), 8),
        P("body", "poly", (16, 40, 50, 14, 84, 40, 84, 88, 16, 88)),
        P("trim", "line", (6, 48, 50, 11, 94, 48), 10),
        P("ink", "oval", (38, 42, 62, 66)),
        P("wood", "line", (50, 74, 50, 78), 5),
        P("trim", "box", (12, 84, 88, 92), 3),
    ),
}
