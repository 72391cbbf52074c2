"""Pictures of every kind into pixels, and what is no picture into a reason."""

import errno
import io
import os
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vixml_jax.data import pictures
from vixml_jax.data.pictures import UnreadablePicture

PREPROCESSING = {"size": 8, "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)}
RED = np.array([255, 0, 0])


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def plain(colour, size=(8, 8), form="PNG", mode="RGB", **options):
    return encoded(Image.new(mode, size, colour), form, **options)


def png(width, height, depth=8, colour=2, body=b"", extra=b""):
    """A PNG of whatever its header claims."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def gif(width, height):
    return encoded(Image.new("P", (4, 4)), "GIF").replace(
        struct.pack("<HH", 4, 4), struct.pack("<HH", width, height)
    )


def photograph(form="JPEG"):
    noise = np.random.default_rng(0).integers(0, 255, (64, 48, 3)).astype(np.uint8)
    return encoded(Image.fromarray(noise), form)


@pytest.mark.parametrize("size", [(16, 4), (4, 16), (3, 3), (40, 40), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("resampling", ["bilinear", "bicubic", "lanczos"])
def test_a_picture_is_fitted_and_padded_with_white(size, resampling):
    image = Image.new("RGB", size, (0, 0, 0))
    pixels = pictures.to_pixels(image, **PREPROCESSING, resampling=resampling)
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.float32
    mean, std = np.array(PREPROCESSING["mean"]), np.array(PREPROCESSING["std"])
    white, black = (1 - mean) / std, -mean / std
    is_white = np.isclose(pixels, white, atol=1e-5).all(-1)
    is_black = np.isclose(pixels, black, atol=1e-5).all(-1)
    assert (is_white | is_black).all()
    expected = {(16, 4): 16, (4, 16): 16, (1, 5000): 8, (5000, 1): 8}
    assert is_black.sum() == expected.get(size, 64)
    assert is_black[3:5, 3:5].any()  # in the middle


def test_resampling_is_that_of_pillow():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (20, 20, 3)).astype(np.uint8))
    for name in ("bilinear", "bicubic", "lanczos"):
        wanted = np.asarray(image.resize((8, 8), Image.Resampling[name.upper()]), np.float32) / 255
        got = pictures.to_pixels(image, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), name)
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_all_formats_are_there():
    """Otherwise every picture of that format would silently be a broken one."""
    wanted = {"BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"}
    assert set(pictures.FORMATS) >= wanted
    for form in pictures.FORMATS:
        options = {} if form in ("PPM", "BMP", "PNG", "TIFF", "GIF", "JPEG2000") else {"quality": 95}
        assert np.abs(np.asarray(pictures.load(plain("red", (32, 32), form, **options))) - RED).max() < 8, (
            form
        )


RGBA_TRANSPARENT = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
PALETTE = Image.new("P", (4, 4), 1)
PALETTE.putpalette([0, 0, 255, 255, 0, 0])


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (plain((255, 0, 0, 255), mode="RGBA"), RED),
        (plain((0, 0, 0, 0), mode="RGBA"), 255),
        (plain((0, 0), mode="LA"), 255),
        (plain((0, 255, 255, 0), mode="CMYK", form="TIFF"), RED),
        (plain((0, 255, 255, 0), mode="CMYK", form="JPEG", quality=95), RED),
        (encoded(PALETTE), RED),
        (encoded(PALETTE, transparency=1), 255),
        (encoded(PALETTE, transparency=0), RED),
        (encoded(PALETTE, "GIF"), RED),
        (encoded(PALETTE, "GIF", transparency=1), 255),
        (plain(1, mode="1"), 255),
        (plain(0, mode="1"), 0),
        (encoded(Image.fromarray(np.full((4, 4), 40_000, np.uint16))), round(40_000 / 257)),
        (encoded(Image.fromarray(np.full((4, 4), 200, np.uint16))), 1),
        (encoded(Image.fromarray(np.full((4, 4), 40_000, np.uint16)), "TIFF"), round(40_000 / 257)),
        (encoded(Image.fromarray(np.full((4, 4), 2**30, np.int32)), "TIFF"), 128),
        (encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), 128),
        (encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), 0),
        (encoded(Image.new("LAB", (4, 4), (255, 128, 128)), "TIFF"), 255),
        (png(1, 1, depth=16, body=b"\0" + b"\xff\xff" + bytes(4)), RED),
        (encoded(Image.new("RGB", (4, 4), "red"), "GIF", save_all=True,
                 append_images=[Image.new("RGB", (4, 4), "blue")]), RED),
        (encoded(Image.new("RGB", (4, 4), "red"), "PNG", save_all=True,
                 append_images=[Image.new("RGB", (4, 4), "blue")]), RED),
        (encoded(Image.new("RGB", (4, 4), "red"), "WEBP", save_all=True, lossless=True,
                 append_images=[Image.new("RGB", (4, 4), "blue")]), RED),
        (encoded(Image.new("RGB", (4, 4), "red"), "MPO", save_all=True, quality=95,
                 append_images=[Image.new("RGB", (4, 4), "blue")]), RED),
    ],
)  # fmt: skip
def test_pictures_of_every_mode(data, colour):
    image = pictures.load(data)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, np.int32) - colour).max() < 8


def test_pictures_that_are_open_already():
    assert np.asarray(pictures.load(Image.new("L", (2, 2), 7))).max() == 7
    assert np.asarray(pictures.load(RGBA_TRANSPARENT)).min() == 255
    with pytest.raises(UnreadablePicture, match="without pixels"):
        pictures.load(Image.new("RGB", (0, 3)))
    with Image.open(io.BytesIO(plain("red"))) as closed:
        pass
    with pytest.raises(UnreadablePicture, match="broken"):
        pictures.load(closed)


@pytest.mark.parametrize(
    ("orientation", "corner"), [(1, (0, 0)), (3, (5, 1)), (6, (1, 0)), (8, (0, 5)), (5, (0, 0)), (77, (0, 0))]
)
def test_a_turned_photograph_is_set_upright(orientation, corner):
    image = Image.new("RGB", (6, 2), "white")
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = pictures.load(encoded(image, "PNG", exif=exif))
    assert upright.size == ((2, 6) if orientation in (5, 6, 8) else (6, 2))
    assert upright.getpixel(corner) == (0, 0, 0)


@pytest.mark.parametrize("exif", [b"Exif\0\0MM", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(40)])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_no_harm(exif):
    assert np.abs(np.asarray(pictures.load(plain("red", form="JPEG", exif=exif, quality=95))) - RED).max() < 8


BOMB = png(100_000, 100_000)
UNREADABLE = {
    "an empty file": b"",
    "not a picture of a known format": b"<html>not found</html>",
    "a picture too large (at most 64,000,000 pixels": BOMB,
    "a picture too large (9,000 x 9,000": png(9_000, 9_000, body=bytes(100)),
    "not a picture": gif(0, 4),
    "a broken picture (image file is truncated": photograph()[:-700],
    "a broken picture": png(4, 4, body=b"short"),
}


@pytest.mark.parametrize("reason", UNREADABLE)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_picture_has_a_reason(reason):
    data = UNREADABLE[reason]
    assert pictures.decode(data) is None
    with pytest.raises(UnreadablePicture) as raised:
        pictures.load(data)
    assert str(raised.value).startswith(reason)
    assert "0x" not in str(raised.value)


def test_files_that_are_no_files(tmp_path):
    (tmp_path / "dir.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")  # who opens it would wait for a writer
    (tmp_path / "null.jpg").symlink_to("/dev/null")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(10 << 40)  # sparse
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(tmp_path)  # the path of a socket has to be short
        listener.bind("socket.jpg")
    for name, reason in {
        "dir.jpg": "a directory",
        "pipe.jpg": "a device, pipe or socket",
        "null.jpg": "a device, pipe or socket",
        "zero.jpg": "a device, pipe or socket",
        "socket.jpg": "a device, pipe or socket",
        "circle.jpg": "a file that cannot be opened",
        "huge.jpg": "a file too large (10,995,116,277,760 bytes",
        "nowhere.jpg": "no such file",
        "none.jpg": "no such file",
        "none/none.jpg": "no such file",
        "huge.jpg/none.jpg": "no such file",
        "x" * 300: "a file that cannot be opened",
        "a\0b": "not a path",
    }.items():
        for path in (str(tmp_path / name), tmp_path / name):
            with pytest.raises(UnreadablePicture) as raised:
                pictures.load(path)
            assert str(raised.value).startswith(reason), name


@pytest.mark.parametrize("form", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"])
@pytest.mark.filterwarnings("ignore")
def test_no_bytes_do_harm(form):
    """Whatever is changed in a file, it is a picture or it has a reason; and no reason names the machine."""
    seed = int(np.random.SeedSequence().entropy % 2**32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    whole = np.frombuffer(photograph(form), np.uint8)
    outcomes = set()
    for _ in range(60):
        data = whole.copy()
        # Headers are what leads decoders astray.
        where = (len(data) * rng.random(rng.integers(1, 9)) ** 4).astype(int)
        data[where] = rng.integers(0, 256, len(where))
        data = data[: len(data) if rng.random() < 0.5 else rng.integers(0, len(data))].tobytes()
        try:
            image = pictures.load(data)
            outcomes.add("read")
            assert np.isfinite(pictures.to_pixels(image, **PREPROCESSING)).all()
        except UnreadablePicture as problem:
            outcomes.add(str(problem))
    assert len(outcomes) > 1
    assert not [outcome for outcome in outcomes if "0x" in outcome or "\n" in outcome]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.ESTALE])
def test_what_the_machine_lacks_is_no_fault_of_a_picture(tmp_path, monkeypatch, number):
    """Else it would count as missing, and the dataset would be prepared without it."""
    (tmp_path / "a.png").write_bytes(b"x")

    def short(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pictures.os, "open", short)
    with pytest.raises(OSError, match=os.strerror(number)):
        pictures.load(tmp_path / "a.png")


def test_no_memory_for_a_picture_is_no_fault_of_it(monkeypatch):
    def short(*_, **__):
        raise MemoryError

    monkeypatch.setattr(pictures.Image, "open", short)
    with pytest.raises(MemoryError):
        pictures.load(b"picture")


def test_too_little_memory_to_turn_a_picture_is_the_machines(monkeypatch):
    """Else it would lie on its side where memory is short, and stand elsewhere."""

    def short(_):
        raise MemoryError

    monkeypatch.setattr(pictures.ImageOps, "exif_transpose", short)
    with pytest.raises(MemoryError):
        pictures.load(plain("red"))
