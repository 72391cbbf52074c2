"""Pictures of products: a flat icon in one colour, carrying a pattern, seen from slightly different sides.

Colour fills most of a picture and a pattern repeats about every eight pixels, so that a vision tower that
sees patches of eight pixels and was never trained can tell both apart.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from vixml_jax.demo_catalogue.icons import ICONS, Part

SIZE = 64  # pixels of a picture, both ways
# Twice reduced: art is drawn large without anti-aliasing, seen at twice the size, and reduced to pixels.
_ART, _SEEN = 256, 2 * SIZE
_MARGIN = 16  # around an icon's square in the art

Colour = tuple[int, int, int]
COLOURS: dict[str, Colour] = {
    "red": (206, 54, 52),
    "orange": (240, 138, 40),
    "yellow": (240, 200, 52),
    "green": (92, 158, 70),
    "teal": (28, 148, 148),
    "blue": (54, 104, 200),
    "purple": (126, 82, 176),
    "pink": (238, 132, 172),
    "brown": (138, 92, 62),
    "grey": (116, 124, 134),
}
PATTERNS = ("plain", "stripes", "dots", "checks", "waves", "triangles")
_WHITE, _CREAM = (255, 255, 255), (250, 246, 238)
_INK, _WOOD, _LEAF = (58, 54, 60), (186, 140, 98), (104, 146, 96)
# Distances of a pattern in the art: about eight pixels once a thing is seen.
_PERIOD = 36
_SHADOW = Image.new("L", (_SEEN, _SEEN), 41)  # how much of a thing's alpha its shadow has, of 255
_DARK = Image.new("RGB", (SIZE, SIZE))
# Of each view: smallest and largest scale, largest turn in degrees.
_VIEWS = ((0.96, 1.08, 8), (0.82, 0.94, 24), (1.3, 1.5, 16))


def draw(thing: str, colour: str, pattern: str, view: int, rng: np.random.Generator) -> bytes:
    """Draws one picture of a product, as the bytes of a PNG file.

    Args:
      thing: a key of `icons.ICONS`.
      colour: a key of `COLOURS`.
      pattern: one of `PATTERNS`.
      view: 0 from the front, 1 smaller and turned, 2 and further ones close by.
      rng: decides about angle, place, background and light, so that no two pictures are the same.
    """
    smallest, largest, angle = _VIEWS[min(view, 2)]
    scale = rng.uniform(smallest, largest)
    turned = np.deg2rad(rng.uniform(-angle, angle))
    mirrored = -1 if rng.random() < (0.5 if view else 0.2) else 1
    shift_x, shift_y = rng.uniform(-0.04, 0.04, size=2) * _SEEN
    # From a place in the picture to one in the art: shifted back, turned back, scaled back.
    cos, sin = np.cos(turned) * _ART / _SEEN / scale, np.sin(turned) * _ART / _SEEN / scale
    x, y = _SEEN / 2 + shift_x, _SEEN / 2 + shift_y
    back = np.array([[mirrored * cos, mirrored * sin], [-sin, cos]])
    offset = _ART / 2 - back @ np.array([x, y])
    matrix = (*back[0], offset[0], *back[1], offset[1])
    seen = art(thing, colour, pattern).transform(
        (_SEEN, _SEEN), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    seen = seen.convert("RGBA")
    picture = _background(colour, view, rng)
    shadow = ImageChops.multiply(seen.getchannel("A"), _SHADOW)
    picture.paste(_INK, (3, 5), shadow)
    picture.paste(seen, (0, 0), seen)
    picture = Image.blend(_DARK, picture.reduce(2), rng.uniform(0.93, 1.04))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)  # a fifth faster than at 6, for 3 % more bytes
    return buffer.getvalue()


def inks(colour: str) -> dict[str, Colour]:
    """Returns the colour of each ink in which the icon of a product of `colour` is drawn."""
    main = COLOURS[colour]
    return {
        "body": main,
        "trim": _mix(main, _INK, 0.38),
        "pale": _mix(main, _WHITE, 0.62),
        "white": _CREAM,
        "ink": _INK,
        "wood": _WOOD,
        "leaf": _LEAF,
    }


@functools.lru_cache(maxsize=64)
def art(thing: str, colour: str, pattern: str) -> Image.Image:
    """Draws a product large and without a background; every view of it is taken from here.

    Colours are multiplied by alpha already (Pillow's mode RGBa), as turning the art needs them.
    """
    image = Image.new("RGBA", (_ART, _ART))
    palette = inks(colour)
    shade = palette["trim"]
    for part, box, mask in _masks(thing):
        ink = _texture(colour, pattern).crop(box) if part.ink == "body" else palette[part.ink]
        image.paste(ink, box, mask)
        if part.ink == "body" and part.form != "line":
            # Flat shading: the rim on the right lies in the dark.
            inner = Image.new("L", mask.size)
            inner.paste(mask, (-9, -3))
            rim = ImageChops.subtract(mask, inner)
            image.paste(shade, box, rim)
    return image.convert("RGBa")


@functools.cache
def _texture(colour: str, pattern: str) -> Image.Image:
    """Draws the patterned cloth of which a body is cut, RGBA."""
    main = COLOURS[colour]
    image = Image.new("RGBA", (_ART, _ART), (*main, 255))
    draw = ImageDraw.Draw(image)
    second = (*_mix(main, _WHITE, 0.68), 255)
    step, rows = _PERIOD, range(-1, _ART // _PERIOD + 2)
    if pattern == "stripes":
        for i in rows:
            draw.rectangle((i * step, 0, i * step + step // 2 - 1, _ART), fill=second)
    elif pattern == "dots":
        for i in rows:
            for j in rows:
                x, y, radius = i * step + step // 2 * (j % 2), j * step, 0.29 * step
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=second)
    elif pattern == "checks":
        half = step // 2
        for i in range(2 * len(rows)):
            for j in range(i % 2, 2 * len(rows), 2):
                draw.rectangle((i * half, j * half, (i + 1) * half - 1, (j + 1) * half - 1), fill=second)
    elif pattern == "waves":
        xs = np.arange(-4, _ART + 8, 4)
        for j in rows:
            ys = j * step + 0.26 * step * np.sin(2 * np.pi * xs / (1.4 * step))
            points = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
            draw.line(points, fill=second, width=round(0.3 * step), joint="curve")
    elif pattern == "triangles":
        for i in rows:
            for j in rows:
                x, y = i * step + step // 2 * (j % 2), j * step
                draw.polygon((x, y + 0.8 * step, x + step // 2, y, x + step, y + 0.8 * step), fill=second)
    return image


@functools.cache
def _masks(thing: str) -> list[tuple[Part, tuple[int, int, int, int], Image.Image]]:
    """Returns the parts of an icon, each with its box in the art and what it covers there."""
    masks = []
    for part in ICONS[thing]:
        mask = Image.new("L", (_ART, _ART))
        _fill(ImageDraw.Draw(mask), part)
        box = mask.getbbox()
        assert box is not None  # every part can be seen
        masks.append((part, box, mask.crop(box)))
    return masks


def _fill(draw: ImageDraw.ImageDraw, part: Part) -> None:
    unit = (_ART - 2 * _MARGIN) / 100
    width = max(1, round(part.size * unit))
    if part.form == "turned":
        y, half = np.array(part.at).reshape(-1, 2).T
        right = np.stack([50 + half, y], axis=1)
        points = np.concatenate([_smooth(right), (_smooth(right) * (-1, 1) + (100, 0))[::-1]])
    else:
        number = 4 if part.form == "arc" else len(part.at)
        points = np.array(part.at[:number]).reshape(-1, 2)
    if part.form == "blob":
        points = _smooth(np.concatenate([points[-1:], points, points[:2]]))[_STEPS:-_STEPS]
    xy = [(float(x), float(y)) for x, y in points * unit + _MARGIN]
    match part.form:
        case "box":
            draw.rounded_rectangle(xy, radius=part.size * unit, fill=255)
        case "oval":
            draw.ellipse(xy, fill=255)
        case "arc":
            draw.arc(xy, *part.at[4:], fill=255, width=width)
        case "line":
            draw.line(xy, fill=255, width=width, joint="curve")
            for x, y in (xy[0], xy[-1]):  # round ends
                draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
        case _:
            draw.polygon(xy, fill=255)


_STEPS = 8


def _smooth(points: np.ndarray) -> np.ndarray:
    """Runs a Catmull-Rom curve through points [n, 2]; returns [(n - 1) * 8 + 1, 2]."""
    padded = np.concatenate([points[:1], points, points[-1:]])
    before, start, end, after = padded[:-3], padded[1:-2], padded[2:-1], padded[3:]
    t = (np.arange(_STEPS) / _STEPS)[None, :, None]
    before, start, end, after = (p[:, None] for p in (before, start, end, after))
    curve = start + 0.5 * t * (
        end
        - before
        + t * (2 * before - 5 * start + 4 * end - after + t * (3 * (start - end) + after - before))
    )
    return np.concatenate([curve.reshape(-1, 2), points[-1:]])


def _background(colour: str, view: int, rng: np.random.Generator) -> Image.Image:
    """Draws what a product stands before: studio white, a tinted wall, a floor, a round backdrop."""
    tint = _mix(COLOURS[colour], _WHITE, 0.78)
    neutral = [_WHITE, _CREAM, (236, 238, 240), (240, 234, 226)][int(rng.integers(4))]
    kind = int(rng.integers(4)) if view else int(rng.integers(2))
    image = Image.new("RGB", (_SEEN, _SEEN), tint if kind in (1, 2) else neutral)
    draw = ImageDraw.Draw(image)
    if kind == 2:
        draw.rectangle((0, rng.uniform(0.62, 0.8) * _SEEN, _SEEN, _SEEN), fill=_mix(neutral, _WOOD, 0.3))
    elif kind == 3:
        radius = rng.uniform(0.4, 0.47) * _SEEN
        middle = _SEEN / 2
        draw.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill=tint)
    return image


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    """Returns `first` with a `share` of `second` mixed in."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue
