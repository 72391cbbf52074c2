"""One picture into the pixels a vision tower reads."""

from __future__ import annotations

import io
import os
import warnings

import numpy as np
from PIL import Image, ImageOps

# A path, the bytes of a file, or a picture that is open already.
Picture = str | os.PathLike[str] | bytes | Image.Image

WHITE = (255, 255, 255)


def decode(picture: Picture) -> Image.Image | None:
    """Opens a picture as RGB, upright, what is transparent on white; None for one that cannot be read."""
    if isinstance(picture, bytes):
        if not picture:
            return None
        source: io.BytesIO | str | os.PathLike[str] = io.BytesIO(picture)
    elif isinstance(picture, Image.Image):
        return _on_white(picture)
    else:
        source = picture
    try:
        with warnings.catch_warnings():
            # Pillow warns of what may be a decompression bomb; ours is not the place to find out.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                return _on_white(image)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError,
            Image.DecompressionBombWarning):  # fmt: skip
        return None


def fitted(image: Image.Image, size: int, resampling: str = "bicubic") -> Image.Image:
    """Resizes a picture to fit a square of `size`; one that fits already stays as it is."""
    return ImageOps.contain(image, (size, size), Image.Resampling[resampling.upper()])


def to_pixels(
    image: Image.Image,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    resampling: str = "bicubic",
) -> np.ndarray:
    """Resizes a picture to fit a square, pads it with white, and normalises it (ViXML).

    Args:
      image: RGB.
      size: side of the square, in pixels.
      mean: of values in [0, 1], per channel; subtracted.
      std: the values are then divided by it.
      resampling: "bilinear", "bicubic" or "lanczos".

    Returns:
      float32 [size, size, 3].
    """
    inner = fitted(image, size, resampling)
    square = Image.new("RGB", (size, size), WHITE)
    square.paste(inner, ((size - inner.width) // 2, (size - inner.height) // 2))
    values = np.asarray(square, np.float32) / 255
    return (values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def _on_white(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):  # 16-bit grey, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.new("RGBA", image.size, (*WHITE, 255))
        image.alpha_composite(layers)
    return image.convert("RGB")
