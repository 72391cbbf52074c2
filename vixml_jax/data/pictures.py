"""One picture into the pixels a vision tower reads; whatever is wrong with it has a name.

Files come from the web: cut off, renamed, empty, or made to harm. Whatever they hold, `load` gives a picture
or raises UnreadablePicture, and takes bounded memory.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import threading
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# A path, the bytes of a file, or a picture that is open already.
Picture = str | os.PathLike[str] | bytes | Image.Image

WHITE = (255, 255, 255)
# A file or a picture beyond these is no product's photograph; a small file may unfold to any size.
MAX_BYTES = 256 << 20
MAX_PIXELS = 64_000_000
# What shops and cameras write, as far as this Pillow knows it. Others are never tried: EPS starts a program.
Image.init()
FORMATS = tuple(
    name
    for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
    if name in Image.OPEN
)

# One picture beyond this is decoded at a time: many threads would need as many times its memory.
LARGE_PIXELS = 8_000_000
_large = threading.Lock()

# Pillow warns of large pictures before we can look at their size; which are too large is said here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadablePicture(Exception):
    """Why a picture counts as missing.

    Attributes:
      problem: what kind of thing is wrong, such as "an empty file".
      detail: the particulars, often empty.
    """

    def __init__(self, problem: str, detail: str = ""):
        self.problem, self.detail = problem, detail
        super().__init__(f"{problem} ({detail})" if detail else problem)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Reads the bytes of a picture's file; never waits for a device or a pipe.

    Raises:
      UnreadablePicture: if it is no regular file, larger than MAX_BYTES, or cannot be read.
      FileNotFoundError: if there is nothing.
    """
    try:
        _check_file(os.stat(path))  # opening a device may do something
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(os.fspath(path)) from None
    except OSError as error:  # no permission, a circle of links, a name that is too long
        _raise_if_ours(error)
        raise UnreadablePicture("a file that cannot be opened", error.strerror or "") from None
    except ValueError as error:  # a null byte
        raise UnreadablePicture("not a path", str(error)) from None
    with open(handle, "rb") as file:
        _check_file(os.fstat(handle))
        try:
            data = file.read(MAX_BYTES + 1) or b""
        except OSError as error:
            _raise_if_ours(error)
            raise UnreadablePicture("a file that cannot be read", error.strerror or "") from None
    if len(data) > MAX_BYTES:  # it has grown, or its size was no truth
        raise UnreadablePicture("a file too large", f"more than {MAX_BYTES:,} bytes")
    return data


def _raise_if_ours(error: OSError) -> None:
    """A machine that is short of something says nothing about a picture, which would count as missing."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT):
        raise error


def _check_file(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise UnreadablePicture("a directory")
    if not stat.S_ISREG(status.st_mode):
        raise UnreadablePicture("a device, pipe or socket")
    if status.st_size > MAX_BYTES:
        raise UnreadablePicture("a file too large", f"{status.st_size:,} bytes, at most {MAX_BYTES:,}")


def load(picture: Picture) -> Image.Image:
    """Opens a picture as RGB: upright, the first frame, what is transparent on white.

    Raises:
      UnreadablePicture: if it cannot be read.
    """
    if isinstance(picture, Image.Image):
        return _guarded(_prepared, picture)
    if not isinstance(picture, bytes):
        try:
            picture = read_file(picture)
        except FileNotFoundError:
            raise UnreadablePicture("no such file") from None
    if not picture:
        raise UnreadablePicture("an empty file")
    return _guarded(_decoded, picture)


def decode(picture: Picture) -> Image.Image | None:
    """Returns what `load` returns, or None for a picture that cannot be read."""
    try:
        return load(picture)
    except UnreadablePicture:
        return None


def fitted(image: Image.Image, size: int, resampling: str = "bicubic") -> Image.Image:
    """Resizes a picture to fit a square of `size`; one that fits already stays as it is."""
    scale = size / max(image.size)
    # Of a very long picture no side may vanish.
    width, height = (max(1, min(size, round(side * scale))) for side in image.size)
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling[resampling.upper()])


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


def _guarded(read: Any, source: Any) -> Image.Image:
    try:
        return read(source)
    except (UnreadablePicture, MemoryError):  # the size is bounded: it is the machine that has too little
        raise
    except UnidentifiedImageError:
        raise UnreadablePicture("not a picture of a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadablePicture("a picture too large", f"at most {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # decoders that are fed with anything raise whatever they stumble on
        raise UnreadablePicture("a broken picture", _short(error)) from None


def _decoded(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return _prepared(image)


def _prepared(image: Image.Image) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise UnreadablePicture("a picture without pixels", f"{width} x {height}")
    if width * height > MAX_PIXELS:
        size = f"{width:,} x {height:,} pixels, at most {MAX_PIXELS:,}"
        raise UnreadablePicture("a picture too large", size)
    with _large if width * height > LARGE_PIXELS else contextlib.nullcontext():
        image.load()
        image = _eight_bits(_upright(image))
        if image.has_transparency_data:
            layers = image.convert("RGBA")
            image = Image.new("RGBA", image.size, (*WHITE, 255))
            image.alpha_composite(layers)
        if image.mode == "LAB":  # which Pillow turns to RGB with colour profiles only
            image = image.getchannel("L")
        return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:  # the machine's, as above
        raise
    except Exception:  # broken EXIF raises whatever; the pixels beside it may be sound
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales grey of 16 or 32 bits, or of floating point, which Pillow would clip at 255."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.nan_to_num(np.asarray(image, np.float32))
    largest = values.max(initial=0)
    if image.mode == "F":
        white = 1.0 if largest <= 1 else 255.0
    else:
        white = 2.0**16 - 1 if largest < 2**16 else 2.0**31 - 1
    return Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))


def _short(error: Exception) -> str:
    """An error's text in one line, without addresses, which differ from run to run."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.partition(" <_io.")[0][:120]
